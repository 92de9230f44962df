"""What the betas of a step say of the elements that they are for.

A beta of shape [rows] has one for each row of its tensor, and all rows have as many elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

ROUNDING = 1e-6  # of a cap in float32


def share_at_cap(optimizer: Optimizer) -> float:
    """Of an Adaptive Memory optimizer's elements, those whose last beta was at its cap."""
    at_cap = elements = 0.0
    for group in optimizer.param_groups:
        cap = group["betas"][0] if "betas" in group else group["beta_max"]
        params = [p for p in group["params"] if "beta" in optimizer.state[p]]
        if not params:
            continue
        betas = [optimizer.state[p]["beta"] for p in params]
        counts = torch.tensor([beta.numel() for beta in betas], device="cpu")
        sizes = torch.tensor([p.numel() for p in params], dtype=torch.float64, device="cpu")
        # Read back at once: there may be thousands on a GPU.
        last = torch.cat([beta.reshape(-1) for beta in betas]).cpu()
        each = (sizes / counts.clamp(min=1)).repeat_interleave(counts)
        elements += float(sizes.sum())
        at_cap += float(each[last > cap - ROUNDING].sum())
    return at_cap / elements


def beta_by_tensor(optimizer: Optimizer, params: Sequence[Tensor]) -> list[float]:
    """Each tensor's last beta, the mean over its rows where each has its own."""
    return torch.stack([optimizer.state[p]["beta"].mean() for p in params]).tolist()

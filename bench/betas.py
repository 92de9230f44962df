"""The share of the parameters whose beta is at its cap: what a step costs depends on it."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

ROUNDING = 1e-6  # of a cap in float32


def share_at_cap(optimizer: Optimizer) -> float:
    """Of an Adaptive Memory optimizer's elements, those whose last beta was at its cap."""
    at_cap = elements = 0
    for group in optimizer.param_groups:
        cap = group["betas"][0] if "betas" in group else group["beta_max"]
        params = [p for p in group["params"] if "beta" in optimizer.state[p]]
        if params:
            betas = torch.stack([optimizer.state[p]["beta"] for p in params]).tolist()
            sizes = [p.numel() for p in params]
            elements += sum(sizes)
            at_cap += sum(n for n, beta in zip(sizes, betas, strict=True) if beta > cap - ROUNDING)
    return at_cap / elements

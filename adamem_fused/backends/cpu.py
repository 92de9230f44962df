"""The cpu backend: the C++ operators of csrc/cpu, for tensors on the CPU.

One call a step for the sums and one for the update, or one for both where no tensor's
beta waits for another's. Multi-threaded (torch.set_num_threads), vectorised for AVX-512,
AVX2 or the baseline (ATEN_CPU_CAPABILITY overrides the choice), and deterministic: the
same bits with any number of threads, and AVX-512 those of AVX2.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from adamem_fused.backends import ops
from adamem_fused.backends.batch import AdamWBatch, Batch, SGDBatch

name = "cpu"
fused = True
shares_sums = True


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot be used for tensors on `device`, or None."""
    if device.type != "cpu":
        return f"it works on CPU tensors, and these are on {device}"
    return ops.unavailable


def _lrs(batch: Batch) -> Tensor:
    """The groups' learning rates, [groups] float64; on the tensors' device if one is a tensor."""
    lrs = [h.lr for h in batch.hypers]
    if any(isinstance(lr, Tensor) for lr in lrs):
        device = batch.params[0].device
        return torch.stack(
            [torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(()) for lr in lrs]
        )
    if torch.compiler.is_compiling():
        return torch.tensor(lrs, dtype=torch.float64, device="cpu")
    if ops.extension.any_modes():
        # Not a constant: a mode of fake tensors keeps those, and its copies free them twice.
        like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        return torch.stack([torch.full((), float(lr), **like) for lr in lrs])
    # A third of the time, but no operator: where tensors are fake, this one would be real.
    return torch.frombuffer(array("d", lrs), dtype=torch.float64)


def _hypers(batch: Batch) -> list[float]:
    """The groups' other hyperparameters, flat, in the order that csrc/ops.cpp gives."""
    return [
        float(value)
        for h, shared in zip(batch.hypers, batch.shared, strict=True)
        for value in (*h[1:], shared)
    ]


def adamw_stats(batch: AdamWBatch, grad_scale: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    rows: Tensor = ops.call(
        "adamw_stats",
        batch.params,
        batch.grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        batch.steps,
        batch.beta_prods,
        batch.prev_lrs,
        _lrs(batch),
        batch.group_sizes,
        _hypers(batch),
        grad_scale,
    )
    return rows


def adamw_apply(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    ops.call(
        "adamw_apply_",
        batch.params,
        batch.grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        batch.steps,
        batch.beta_prods,
        batch.prev_lrs,
        batch.betas,
        rows,
        _lrs(batch),
        batch.group_sizes,
        _hypers(batch),
        grad_scale,
        found_inf,
    )


def sgd_stats(batch: SGDBatch, grad_scale: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    rows: Tensor = ops.call(
        "sgd_stats",
        batch.params,
        batch.grads,
        batch.momentum_buffers,
        batch.steps,
        batch.prev_lrs,
        _lrs(batch),
        batch.group_sizes,
        _hypers(batch),
        grad_scale,
    )
    return rows


def sgd_apply(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    ops.call(
        "sgd_apply_",
        batch.params,
        batch.grads,
        batch.momentum_buffers,
        batch.steps,
        batch.prev_lrs,
        batch.betas,
        rows,
        _lrs(batch),
        batch.group_sizes,
        _hypers(batch),
        grad_scale,
        found_inf,
    )

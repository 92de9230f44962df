"""The cpu backend: the C++ operators of csrc/cpu, for tensors on the CPU.

One call for each half of a step, or one for both where no tensor's beta waits for
another's. Multi-threaded (torch.set_num_threads), vectorised for AVX-512,
AVX2 or the baseline (ATEN_CPU_CAPABILITY overrides the choice), and deterministic: the
same bits with any number of threads, and AVX-512 those of AVX2.
"""

from __future__ import annotations

from array import array
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adamem_fused.backends import ops
from adamem_fused.backends.batch import AdamWBatch, Batch, SGDBatch
from adamem_fused.backends.batch import check as check

name = "cpu"
fused = True
shares_sums = True
packs = True


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


def _arguments(
    batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Any, ...]:
    """As the operators of csrc/ops.cpp take them."""
    packed, rounding = [], None
    if batch.packed is not None:
        packed, rounding = list(chain(*batch.packed.lists())), batch.packed.rounding
    return (
        *batch.lists(), _lrs(batch), batch.group_sizes, _hypers(batch), grad_scale, found_inf,
        packed, rounding,
    )  # fmt: skip


def squared_norms(batch: Batch) -> Tensor:
    """The sum of each gradient's squares, [tensors] float64."""
    squares: Tensor = ops.call("squared_norms", batch.grads)
    return squares


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64; updates where a guess is made."""
    rows: Tensor = ops.call("adamw_begin_", *_arguments(batch, grad_scale, found_inf))
    return rows


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    ops.call("adamw_finish_", *_arguments(batch, grad_scale, found_inf), rows)


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    rows: Tensor = ops.call("sgd_begin", *_arguments(batch, grad_scale, found_inf))
    return rows


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    ops.call("sgd_finish_", *_arguments(batch, grad_scale, found_inf), rows)

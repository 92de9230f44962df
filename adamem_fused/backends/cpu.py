"""The cpu backend: the kernels of csrc/cpu, for tensors on the CPU.

One call for each half of a step, or one for both where no tensor's beta waits for
another's. Multi-threaded (torch.set_num_threads), vectorised for AVX-512, AVX2, NEON or the
baseline (ATEN_CPU_CAPABILITY overrides the choice), and deterministic: the same bits with any
number of threads, and AVX-512 and NEON those of AVX2.

The compiled extension calls them, which takes no time with a tensor; where there is none for this
torch, Python does, with the same bits (cpu_library.py).
"""

from __future__ import annotations

import platform
from array import array
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adamem_fused.backends import cpu_library, ops
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
    return None if ops.extension is not None else cpu_library.unavailable


def kernels() -> str:
    """The instruction set of the kernels that run, as csrc/cpu/kernels.cpp chooses them."""
    if platform.machine() in ("aarch64", "arm64"):
        return "NEON"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith(("AVX512", "AVX10")):
        return "AVX-512"
    return "AVX2" if capability.startswith("AVX2") else "baseline"


def _is_plain(*lists: list[Tensor]) -> bool:
    """Whether the tensors' data may be read through their addresses, past torch's dispatcher."""
    return all(
        {Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))
        and True not in map(Tensor.is_neg, tensors)
        for tensors in lists
    )


def _goes_by_ctypes() -> bool:
    """Whether the library is to be called from here, with no operator that somebody asks for."""
    return ops.extension is None and not torch.compiler.is_compiling() and not ops.any_modes()


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
    if ops.any_modes():
        # Not a constant: a mode of fake tensors keeps those, and its copies free them twice.
        like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        return torch.stack([torch.full((), float(lr), **like) for lr in lrs])
    # A third of the time, but no operator: where tensors are fake, this one would be real.
    return torch.frombuffer(array("d", lrs), dtype=torch.float64)


def _arguments(
    batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Any, ...]:
    """As the operators of ops.py take them."""
    packed, rounding = [], None
    if batch.packed is not None:
        packed, rounding = list(chain(*batch.packed.lists())), batch.packed.rounding
    return (
        *batch.lists(), _lrs(batch), batch.group_sizes, ops.flat_hypers(batch), grad_scale,
        found_inf, packed, rounding,
    )  # fmt: skip


def squared_norms(batch: Batch) -> Tensor:
    """The sum of each gradient's squares, [tensors] float64."""
    if _goes_by_ctypes() and _is_plain(batch.grads):
        return cpu_library.squared_norms(batch.grads)
    squares: Tensor = ops.call("squared_norms", batch.grads)
    return squares


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64; updates where a guess is made."""
    if _goes_by_ctypes() and _is_plain(*batch.all_lists()):
        return cpu_library.adamw_begin(batch, grad_scale, found_inf)
    rows: Tensor = ops.call("adamw_begin_", *_arguments(batch, grad_scale, found_inf))
    return rows


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    if _goes_by_ctypes() and _is_plain(*batch.all_lists()):
        cpu_library.adamw_finish(batch, rows, grad_scale, found_inf)
    else:
        ops.call("adamw_finish_", *_arguments(batch, grad_scale, found_inf), rows)


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    if _goes_by_ctypes() and _is_plain(*batch.all_lists()):
        return cpu_library.sgd_begin(batch, grad_scale, found_inf)
    rows: Tensor = ops.call("sgd_begin", *_arguments(batch, grad_scale, found_inf))
    return rows


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    if _goes_by_ctypes() and _is_plain(*batch.all_lists()):
        cpu_library.sgd_finish(batch, rows, grad_scale, found_inf)
    else:
        ops.call("sgd_finish_", *_arguments(batch, grad_scale, found_inf), rows)

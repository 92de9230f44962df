"""The operators of csrc/ops.cpp for CUDA tensors, over the cuda backend.

So that a step which torch.compile or torch.export has traced runs on a GPU too. An operator
is given lists and keeps nothing from call to call: every call uploads tables anew, and cannot
be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from adamem_fused.backends import cuda, ops
from adamem_fused.backends.batch import AdamWBatch, AdamWHyper, Packed, SGDBatch, SGDHyper

Tensors: TypeAlias = list[Tensor]


def _groups(lrs: Tensor, hypers: Sequence[float]) -> Iterator[tuple[Tensor | float, ...]]:
    """Each group's lr and other hyperparameters, in the order that csrc/ops.cpp gives."""
    for lr, *row, _ in _rows(lrs, hypers):
        yield (lr, *row[:-3], *map(bool, row[-3:]))


def _shared(lrs: Tensor, hypers: Sequence[float]) -> list[bool]:
    return [bool(shared) for *_, shared in _rows(lrs, hypers)]


def _rows(lrs: Tensor, hypers: Sequence[float]) -> Iterator[tuple[Tensor | float, ...]]:
    columns = len(hypers) // max(1, lrs.numel())
    for i in range(lrs.numel()):
        yield (lrs[i], *hypers[i * columns : (i + 1) * columns])


def _packed(packed: Tensors, rounding: Tensor | None, tensors: int) -> Packed | None:
    """From one flat list: the scales of each memory, and the remainders."""
    if rounding is None:
        return None
    *scales, remainders = (packed[i : i + tensors] for i in range(0, len(packed), tensors))
    return Packed(tuple(scales), remainders, rounding)


def _adamw_batch(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
    beta_prods: Tensors, prev_lrs: Tensors, betas: Tensors, lrs: Tensor,
    group_sizes: Sequence[int], hypers: Sequence[float], packed: Tensors,
    rounding: Tensor | None,
) -> AdamWBatch:  # fmt: skip
    return AdamWBatch(
        params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas,
        [AdamWHyper._make(group) for group in _groups(lrs, hypers)],
        list(group_sizes),
        _shared(lrs, hypers),
        packed=_packed(packed, rounding, len(params)),
    )  # fmt: skip


def _sgd_batch(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: Tensors,
    prev_lrs: Tensors, betas: Tensors, lrs: Tensor, group_sizes: Sequence[int],
    hypers: Sequence[float], packed: Tensors, rounding: Tensor | None,
) -> SGDBatch:  # fmt: skip
    return SGDBatch(
        params, grads, momentum_buffers, steps, prev_lrs, betas,
        [SGDHyper._make(group) for group in _groups(lrs, hypers)],
        list(group_sizes),
        _shared(lrs, hypers),
        packed=_packed(packed, rounding, len(params)),
    )  # fmt: skip


def adamw_begin_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
    beta_prods: Tensors, prev_lrs: Tensors, betas: Tensors, lrs: Tensor,
    group_sizes: Sequence[int], hypers: Sequence[float], grad_scale: Tensor | None,
    found_inf: Tensor | None, packed: Tensors, rounding: Tensor | None,
) -> Tensor:  # fmt: skip
    batch = _adamw_batch(
        params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas, lrs,
        group_sizes, hypers, packed, rounding,
    )  # fmt: skip
    return cuda.adamw_begin(batch, grad_scale, found_inf)


def adamw_finish_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
    beta_prods: Tensors, prev_lrs: Tensors, betas: Tensors, lrs: Tensor,
    group_sizes: Sequence[int], hypers: Sequence[float], grad_scale: Tensor | None,
    found_inf: Tensor | None, packed: Tensors, rounding: Tensor | None, rows: Tensor | None,
) -> None:  # fmt: skip
    batch = _adamw_batch(
        params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas, lrs,
        group_sizes, hypers, packed, rounding,
    )  # fmt: skip
    cuda.adamw_finish(batch, rows, grad_scale, found_inf)


def sgd_begin(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: Tensors,
    prev_lrs: Tensors, betas: Tensors, lrs: Tensor, group_sizes: Sequence[int],
    hypers: Sequence[float], grad_scale: Tensor | None, found_inf: Tensor | None,
    packed: Tensors, rounding: Tensor | None,
) -> Tensor:  # fmt: skip
    batch = _sgd_batch(
        params, grads, momentum_buffers, steps, prev_lrs, betas, lrs, group_sizes, hypers,
        packed, rounding,
    )  # fmt: skip
    return cuda.sgd_begin(batch, grad_scale, found_inf)


def sgd_finish_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: Tensors,
    prev_lrs: Tensors, betas: Tensors, lrs: Tensor, group_sizes: Sequence[int],
    hypers: Sequence[float], grad_scale: Tensor | None, found_inf: Tensor | None,
    packed: Tensors, rounding: Tensor | None, rows: Tensor | None,
) -> None:  # fmt: skip
    batch = _sgd_batch(
        params, grads, momentum_buffers, steps, prev_lrs, betas, lrs, group_sizes, hypers,
        packed, rounding,
    )  # fmt: skip
    cuda.sgd_finish(batch, rows, grad_scale, found_inf)


def squared_norms(grads: Tensors) -> Tensor:
    # Without the tables of a step, which take more than gradients.
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    return torch.stack(norms).square()


def register() -> None:
    """Gives the operators their CUDA kernels, where the extension has declared them."""
    if ops.unavailable is None and torch.version.hip is None:
        functions = (adamw_begin_, adamw_finish_, sgd_begin, sgd_finish_, squared_norms)
        for function in functions:
            torch.library.impl(f"adamem_fused::{function.__name__}", "cuda", function)

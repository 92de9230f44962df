"""The foreach backend: torch._foreach operations, for tensors on any device.

Pure Python, nothing to compile. Reads nothing back from the device. Every operation is
a pass over memory of its own, so it is many times slower than a fused backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamem_fused.batch import (
    AdamWBatch,
    AdamWHyper,
    Batch,
    Lr,
    SGDBatch,
    SGDHyper,
    group_slices,
)

name = "foreach"
fused = False
shares_sums = False


def unavailable(device: torch.device) -> str | None:
    """None: this backend works everywhere."""
    return None


def _pick(tensors: Sequence[Tensor], indices: list[int]) -> list[Tensor]:
    return [tensors[i] for i in indices]


def _parts(batch: Batch, memories: list[Tensor]) -> Iterator[tuple[int, list[int]]]:
    """Tensors of one group and one dtype of memory: (the group, their indices)."""
    for group, place in enumerate(group_slices(batch)):
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in range(place.start, place.stop):
            by_dtype.setdefault(memories[i].dtype, []).append(i)
        for indices in by_dtype.values():
            yield group, indices


def _column(scalars: list[Tensor]) -> Tensor:
    """0-dim tensors as one vector, in float64."""
    return torch.stack([scalar.double() for scalar in scalars])


def _scalars(column: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    return column.to(like.dtype).unbind()


def _cast(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    return [tensor.to(like.dtype) for tensor in tensors]


def _over_lr(lr: Lr, value: Tensor) -> Tensor:
    """value / lr, and 0 at lr = 0, where the gap term is left out."""
    if isinstance(lr, Tensor):
        lr = lr.to(value)
        return torch.where(lr == 0, torch.zeros_like(value), value / lr)
    return value / lr if lr != 0 else torch.zeros_like(value)


def _in_order(rows: dict[int, Tensor]) -> Tensor:
    """The rows by index as one tensor. An index on the host would make a GPU's step wait."""
    return torch.stack([rows[i] for i in range(len(rows))])


def _clip_beta(rows: list[Tensor], beta_max: float) -> Tensor:
    num, den = torch.stack(rows).unbind(-1)
    return torch.where(den == 0, torch.zeros_like(num), (num / den).clamp(0, beta_max))


def _sums(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])


def _slope(g: list[Tensor], d: list[Tensor], h: AdamWHyper | SGDHyper) -> list[Tensor] | None:
    """c_g g - c_d d, without their common factor prev_lr; None where both are 0."""
    if h.loss_gap:
        return list(torch._foreach_neg(d)) if h.anchored else None
    return list(torch._foreach_sub(g, d)) if h.anchored else g


def _step_x(params: list[Tensor], x: list[Tensor], step: list[Tensor], lr: Lr) -> None:
    """params = x - lr step. `x` may be the params themselves."""
    if isinstance(lr, Tensor):
        lr = lr.to(step[0].device)
        torch._foreach_sub_(x, [s * lr for s in step])
    else:
        torch._foreach_add_(x, step, alpha=-lr)
    torch._foreach_copy_(params, x)


def _store_lr(prev_lrs: list[Tensor], lr: Lr) -> None:
    if isinstance(lr, Tensor):
        torch._foreach_copy_(prev_lrs, [lr] * len(prev_lrs))
    else:
        for prev_lr in prev_lrs:
            prev_lr.fill_(lr)


# ---- AM-AdamW ---------------------------------------------------------------------


class _AdamWTerms(NamedTuple):
    x: list[Tensor]
    g: list[Tensor]
    d: list[Tensor]
    v: list[Tensor]  # the new one
    denominator: list[Tensor]  # P
    damped: list[Tensor]  # lambda P


def _adamw_terms(batch: AdamWBatch, indices: list[int], h: AdamWHyper) -> _AdamWTerms:
    d = _pick(batch.exp_avgs, indices)
    like = d[0]
    x = _cast(_pick(batch.params, indices), like)
    g = _cast(_pick(batch.grads, indices), like)
    if h.maximize:
        g = list(torch._foreach_neg(g))
    v = list(torch._foreach_mul(_pick(batch.exp_avg_sqs, indices), h.beta2))
    torch._foreach_addcmul_(v, g, g, value=1 - h.beta2)

    t = _column(_pick(batch.steps, indices)) + 1
    beta_prod = _column(_pick(batch.beta_prods, indices))
    denominator = list(torch._foreach_div(v, _scalars(1 - h.beta2**t, like)))
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, h.eps)
    torch._foreach_mul_(denominator, _scalars(1 - h.beta_max * beta_prod, like))
    damped = list(torch._foreach_mul(denominator, h.memory_lambda))
    return _AdamWTerms(x, g, d, v, denominator, damped)


def adamw_stats(batch: AdamWBatch, grad_scale: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    batch.check()
    rows: dict[int, Tensor] = {}
    for group, indices in _parts(batch, batch.exp_avgs):
        h = batch.hypers[group]
        x, g, d, _, denominator, damped = _adamw_terms(batch, indices, h)
        weight = torch._foreach_add(damped, 1.0)  # M
        torch._foreach_mul_(weight, denominator)
        torch._foreach_reciprocal_(weight)
        e = torch._foreach_sub(d, g)
        step = torch._foreach_div(d, denominator)
        pull = torch._foreach_mul(damped, d)
        torch._foreach_add_(pull, g)
        torch._foreach_mul_(pull, weight)
        if h.weight_decay != 0:
            torch._foreach_add_(step, x, alpha=h.weight_decay)
            torch._foreach_add_(pull, x, alpha=h.weight_decay)
        num = -_sums(torch._foreach_mul(e, pull))
        slope = _slope(g, d, h)
        if slope is not None:
            gap = _column(_pick(batch.prev_lrs, indices)) * _sums(torch._foreach_mul(slope, step))
            lr = h.lr.to(num) if isinstance(h.lr, Tensor) else h.lr
            num = num + (1 + h.weight_decay * lr) * _over_lr(lr, gap)
        torch._foreach_mul_(e, e)
        den = _sums(torch._foreach_mul(e, weight))
        rows.update(zip(indices, torch.stack([num, den], dim=1).unbind(), strict=True))
    return _in_order(rows)


def adamw_apply(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    rows = adamw_stats(batch, None) if rows is None else rows
    by_tensor = rows.unbind()
    for group, indices in _parts(batch, batch.exp_avgs):
        h = batch.hypers[group]
        x, g, d, v, denominator, damped = _adamw_terms(batch, indices, h)
        steps = _pick(batch.steps, indices)
        beta = _clip_beta(_pick(by_tensor, indices), h.beta_max)
        beta = torch.where(_column(steps) == 0, torch.full_like(beta, h.beta_max), beta)

        # d = ((1 - beta) g + (beta + lambda P) d) / (1 + lambda P)
        torch._foreach_mul_(d, torch._foreach_add(damped, _scalars(beta, d[0])))
        torch._foreach_add_(d, torch._foreach_mul(g, _scalars(1 - beta, d[0])))
        torch._foreach_div_(d, torch._foreach_add(damped, 1.0))
        torch._foreach_copy_(_pick(batch.exp_avg_sqs, indices), v)
        # x = (1 - eta mu) x - eta d / P
        if isinstance(h.lr, Tensor):
            torch._foreach_mul_(x, 1 - h.weight_decay * h.lr.to(x[0]))
        else:
            torch._foreach_mul_(x, 1 - h.lr * h.weight_decay)
        step = list(torch._foreach_div(d, denominator))
        _step_x(_pick(batch.params, indices), x, step, h.lr)

        torch._foreach_add_(steps, 1)
        betas = _pick(batch.betas, indices)
        torch._foreach_copy_(betas, _scalars(beta, betas[0]))
        torch._foreach_mul_(_pick(batch.beta_prods, indices), betas)
        _store_lr(_pick(batch.prev_lrs, indices), h.lr)


# ---- AM-SGD -----------------------------------------------------------------------


def _sgd_terms(
    batch: SGDBatch, indices: list[int], h: SGDHyper
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, g with the weight decay in it, and d."""
    d = _pick(batch.momentum_buffers, indices)
    x = _cast(_pick(batch.params, indices), d[0])
    g = _cast(_pick(batch.grads, indices), d[0])
    if h.maximize:
        g = list(torch._foreach_neg(g))
    if h.weight_decay != 0:
        g = list(torch._foreach_add(g, x, alpha=h.weight_decay))
    return x, g, d


def sgd_stats(batch: SGDBatch, grad_scale: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    batch.check()
    rows: dict[int, Tensor] = {}
    for group, indices in _parts(batch, batch.momentum_buffers):
        h = batch.hypers[group]
        _, g, d = _sgd_terms(batch, indices, h)
        e = torch._foreach_sub(d, g)
        pull = torch._foreach_add(g, d, alpha=h.memory_lambda)
        num = -_sums(torch._foreach_mul(e, pull))
        slope = _slope(g, d, h)
        if slope is not None:
            gap = _column(_pick(batch.prev_lrs, indices)) * _sums(torch._foreach_mul(slope, d))
            num = num + (1 + h.memory_lambda) * _over_lr(h.lr, gap)
        den = _sums(torch._foreach_mul(e, e))
        # A first step has no memory: d = g, and both sums are 0.
        part = torch.stack([num, den], dim=1)
        first = _column(_pick(batch.steps, indices)) == 0
        part = torch.where(first[:, None], torch.zeros_like(part), part)
        rows.update(zip(indices, part.unbind(), strict=True))
    return _in_order(rows)


def sgd_apply(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    rows = sgd_stats(batch, None) if rows is None else rows
    by_tensor = rows.unbind()
    for group, indices in _parts(batch, batch.momentum_buffers):
        h = batch.hypers[group]
        x, g, d = _sgd_terms(batch, indices, h)
        steps = _pick(batch.steps, indices)
        first = _column(steps) == 0
        beta = _clip_beta(_pick(by_tensor, indices), h.beta_max)
        beta = torch.where(first, torch.zeros_like(beta), beta)

        # d = ((beta + lambda) d + (1 - beta) g) / (1 + lambda), and g at the first step
        keep = torch.where(first, torch.zeros_like(beta), beta + h.memory_lambda)
        damping = torch.where(
            first, torch.ones_like(beta), torch.full_like(beta, 1 + h.memory_lambda)
        )
        torch._foreach_mul_(d, _scalars(keep, d[0]))
        torch._foreach_add_(d, torch._foreach_mul(g, _scalars(1 - beta, d[0])))
        torch._foreach_div_(d, _scalars(damping, d[0]))
        _step_x(_pick(batch.params, indices), x, d, h.lr)

        torch._foreach_add_(steps, 1)
        betas = _pick(batch.betas, indices)
        torch._foreach_copy_(betas, _scalars(beta, betas[0]))
        _store_lr(_pick(batch.prev_lrs, indices), h.lr)

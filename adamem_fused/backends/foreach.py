"""The foreach backend: torch._foreach operations, for tensors on any device.

Pure Python, nothing to compile. Reads nothing back from the device. Every operation is
a pass over memory of its own, so it is many times slower than a fused backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamem_fused.backends.batch import (
    AdamWBatch,
    AdamWHyper,
    Batch,
    Lr,
    SGDBatch,
    SGDHyper,
    check,
    group_slices,
)

name = "foreach"
fused = False
shares_sums = False


def unavailable(device: torch.device) -> str | None:
    """None: this backend works everywhere."""
    return None


def _hyper(batch: Batch, group: int) -> Any:
    """A group's hyperparameters, with a number lr as a tensor in a step that is being compiled.

    torch 2.13's default compiler keeps the number of an earlier step where it divides.
    """
    h = batch.hypers[group]
    if isinstance(h.lr, Tensor) or not torch.compiler.is_compiling():
        return h
    return h._replace(lr=torch.full((), h.lr, dtype=torch.float64, device=batch.params[0].device))


def _pick(tensors: Sequence[Tensor], indices: list[int]) -> list[Tensor]:
    return [tensors[i] for i in indices]


def _parts(batch: Batch) -> Iterator[tuple[int, torch.dtype, list[int]]]:
    """Tensors of one group and one dtype of arithmetic: (the group, the dtype, their indices)."""
    first, *others = batch.memories.values()
    for group, place in enumerate(group_slices(batch)):
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in range(place.start, place.stop):
            dtype = torch.promote_types(batch.params[i].dtype, first[i].dtype)
            for memories in others:
                dtype = torch.promote_types(dtype, memories[i].dtype)
            by_dtype.setdefault(dtype, []).append(i)
        for dtype, indices in by_dtype.items():
            yield group, dtype, indices


def _column(scalars: list[Tensor]) -> Tensor:
    """0-dim tensors as one vector, in float64."""
    return torch.stack([scalar.double() for scalar in scalars])


def _scalars(column: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return column.to(dtype).unbind()


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a dtype; those that are of it are the very ones."""
    return [tensor.to(dtype) for tensor in tensors]


def _store(tensors: list[Tensor], values: Sequence[Tensor]) -> None:
    """Copies what does not stand in its place already."""
    places = [i for i, (t, value) in enumerate(zip(tensors, values, strict=True)) if t is not value]
    if places:
        torch._foreach_copy_(_pick(tensors, places), _pick(values, places))


def _over_lr(lr: Lr, value: Tensor) -> Tensor:
    """value / lr, and 0 at lr = 0 or a rounding below, where the gap term is left out."""
    if isinstance(lr, Tensor):
        lr = lr.to(value)
        return torch.where(lr <= 0, torch.zeros_like(value), value / lr)
    return value / lr if lr > 0 else torch.zeros_like(value)


def _in_order(rows: dict[int, Tensor]) -> Tensor:
    """The rows by index as one tensor. An index on the host would make a GPU's step wait."""
    return torch.stack([rows[i] for i in range(len(rows))])


def _clip_beta(rows: list[Tensor], beta_max: float) -> Tensor:
    num, den = torch.stack(rows).unbind(-1)
    none = (den == 0) | den.isposinf()
    return torch.where(none, torch.zeros_like(num), (num / den).clamp(0, beta_max))


def _is_zero(lr: Lr, device: torch.device) -> Tensor | None:
    """Where lr may be 0, whether it is; None where it is not."""
    if isinstance(lr, Tensor):
        return lr.to(device) == 0
    return torch.ones((), dtype=torch.bool, device=device) if lr == 0 else None


def _idle(first: Tensor, lr: Lr, rows: list[Tensor]) -> Tensor | None:
    """Which tensors' step is none: at lr 0 and without a gradient, before any other.

    None where no step can be, as the lr is not 0.
    """
    is_zero = _is_zero(lr, first.device)
    if is_zero is None:
        return None
    return first & is_zero & (torch.stack(rows).unbind(-1)[1] == 0)


def _scalar_lists(batch: Batch, indices: list[int]) -> list[list[Tensor]]:
    return [_pick(scalars, indices) for scalars in batch.lists()[2 + len(batch.memories) :]]


def _restore(idle: Tensor, batch: Batch, indices: list[int], before: list[Tensor]) -> None:
    """Gives the scalars of idle tensors the values from before the step."""
    for scalars, old in zip(_scalar_lists(batch, indices), before, strict=True):
        torch._foreach_copy_(scalars, torch.where(idle, old, _column(scalars)).unbind())


def _sums(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])


def _slope(g: list[Tensor], d: list[Tensor], h: AdamWHyper | SGDHyper) -> list[Tensor] | None:
    """c_g g - c_d d, without their common factor prev_lr; None where both are 0."""
    if h.loss_gap:
        return list(torch._foreach_neg(d)) if h.anchored else None
    return list(torch._foreach_sub(g, d)) if h.anchored else g


def _step_x(x: list[Tensor], step: list[Tensor], lr: Lr) -> None:
    """x = x - lr step."""
    if isinstance(lr, Tensor):
        lr = lr.to(step[0].device)
        torch._foreach_sub_(x, [s * lr for s in step])
    else:
        torch._foreach_add_(x, step, alpha=-lr)


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
    lambda_P: list[Tensor]


def _adamw_terms(
    batch: AdamWBatch, dtype: torch.dtype, indices: list[int], h: AdamWHyper
) -> _AdamWTerms:
    x = _cast(_pick(batch.params, indices), dtype)
    g = _cast(_pick(batch.grads, indices), dtype)
    d = _cast(_pick(batch.exp_avgs, indices), dtype)
    if h.maximize:
        g = list(torch._foreach_neg(g))
    v = list(torch._foreach_mul(_cast(_pick(batch.exp_avg_sqs, indices), dtype), h.beta2))
    torch._foreach_addcmul_(v, g, g, value=1 - h.beta2)

    t = _column(_pick(batch.steps, indices)) + 1
    beta_prod = _column(_pick(batch.beta_prods, indices))
    denominator = list(torch._foreach_sqrt(v))
    torch._foreach_div_(denominator, _scalars((1 - h.beta2**t).sqrt(), dtype))
    torch._foreach_add_(denominator, h.eps)
    torch._foreach_mul_(denominator, _scalars(1 - h.beta_max * beta_prod, dtype))
    lambda_P = list(torch._foreach_mul(denominator, h.memory_lambda))
    return _AdamWTerms(x, g, d, v, denominator, lambda_P)


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    check(batch)
    rows: dict[int, Tensor] = {}
    for group, dtype, indices in _parts(batch):
        h = _hyper(batch, group)
        x, g, d, _, denominator, lambda_P = _adamw_terms(batch, dtype, indices, h)
        weight = torch._foreach_add(lambda_P, 1.0)  # M
        torch._foreach_mul_(weight, denominator)
        torch._foreach_reciprocal_(weight)
        e = torch._foreach_sub(d, g)
        step = torch._foreach_div(d, denominator)
        pull = torch._foreach_mul(lambda_P, d)
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
        torch._foreach_mul_(weight, e)  # before the other e, for their square may overflow
        den = _sums(torch._foreach_mul(weight, e))
        rows.update(zip(indices, torch.stack([num, den], dim=1).unbind(), strict=True))
    return _in_order(rows)


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    rows = adamw_begin(batch, None, None) if rows is None else rows
    by_tensor = rows.unbind()
    for group, dtype, indices in _parts(batch):
        h = _hyper(batch, group)
        x, g, d, v, denominator, lambda_P = _adamw_terms(batch, dtype, indices, h)
        steps = _pick(batch.steps, indices)
        own_rows, first = _pick(by_tensor, indices), _column(steps) == 0
        idle = _idle(first, h.lr, own_rows)
        before = [] if idle is None else list(map(_column, _scalar_lists(batch, indices)))
        beta = _clip_beta(own_rows, h.beta_max)
        beta = torch.where(first, torch.full_like(beta, h.beta_max), beta)

        # d = ((1 - beta) g + (beta + lambda P) d) / (1 + lambda P)
        torch._foreach_mul_(d, torch._foreach_add(lambda_P, _scalars(beta, dtype)))
        torch._foreach_add_(d, torch._foreach_mul(g, _scalars(1 - beta, dtype)))
        torch._foreach_div_(d, torch._foreach_add(lambda_P, 1.0))
        # x = (1 - eta mu) x - eta d / P
        if isinstance(h.lr, Tensor):
            torch._foreach_mul_(x, 1 - h.weight_decay * h.lr.to(x[0]))
        else:
            torch._foreach_mul_(x, 1 - h.lr * h.weight_decay)
        _step_x(x, list(torch._foreach_div(d, denominator)), h.lr)

        _store(_pick(batch.params, indices), x)
        _store(_pick(batch.exp_avgs, indices), d)
        _store(_pick(batch.exp_avg_sqs, indices), v)
        torch._foreach_add_(steps, 1)
        betas = _pick(batch.betas, indices)
        torch._foreach_copy_(betas, beta.unbind())
        torch._foreach_mul_(_pick(batch.beta_prods, indices), betas)
        _store_lr(_pick(batch.prev_lrs, indices), h.lr)
        if idle is not None:
            _restore(idle, batch, indices, before)


# ---- AM-SGD -----------------------------------------------------------------------


def _sgd_terms(
    batch: SGDBatch, dtype: torch.dtype, indices: list[int], h: SGDHyper
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, g with the weight decay in it, and d."""
    x = _cast(_pick(batch.params, indices), dtype)
    g = _cast(_pick(batch.grads, indices), dtype)
    d = _cast(_pick(batch.momentum_buffers, indices), dtype)
    if h.maximize:
        g = list(torch._foreach_neg(g))
    if h.weight_decay != 0:
        g = list(torch._foreach_add(g, x, alpha=h.weight_decay))
    return x, g, d


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    check(batch)
    rows: dict[int, Tensor] = {}
    for group, dtype, indices in _parts(batch):
        h = _hyper(batch, group)
        _, g, d = _sgd_terms(batch, dtype, indices, h)
        e = torch._foreach_sub(d, g)
        pull = torch._foreach_add(g, d, alpha=h.memory_lambda)
        num = -_sums(torch._foreach_mul(e, pull))
        slope = _slope(g, d, h)
        if slope is not None:
            gap = _column(_pick(batch.prev_lrs, indices)) * _sums(torch._foreach_mul(slope, d))
            num = num + (1 + h.memory_lambda) * _over_lr(h.lr, gap)
        den = _sums(torch._foreach_mul(e, e))
        # A first step has no memory: d = g, and both sums are 0. Where the step may be idle, den
        # tells whether there is a gradient, by a number that adds nothing to any other.
        first = _column(_pick(batch.steps, indices)) == 0
        first_den = torch.zeros_like(den)
        is_zero = _is_zero(h.lr, den.device)
        if is_zero is not None:
            own_den = den
            if h.weight_decay != 0:
                _, g, d = _sgd_terms(batch, dtype, indices, h._replace(weight_decay=0.0))
                e = torch._foreach_sub(d, g)
                own_den = _sums(torch._foreach_mul(e, e))
            first_den = torch.where(is_zero & (own_den != 0), first_den + 1e-300, first_den)
        num = torch.where(first, torch.zeros_like(num), num)
        part = torch.stack([num, torch.where(first, first_den, den)], dim=1)
        rows.update(zip(indices, part.unbind(), strict=True))
    return _in_order(rows)


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    rows = sgd_begin(batch, None, None) if rows is None else rows
    by_tensor = rows.unbind()
    for group, dtype, indices in _parts(batch):
        h = _hyper(batch, group)
        x, g, d = _sgd_terms(batch, dtype, indices, h)
        steps = _pick(batch.steps, indices)
        own_rows, first = _pick(by_tensor, indices), _column(steps) == 0
        idle = _idle(first, h.lr, own_rows)
        before = [] if idle is None else list(map(_column, _scalar_lists(batch, indices)))
        beta = _clip_beta(own_rows, h.beta_max)
        beta = torch.where(first, torch.zeros_like(beta), beta)

        # d = ((beta + lambda) d + (1 - beta) g) / (1 + lambda), and g at the first step
        keep = torch.where(first, torch.zeros_like(beta), beta + h.memory_lambda)
        take = 1 - beta
        damping = torch.where(
            first, torch.ones_like(beta), torch.full_like(beta, 1 + h.memory_lambda)
        )
        if idle is not None:
            keep, take = torch.where(idle, 1.0, keep), torch.where(idle, 0.0, take)
        torch._foreach_mul_(d, _scalars(keep, dtype))
        torch._foreach_add_(d, torch._foreach_mul(g, _scalars(take, dtype)))
        torch._foreach_div_(d, _scalars(damping, dtype))
        _step_x(x, d, h.lr)

        _store(_pick(batch.params, indices), x)
        _store(_pick(batch.momentum_buffers, indices), d)
        torch._foreach_add_(steps, 1)
        betas = _pick(batch.betas, indices)
        torch._foreach_copy_(betas, beta.unbind())
        _store_lr(_pick(batch.prev_lrs, indices), h.lr)
        if idle is not None:
            _restore(idle, batch, indices, before)

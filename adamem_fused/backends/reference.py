"""The reference backend: a plain loop, one tensor at a time, in float64.

Slow and meant to be read: the formulas stand in the order and in the letters of
docs/algorithm.md (Topollai & Choromanska, "Adaptive Memory Momentum via a Model-Based
Framework for Deep Learning Optimization", arXiv 2510.04988). Every other backend is checked
against this file, so it shares no arithmetic with any of them. Whatever the dtype of a
tensor, the arithmetic is float64 and each result is rounded once, when it is stored.

A tensor is looked at as a matrix of its segments, [segments, elements of each]: its rows where each
has a beta, and else a single one. What a segment has one of is a column, [segments, 1].

Letters: x parameter, g gradient, d memory (`exp_avg`, `momentum_buffer`), v `exp_avg_sq`,
t step, P Adam's denominator, eta lr, mu weight decay, lam memory_lambda, kappa 1 for the
"anchored" plane and 0 for "level".
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamem_fused import formats
from adamem_fused.backends.batch import (
    KEY,
    LOW,
    ROUNDS,
    AdamWBatch,
    AdamWHyper,
    Batch,
    Packed,
    SGDBatch,
    SGDHyper,
    group_slices,
    segment_slices,
)
from adamem_fused.backends.batch import check as check

name = "reference"
fused = False
shares_sums = False
packs = True


def unavailable(device: torch.device) -> str | None:
    """None: this backend works everywhere."""
    return None


def _segments(tensor: Tensor, beta: Tensor) -> Tensor:
    """[segments, elements of each], float64."""
    count = beta.numel()
    return tensor.double().reshape(count, tensor.numel() // max(1, count))


def _column(scalar: Tensor) -> Tensor:
    """[segments, 1], float64."""
    return scalar.double().reshape(-1, 1)


def _adamw_model(
    g: Tensor, v: Tensor, t: float, beta_prod: Tensor, h: AdamWHyper
) -> tuple[Tensor, Tensor, Tensor]:
    """The new v, the denominator P and M, all float64."""
    v = h.beta2 * v + (1 - h.beta2) * g**2
    P = (1 - h.beta_max * beta_prod) * ((v / (1 - h.beta2**t)).sqrt() + h.eps)
    M = 1 / (P * (1 + h.memory_lambda * P))
    return v, P, M


def _adamw_sums(
    x: Tensor,
    g: Tensor,
    d: Tensor,
    v: Tensor,
    t: float,
    beta_prod: Tensor,
    prev_lr: float,
    h: AdamWHyper,
) -> tuple[Tensor, Tensor]:
    """num and den of each segment, [segments]; num without gap="loss"'s difference of losses."""
    eta, mu, lam, kappa = float(h.lr), h.weight_decay, h.memory_lambda, float(h.anchored)
    _, P, M = _adamw_model(g, v, t, beta_prod, h)
    e = d - g
    slope = -kappa * d if h.loss_gap else g - kappa * d
    gap = prev_lr * (slope * (d / P + mu * x)).sum(1)
    num = -(e * (g + lam * P * d) * M).sum(1) - mu * (x * e).sum(1)
    if eta > 0:
        num = num + (1 + mu * eta) * gap / eta
    den = (e**2 * M).sum(1)
    return num, den


def _adamw_update(
    x: Tensor,
    g: Tensor,
    d: Tensor,
    v: Tensor,
    t: float,
    beta_prod: Tensor,
    beta: Tensor,
    h: AdamWHyper,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new (x, d, v) of one tensor."""
    eta, mu, lam = float(h.lr), h.weight_decay, h.memory_lambda
    v, P, _ = _adamw_model(g, v, t, beta_prod, h)
    d = ((1 - beta) * g + (beta + lam * P) * d) / (1 + lam * P)
    x = (1 - eta * mu) * x - eta * d / P
    return x, d, v


def _guesses(batch: AdamWBatch, i: int, t: float, h: AdamWHyper) -> bool:
    """Whether a step is taken with the cap and then repaired, which matters to what is rounded.

    Elsewhere it comes to the same.
    """
    packed = batch.packed
    return (
        packed is not None
        and packed.is_low(batch, i)
        and packed.may_guess(batch, i)
        # A repair needs the gradient, which may not be what is overwritten.
        and batch.params[i].data_ptr() != batch.grads[i].data_ptr()
        and not h.anchored
        and h.beta_max > 0
        and not (t == 1 and float(h.lr) == 0)
    )


def _adamw_repair(
    x: Tensor,
    g: Tensor,
    d: Tensor,
    v: Tensor,
    t: float,
    beta_prod: Tensor,
    beta: Tensor,
    h: AdamWHyper,
) -> tuple[Tensor, Tensor]:
    """The x and d of a step with beta, from those of one with the cap; v is the new one."""
    P = (1 - h.beta_max * beta_prod) * ((v / (1 - h.beta2**t)).sqrt() + h.eps)
    r = (h.beta_max - beta) / (h.beta_max + h.memory_lambda * P)
    return x - float(h.lr) * r * (g - d) / P, d + r * (g - d)


def _sgd_sums(g: Tensor, d: Tensor, prev_lr: float, h: SGDHyper) -> tuple[Tensor, Tensor]:
    """num and den of each segment, [segments]; g has the weight decay in it."""
    eta, lam, kappa = float(h.lr), h.memory_lambda, float(h.anchored)
    # Not sums of g^2, g d and d^2: their differences are small where d is close to g.
    e = d - g
    num = -(e * (g + lam * d)).sum(1)
    if eta > 0:
        slope = -kappa * d if h.loss_gap else g - kappa * d
        num = num + (1 + lam) * (prev_lr / eta) * (slope * d).sum(1)
    den = (e**2).sum(1)
    return num, den


def _clip_beta(num: Tensor, den: Tensor, beta_max: float) -> Tensor:
    return torch.where((den == 0) | den.isposinf(), 0.0, (num / den).clamp(0.0, beta_max))


def _is_idle(t: float, eta: float, den: Tensor) -> Tensor:
    """Of which segments step t is none: at eta = 0 and without a gradient, before any other."""
    return (den == 0) & (t == 1) & (eta == 0)


def _is_none(idle: Tensor, t: float, eta: float) -> bool:
    """Whether step t is none of the tensor: of all of its segments, of which there may be none."""
    return t == 1 and eta == 0 and bool(idle.all())


def _places(batch: Batch, packed: Packed, i: int) -> Tensor:
    _, offset, stretch, skip, _ = packed.rounding[:, i].tolist()
    numel, device = batch.params[i].numel(), batch.params[i].device
    return formats.places(numel, offset, stretch, skip, device)


def _param(batch: Batch, i: int) -> Tensor:
    """A parameter with what its remainder adds."""
    if batch.packed is None or batch.packed.remainders[i].numel() == 0:
        return batch.params[i]
    return formats.join(batch.params[i], batch.packed.remainders[i])


def _memory(batch: Batch, name: str, i: int) -> Tensor:
    """The values of a memory, which may be codes."""
    memory = batch.memories[name][i]
    if batch.packed is None or memory.dtype not in (torch.int8, torch.uint8):
        return memory
    return formats.decode(memory, _scales(batch.packed, batch, name)[i])


def _scales(packed: Packed, batch: Batch, name: str) -> list[Tensor]:
    return packed.scales[list(batch.memories).index(name)]


def _store_param(batch: Batch, i: int, value: Tensor, idle: Tensor, repaired: bool = False) -> None:
    param = batch.params[i]
    if batch.packed is None or not batch.packed.is_low(batch, i):
        _store(param, value, idle)
        return
    remainder, rounds = batch.packed.remainders[i], batch.packed.rounding[ROUNDS, i] != 0
    value = _but_for_idle(_param(batch, i), value, idle)
    bits = None
    if rounds:
        key, step = int(batch.packed.rounding[KEY, i]), int(batch.steps[i])
        keys = formats.step_keys(key, step)
        own = keys.repaired_param if repaired else keys.param
        bits = formats.random_bits(own, _places(batch, batch.packed, i)).view(param.shape)
    if remainder.numel() > 0:
        new, rest = formats.split(value, bits)
        remainder.copy_(rest)
        param.copy_(new)
    else:
        param.copy_(value if bits is None else formats.to_bfloat16(value, bits))


def _store_memory(
    batch: Batch, name: str, i: int, value: Tensor, idle: Tensor, repaired: bool = False
) -> None:
    memory = batch.memories[name][i]
    if batch.packed is None or memory.dtype not in LOW:
        _store(memory, value, idle)
        return
    value = _but_for_idle(_memory(batch, name, i), value, idle)
    key, step = int(batch.packed.rounding[KEY, i]), int(batch.steps[i])
    keys = formats.step_keys(key, step)
    own = keys.repaired_memories if repaired else keys.memories
    bits = formats.random_bits(own, _places(batch, batch.packed, i)).view(memory.shape)
    if name == "exp_avg_sq":
        bits = bits >> 16
    if memory.dtype == torch.bfloat16:
        memory.copy_(formats.to_bfloat16(value, bits))
    else:
        formats.encode(value, memory, _scales(batch.packed, batch, name)[i], bits)


def _but_for_idle(old: Tensor, value: Tensor, idle: Tensor) -> Tensor:
    """The segments' values in the tensor's shape, with the old ones of those whose step is none."""
    own = _segments(old, idle)
    return torch.where(idle.unsqueeze(1), own, value.reshape(own.shape)).view(old.shape)


def _store(tensor: Tensor, value: Tensor, idle: Tensor) -> None:
    """Replaces the tensor by its segments' values, but for those whose step is none."""
    tensor.copy_(_but_for_idle(tensor, value, idle))


def _gradient(g: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    g = -g.double() if maximize else g.double()
    return g if grad_scale is None else g / grad_scale.to(g)


def _is_skipped(found_inf: Tensor | None) -> bool:
    return found_inf is not None and float(found_inf) != 0


def squared_norms(batch: Batch) -> Tensor:
    """The sum of each gradient's squares, [tensors] float64."""
    return torch.stack([g.double().square().sum() for g in batch.grads])


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    check(batch)
    rows = torch.zeros(sum(map(Tensor.numel, batch.betas)), 2, dtype=torch.float64, device="cpu")
    places = list(segment_slices(batch))
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        for i in range(group.start, group.stop):
            beta = batch.betas[i]
            num, den = _adamw_sums(
                _segments(_param(batch, i), beta),
                _segments(_gradient(batch.grads[i], h.maximize, grad_scale), beta),
                _segments(_memory(batch, "exp_avg", i), beta),
                _segments(_memory(batch, "exp_avg_sq", i), beta),
                float(batch.steps[i]) + 1,
                _column(batch.beta_prods[i]),
                float(batch.prev_lrs[i]),
                h,
            )
            rows[places[i]] = torch.stack([num, den], 1).to(rows)
    return rows.to(batch.params[0].device)


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    own = adamw_begin(batch, grad_scale, found_inf) if rows is None else rows
    if _is_skipped(found_inf):
        return
    places = list(segment_slices(batch))
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        for i in range(group.start, group.stop):
            t = float(batch.steps[i]) + 1
            last = batch.betas[i]
            num, den = own[places[i]].double().unbind(1)
            idle = _is_idle(t, float(h.lr), den)
            # There is no earlier iterate at t = 1.
            beta = torch.full_like(den, h.beta_max) if t == 1 else _clip_beta(num, den, h.beta_max)
            g = _segments(_gradient(batch.grads[i], h.maximize, grad_scale), last)
            beta_prod = _column(batch.beta_prods[i])
            guesses = _guesses(batch, i, t, h)
            x, d, v = _adamw_update(
                _segments(_param(batch, i), last),
                g,
                _segments(_memory(batch, "exp_avg", i), last),
                _segments(_memory(batch, "exp_avg_sq", i), last),
                t,
                beta_prod,
                _column(torch.full_like(beta, h.beta_max) if guesses else beta),
                h,
            )
            _store_param(batch, i, x, idle)
            _store_memory(batch, "exp_avg", i, d, idle)
            _store_memory(batch, "exp_avg_sq", i, v, idle)
            if guesses and bool((beta != h.beta_max) & (den != 0)):
                x, d = _adamw_repair(
                    _segments(_param(batch, i), last),
                    g,
                    _segments(_memory(batch, "exp_avg", i), last),
                    _segments(_memory(batch, "exp_avg_sq", i), last),
                    t,
                    beta_prod,
                    _column(beta),
                    h,
                )
                _store_param(batch, i, x, idle, repaired=True)
                _store_memory(batch, "exp_avg", i, d, idle, repaired=True)
            _store(batch.beta_prods[i], batch.beta_prods[i].double().reshape(-1) * beta, idle)
            _store(batch.betas[i], beta, idle)
            if not _is_none(idle, t, float(h.lr)):
                batch.steps[i].fill_(t)
                batch.prev_lrs[i].fill_(float(h.lr))


def _decayed(x: Tensor, g: Tensor, h: SGDHyper, grad_scale: Tensor | None) -> Tensor:
    g = _gradient(g, h.maximize, grad_scale)
    # Not 0 times an x that may be infinite.
    return g + h.weight_decay * x.double() if h.weight_decay != 0 else g


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    check(batch)
    rows = torch.zeros(sum(map(Tensor.numel, batch.betas)), 2, dtype=torch.float64, device="cpu")
    places = list(segment_slices(batch))
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        for i in range(group.start, group.stop):
            beta, prev_lr = batch.betas[i], float(batch.prev_lrs[i])
            d = _segments(_memory(batch, "momentum_buffer", i), beta)
            if float(batch.steps[i]) == 0:
                # No memory yet: d = g, and both sums are 0. Where the step may be idle, den tells
                # whether there is a gradient, by a number that adds nothing to any other.
                if float(h.lr) == 0:
                    g = _segments(_gradient(batch.grads[i], h.maximize, grad_scale), beta)
                    _, den = _sgd_sums(g, d, prev_lr, h)
                    rows[places[i], 1] = (den != 0).to(rows) * 1e-300
                continue
            g = _segments(_decayed(_param(batch, i), batch.grads[i], h, grad_scale), beta)
            rows[places[i]] = torch.stack(_sgd_sums(g, d, prev_lr, h), 1).to(rows)
    return rows.to(batch.params[0].device)


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    own = sgd_begin(batch, grad_scale, found_inf) if rows is None else rows
    if _is_skipped(found_inf):
        return
    places = list(segment_slices(batch))
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        eta, lam = float(h.lr), h.memory_lambda
        for i in range(group.start, group.stop):
            last = batch.betas[i]
            x = _segments(_param(batch, i), last)
            g = _segments(_decayed(_param(batch, i), batch.grads[i], h, grad_scale), last)
            d = _segments(_memory(batch, "momentum_buffer", i), last)
            num, den = own[places[i]].double().unbind(1)
            t = float(batch.steps[i]) + 1
            idle = _is_idle(t, eta, den)
            if t == 1:
                beta, d = torch.zeros_like(den), g
            else:
                beta = _clip_beta(num, den, h.beta_max)
                d = ((_column(beta) + lam) * d + (1 - _column(beta)) * g) / (1 + lam)
            _store_param(batch, i, x - eta * d, idle)
            _store_memory(batch, "momentum_buffer", i, d, idle)
            _store(batch.betas[i], beta, idle)
            if not _is_none(idle, t, eta):
                batch.steps[i].fill_(t)
                batch.prev_lrs[i].fill_(eta)

"""The reference backend: a plain loop, one tensor at a time, in float64.

Slow and meant to be read: the formulas stand in the order and in the letters of
docs/algorithm.md (Topollai & Choromanska, "Adaptive Memory Momentum via a Model-Based
Framework for Deep Learning Optimization", arXiv 2510.04988). Every other backend is checked
against this file, so it shares no arithmetic with any of them. Whatever the dtype of a
tensor, the arithmetic is float64 and each result is rounded once, when it is stored.

Letters: x parameter, g gradient, d memory (`exp_avg`, `momentum_buffer`), v `exp_avg_sq`,
t step, P Adam's denominator, eta lr, mu weight decay, lam memory_lambda, kappa 1 for the
"anchored" plane and 0 for "level".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamem_fused.backends.batch import (
    AdamWBatch,
    AdamWHyper,
    SGDBatch,
    SGDHyper,
    group_slices,
)
from adamem_fused.backends.batch import check as check

name = "reference"
fused = False
shares_sums = False


def unavailable(device: torch.device) -> str | None:
    """None: this backend works everywhere."""
    return None


def _adamw_model(
    g: Tensor, v: Tensor, t: float, beta_prod: float, h: AdamWHyper
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
    beta_prod: float,
    prev_lr: float,
    h: AdamWHyper,
) -> tuple[Tensor, Tensor]:
    """(num, den) of one tensor. With gap="loss", num is without the difference of losses."""
    eta, mu, lam, kappa = float(h.lr), h.weight_decay, h.memory_lambda, float(h.anchored)
    _, P, M = _adamw_model(g, v, t, beta_prod, h)
    e = d - g
    slope = -kappa * d if h.loss_gap else g - kappa * d
    gap = prev_lr * (slope * (d / P + mu * x)).sum()
    num = -(e * (g + lam * P * d) * M).sum() - mu * (x * e).sum()
    if eta > 0:
        num = num + (1 + mu * eta) * gap / eta
    den = (e**2 * M).sum()
    return num, den


def _adamw_update(
    x: Tensor,
    g: Tensor,
    d: Tensor,
    v: Tensor,
    t: float,
    beta_prod: float,
    beta: float,
    h: AdamWHyper,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new (x, d, v) of one tensor."""
    eta, mu, lam = float(h.lr), h.weight_decay, h.memory_lambda
    v, P, _ = _adamw_model(g, v, t, beta_prod, h)
    d = ((1 - beta) * g + (beta + lam * P) * d) / (1 + lam * P)
    x = (1 - eta * mu) * x - eta * d / P
    return x, d, v


def _sgd_sums(g: Tensor, d: Tensor, prev_lr: float, h: SGDHyper) -> tuple[Tensor, Tensor]:
    """(num, den) of one tensor; g has the weight decay in it."""
    eta, lam, kappa = float(h.lr), h.memory_lambda, float(h.anchored)
    # Not sums of g^2, g d and d^2: their differences are small where d is close to g.
    e = d - g
    num = -(e * (g + lam * d)).sum()
    if eta > 0:
        slope = -kappa * d if h.loss_gap else g - kappa * d
        num = num + (1 + lam) * (prev_lr / eta) * (slope * d).sum()
    den = (e**2).sum()
    return num, den


def _clip_beta(num: float, den: float, beta_max: float) -> float:
    if den == 0 or den == math.inf:
        return 0.0
    return min(max(num / den, 0.0), beta_max) if num == num and den == den else float("nan")


def _is_idle(t: float, eta: float, den: float) -> bool:
    """Whether step t is none: at eta = 0 and without a gradient, before any other."""
    return t == 1 and eta == 0 and den == 0


def _gradient(g: Tensor, maximize: bool) -> Tensor:
    return -g.double() if maximize else g.double()


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    check(batch)
    rows = torch.zeros(len(batch.params), 2, dtype=torch.float64, device="cpu")
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        for i in range(group.start, group.stop):
            num, den = _adamw_sums(
                batch.params[i].double(),
                _gradient(batch.grads[i], h.maximize),
                batch.exp_avgs[i].double(),
                batch.exp_avg_sqs[i].double(),
                float(batch.steps[i]) + 1,
                float(batch.beta_prods[i]),
                float(batch.prev_lrs[i]),
                h,
            )
            rows[i, 0], rows[i, 1] = num, den
    return rows.to(batch.params[0].device)


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    rows = adamw_begin(batch, None, None) if rows is None else rows
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        for i in range(group.start, group.stop):
            t = float(batch.steps[i]) + 1
            beta_prod = float(batch.beta_prods[i])
            num, den = rows[i].tolist()
            if _is_idle(t, float(h.lr), den):
                continue
            # There is no earlier iterate at t = 1.
            beta = h.beta_max if t == 1 else _clip_beta(num, den, h.beta_max)
            x, d, v = _adamw_update(
                batch.params[i].double(),
                _gradient(batch.grads[i], h.maximize),
                batch.exp_avgs[i].double(),
                batch.exp_avg_sqs[i].double(),
                t,
                beta_prod,
                beta,
                h,
            )
            batch.params[i].copy_(x)
            batch.exp_avgs[i].copy_(d)
            batch.exp_avg_sqs[i].copy_(v)
            batch.steps[i].fill_(t)
            batch.beta_prods[i].fill_(beta_prod * beta)
            batch.prev_lrs[i].fill_(float(h.lr))
            batch.betas[i].fill_(beta)


def _decayed(x: Tensor, g: Tensor, h: SGDHyper) -> Tensor:
    g = _gradient(g, h.maximize)
    # Not 0 times an x that may be infinite.
    return g + h.weight_decay * x.double() if h.weight_decay != 0 else g


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    check(batch)
    rows = torch.zeros(len(batch.params), 2, dtype=torch.float64, device="cpu")
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        for i in range(group.start, group.stop):
            d, prev_lr = batch.momentum_buffers[i].double(), float(batch.prev_lrs[i])
            if float(batch.steps[i]) == 0:
                # No memory yet: d = g, and both sums are 0. Where the step may be idle, den tells
                # whether there is a gradient, by a number that adds nothing to any other.
                if float(h.lr) == 0:
                    _, den = _sgd_sums(_gradient(batch.grads[i], h.maximize), d, prev_lr, h)
                    rows[i, 1] = 1e-300 if den != 0 else 0.0
                continue
            g = _decayed(batch.params[i], batch.grads[i], h)
            rows[i, 0], rows[i, 1] = _sgd_sums(g, d, prev_lr, h)
    return rows.to(batch.params[0].device)


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    rows = sgd_begin(batch, None, None) if rows is None else rows
    for h, group in zip(batch.hypers, group_slices(batch), strict=True):
        eta, lam = float(h.lr), h.memory_lambda
        for i in range(group.start, group.stop):
            x = batch.params[i].double()
            g = _decayed(batch.params[i], batch.grads[i], h)
            d = batch.momentum_buffers[i].double()
            num, den = rows[i].tolist()
            t = float(batch.steps[i]) + 1
            if _is_idle(t, eta, den):
                continue
            if t == 1:
                beta, d = 0.0, g
            else:
                beta = _clip_beta(num, den, h.beta_max)
                d = ((beta + lam) * d + (1 - beta) * g) / (1 + lam)
            batch.params[i].copy_(x - eta * d)
            batch.momentum_buffers[i].copy_(d)
            batch.steps[i].fill_(t)
            batch.prev_lrs[i].fill_(eta)
            batch.betas[i].fill_(beta)

"""The update of one element, and the scalars that go into it, for the Triton kernels.

Notation, as in Topollai & Choromanska (arXiv 2510.04988): g gradient, d memory (exp_avg or
momentum_buffer), v exp_avg_sq, x parameter, P Adam's denominator, M = 1 / (P (1 + lambda P)),
e = d - g, eta learning rate, mu weight decay, kappa = 1 for the "anchored" plane.

Scalars of a tensor are float64; the elements' arithmetic is in the type T of the memory.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class AdamWHyper(NamedTuple):
    """One group's line in the table of hyperparameters, in the table's order."""

    lr: tl.tensor
    beta_max: tl.tensor
    beta2: tl.tensor
    log_beta2: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    memory_lambda: tl.tensor
    anchored: tl.tensor
    loss_gap: tl.tensor
    maximize: tl.tensor
    shared: tl.tensor  # the group's tensors have one beta, with those of other such groups


class SGDHyper(NamedTuple):
    """One group's line in the table of hyperparameters, in the table's order."""

    lr: tl.tensor
    beta_max: tl.tensor
    weight_decay: tl.tensor
    memory_lambda: tl.tensor
    anchored: tl.tensor
    loss_gap: tl.tensor
    maximize: tl.tensor
    shared: tl.tensor  # the group's tensors have one beta, with those of other such groups


class AdamWModel(NamedTuple):
    """What gives the gradient, the new v and P."""

    grad_factor: tl.tensor  # -1 for maximize, over grad_scale
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    root_scale: tl.tensor  # bias_correction1 / sqrt(bias_correction2)
    eps: tl.tensor  # times bias_correction1
    memory_lambda: tl.tensor


class Gap(NamedTuple):
    """c_g - c_d and c_d over eta, times the gap's factor; zeros at eta = 0.

    The gap's c_g g - c_d d is (c_g - c_d) g - c_d e, which does not take the difference of two
    products: d may be near g, and with the "anchored" plane c_g is c_d.
    """

    grad: tl.tensor
    memory: tl.tensor


@triton.jit
def grad_factor(maximize, grad_scale):
    factor = tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    return factor


@triton.jit
def gap_factors(prev_lr, lr, scale, anchored, loss_gap, T: tl.constexpr):
    # At eta = 0, or a scheduler's rounding below, the gap term is left out; the 1 keeps 0 / 0 away.
    ratio = tl.where(lr <= 0, 0.0, scale * prev_lr / tl.where(lr <= 0, 1.0, lr))
    memory = tl.where(anchored != 0, ratio, 0.0)
    return Gap(grad=(tl.where(loss_gap != 0, 0.0, ratio) - memory).to(T), memory=memory.to(T))


@triton.jit
def adamw_model(h, step, beta_prod, grad_scale, T: tl.constexpr):
    """step: the number of steps before this one."""
    bias_correction1 = 1.0 - h.beta_max * beta_prod
    # beta2^t through its logarithm, which the host takes: Triton has no float64 power.
    bias_correction2 = 1.0 - tl.exp((step + 1.0) * h.log_beta2)
    return AdamWModel(
        grad_factor=grad_factor(h.maximize, grad_scale).to(T),
        beta2=h.beta2.to(T),
        one_minus_beta2=(1.0 - h.beta2).to(T),
        root_scale=(bias_correction1 / tl.sqrt(bias_correction2)).to(T),
        eps=(bias_correction1 * h.eps).to(T),
        memory_lambda=h.memory_lambda.to(T),
    )


@triton.jit
def clipped_beta(num, den, beta_max):
    """clip(num / den, 0, beta_max); 0 where den is 0 or has overflowed. NaN stays NaN."""
    none = (den == 0) | (den == float("inf"))
    beta = num / tl.where(none, 1.0, den)
    beta = tl.where(beta < 0, 0.0, tl.where(beta > beta_max, beta_max, beta))
    return tl.where(none, 0.0, beta)


@triton.jit
def is_idle(step, lr, den):
    """Whether a step is none: at eta = 0 and without a gradient, before any other.

    Checkpoint tools make state by such steps, so nothing of them stays. den is that of the tensor
    alone.
    """
    return (step == 0) & (lr == 0) & (den == 0)


@triton.jit
def sgd_first_den(lr, den):
    """AM-SGD's first step takes no sums. For is_idle, den tells whether there is a gradient.

    Weight decay left out, den is sum(g^2); the number that stands for it adds nothing to any other.
    """
    tiny = tl.full((), 1e-300, tl.float64)
    return tl.where((lr == 0) & (den != 0), tiny, 0.0)


@triton.jit
def _adamw_terms(g, v, c):
    """The new v, P and M. g is weighted before it is squared: g^2 may overflow."""
    v = c.beta2 * v + c.one_minus_beta2 * g * g
    P = tl.sqrt(v) * c.root_scale + c.eps
    M = 1.0 / (P * (1.0 + c.memory_lambda * P))
    return v, P, M


@triton.jit
def adamw_sums(x, g, d, v, c, gap, weight_decay):
    """One element's part of num, the gap included, and of den.

    num = (c_g g - c_d d) (d / P + mu x) - e (g + lambda P d) M - mu x e, where
    1 / P = M (1 + lambda P) and g + lambda P d = (1 + lambda P) d - e.
    """
    g = g * c.grad_factor
    _, P, M = _adamw_terms(g, v, c)
    e = d - g
    damped = d + c.memory_lambda * P * d
    slope = gap.grad * g - gap.memory * e
    num = damped * M * (slope - e) + e * M * e + (slope - e) * (weight_decay * x)
    return num, e * M * e


@triton.jit
def adamw_update(x, g, d, v, c, beta, take, lr, decay):
    """The new x, d and v. With n the new d before its division by 1 + lambda P: d / P = n M.

    take: 1 - beta, rounded once; beta may be near 1.
    """
    g = g * c.grad_factor
    v, P, M = _adamw_terms(g, v, c)
    n = take * g + (beta + c.memory_lambda * P) * d
    return decay * x - lr * (n * M), n * (M * P), v


@triton.jit
def _decayed(x, g, factor, weight_decay):
    # Not 0 times an x that may be infinite.
    return g * factor + tl.where(weight_decay != 0, weight_decay * x, 0.0)


@triton.jit
def sgd_sums(x, g, d, factor, gap, weight_decay, memory_lambda):
    """One element's part of num = (c_g g - c_d d) d - e (g + lambda d), and of den."""
    g = _decayed(x, g, factor, weight_decay)
    e = d - g
    slope = gap.grad * g - gap.memory * e
    return slope * d - e * (g + memory_lambda * d), e * e


@triton.jit
def sgd_update(x, g, d, factor, weight_decay, keep, take, lr):
    """The new x and d."""
    g = _decayed(x, g, factor, weight_decay)
    d = keep * d + take * g
    return x - lr * d, d

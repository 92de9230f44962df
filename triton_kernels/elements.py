"""The update of one element, and the scalars that go into it, for the Triton kernels.

Notation, as in Topollai & Choromanska (arXiv 2510.04988): g gradient, d memory (exp_avg or
momentum_buffer), v exp_avg_sq, x parameter, P Adam's denominator, M = 1 / (P (1 + lambda P)),
e = d - g, eta learning rate, mu weight decay, kappa = 1 for the "anchored" plane.

Scalars of a segment are float64; the elements' arithmetic is in the type T of the memory.
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


class AdamWCoefficients(NamedTuple):
    """What the element functions read: the first of the table of coefficients, in its order."""

    grad_factor: tl.tensor  # -1 for maximize, over grad_scale
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    root_scale: tl.tensor  # 1 / sqrt(bias_correction2); a segment's times its bias_correction1
    eps: tl.tensor  # a segment's times its bias_correction1
    memory_lambda: tl.tensor
    weight_decay: tl.tensor
    gap_grad: tl.tensor  # c_g - c_d and c_d, times (1 + mu eta) / eta
    gap_memory: tl.tensor
    lr: tl.tensor
    decay: tl.tensor  # 1 - eta mu
    cap_take: tl.tensor  # 1 - beta_max, rounded once
    lambda_over_cap: tl.tensor


class SGDCoefficients(NamedTuple):
    """What the element functions read: the first of the table of coefficients, in its order."""

    grad_factor: tl.tensor
    memory_lambda: tl.tensor
    weight_decay: tl.tensor
    sums_decay: tl.tensor  # weight_decay, or 0 at the first step
    gap_grad: tl.tensor  # c_g - c_d and c_d, times (1 + lambda) / eta
    gap_memory: tl.tensor
    lr: tl.tensor


@triton.jit
def _grad_factor(maximize, grad_scale):
    factor = tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    return factor


@triton.jit
def _gap_factors(prev_lr, lr, scale, anchored, loss_gap):
    """c_g - c_d and c_d, times scale / eta; zeros at eta = 0, or a scheduler's rounding below.

    So the gap's c_g g - c_d d is (c_g - c_d) g + c_d e, which does not take the difference of two
    products: d may be near g, and with the "anchored" plane c_g is c_d.
    """
    # The 1 keeps 0 / 0 away.
    ratio = tl.where(lr <= 0, 0.0, scale * prev_lr / tl.where(lr <= 0, 1.0, lr))
    # A schedule may end at 1e-51 where 0 was meant. From here on beta is at a bound, and float32
    # not yet at its end.
    ratio = tl.where(ratio > 1e30, 1e30, ratio)
    memory = tl.where(anchored != 0, ratio, 0.0)
    return tl.where(loss_gap != 0, 0.0, ratio) - memory, memory


@triton.jit
def adamw_coefficients(h, step, prev_lr, grad_scale):
    """step: the number of steps before this one. Without the segment's bias_correction1."""
    scale = 1.0 + h.weight_decay * h.lr
    gap_grad, gap_memory = _gap_factors(prev_lr, h.lr, scale, h.anchored, h.loss_gap)
    # beta2^t through its logarithm, which the host takes: Triton has no float64 power.
    bias_correction2 = 1.0 - tl.exp((step + 1.0) * h.log_beta2)
    return AdamWCoefficients(
        grad_factor=_grad_factor(h.maximize, grad_scale),
        beta2=h.beta2,
        one_minus_beta2=1.0 - h.beta2,
        root_scale=1.0 / tl.sqrt(bias_correction2),
        eps=h.eps,
        memory_lambda=h.memory_lambda,
        weight_decay=h.weight_decay,
        gap_grad=gap_grad,
        gap_memory=gap_memory,
        lr=h.lr,
        decay=1.0 - h.lr * h.weight_decay,
        cap_take=1.0 - h.beta_max,
        lambda_over_cap=h.memory_lambda / tl.where(h.beta_max > 0, h.beta_max, 1.0),
    )


@triton.jit
def adamw_corrected(c, beta_max, beta_prod):
    """The coefficients, of float64, with the bias_correction1 of segments with this beta_prod."""
    bias_correction1 = 1.0 - beta_max * beta_prod
    corrected = (c.root_scale * bias_correction1, c.eps * bias_correction1)
    return AdamWCoefficients(*(c[:3] + corrected + c[5:]))


@triton.jit
def sgd_coefficients(h, step, prev_lr, grad_scale):
    scale = 1.0 + h.memory_lambda
    gap_grad, gap_memory = _gap_factors(prev_lr, h.lr, scale, h.anchored, h.loss_gap)
    return SGDCoefficients(
        grad_factor=_grad_factor(h.maximize, grad_scale),
        memory_lambda=h.memory_lambda,
        weight_decay=h.weight_decay,
        sums_decay=tl.where(step == 0, 0.0, h.weight_decay),
        gap_grad=gap_grad,
        gap_memory=gap_memory,
        lr=h.lr,
    )


@triton.jit
def adamw_guesses(h, step, exact):
    """Whether the update is done with the cap for beta while the sums are taken.

    It is repaired where beta turns out to be another: what has come of the "level" plane for most
    tensors at most steps. What is stored has to be fit to be repaired: exact. A step that may
    be none is not begun, and a cap of 0 has nothing to repair, nor to guess from.
    """
    may_be_none = (step == 0) & (h.lr == 0)
    return (exact != 0) & (h.anchored == 0) & (h.beta_max > 0) & (may_be_none == 0)


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

    Checkpoint tools make state by such steps, so nothing of them stays. den is that of the segment
    alone; the step of a tensor of many counts where that of one does.
    """
    return tl.where((step == 0) & (lr == 0), den, 1.0) == 0


@triton.jit
def sgd_first_den(lr, den):
    """AM-SGD's first step takes no sums. For is_idle, den tells whether there is a gradient.

    Weight decay left out, den is sum(g^2); the number that stands for it adds nothing to any other.
    """
    tiny = tl.full((), 1e-300, tl.float64)
    return tl.where(lr == 0, tl.where(den != 0, tiny, 0.0), 0.0)


# The element functions, as in csrc/am_math.h, which says more. Multiply-adds are written out, so
# that no compiler has a choice to make: all kernels give the same bits.


@triton.jit
def adamw_root(g, v, c):
    """The new v, and its square root. g is weighted before it is squared: g^2 may overflow."""
    g = g * c.grad_factor
    v = tl.fma(g * c.one_minus_beta2, g, v * c.beta2)
    return v, tl.sqrt(v)


class AdamWTerms(NamedTuple):
    """What the sums and the update of an element take of it: P, e, e M and (1 + lambda P) d M."""

    p: tl.tensor
    e: tl.tensor
    weighted: tl.tensor
    slope: tl.tensor


@triton.jit
def adamw_terms(g, d, root, c):
    """g: with grad_factor."""
    P = tl.fma(root, c.root_scale, c.eps)
    damping = tl.fma(P, c.memory_lambda, 1.0)
    M = 1.0 / (P * damping)
    e = g - d
    return AdamWTerms(P, e, e * M, d * damping * M)


@triton.jit
def adamw_add(x, g, terms, num, den, c, DECAY: tl.constexpr):
    """num, the gap included, and den with an element's parts added. g: with grad_factor.

    With D = (1 + lambda P) d, e = g - d and u = c_g g - c_d d + e, num is u (M D + mu x) + e^2 M.
    """
    u = tl.fma(g, c.gap_grad, tl.fma(terms.e, c.gap_memory, terms.e))
    e2 = terms.weighted * terms.e
    slope = terms.slope
    if DECAY:
        slope = tl.fma(x, c.weight_decay, slope)
    return tl.fma(u, slope, num + e2), den + e2


@triton.jit
def adamw_move(x, terms, take, c):
    """The new x and d. With n the new d before its division by 1 + lambda P: d / P = n M.

    take: 1 - beta, rounded once; beta may be near 1.
    """
    step = tl.fma(terms.weighted, take, terms.slope)
    return tl.fma(step, -c.lr, x * c.decay), step * terms.p


@triton.jit
def adamw_sums(x, g, d, root, num, den, c, DECAY: tl.constexpr):
    g = g * c.grad_factor
    return adamw_add(x, g, adamw_terms(g, d, root, c), num, den, c, DECAY)


@triton.jit
def adamw_update(x, g, d, root, take, c):
    """The new x and d."""
    return adamw_move(x, adamw_terms(g * c.grad_factor, d, root, c), take, c)


@triton.jit
def adamw_repair(x, g, d, root, miss, c):
    """From the x and d of a step with the cap those of a step with beta.

    r = (cap - beta) / (cap + lambda P)     d + r (g - d)     x - eta r (g - d) / P
    root: of the new v. miss: (cap - beta) / cap.
    """
    g = g * c.grad_factor
    P = tl.fma(root, c.root_scale, c.eps)
    step = miss / (P * tl.fma(P, c.lambda_over_cap, 1.0)) * (g - d)
    return tl.fma(step, -c.lr, x), tl.fma(step, P, d)


@triton.jit
def sgd_sums(x, g, d, num, den, c, DECAY: tl.constexpr):
    """num = (c_g g - c_d d) d + e (g + lambda d) and den with an element's parts added.

    e is g - (d - mu x): where mu x is larger than the gradient, g + mu x would lose the digits
    that are left in the difference.
    """
    g = g * c.grad_factor
    if DECAY:
        # Not 0 times an x that may be infinite.
        e = g - tl.where(c.sums_decay != 0, tl.fma(x, -c.sums_decay, d), d)
        g = tl.where(c.sums_decay != 0, tl.fma(x, c.sums_decay, g), g)
    else:
        e = g - d
    slope = tl.fma(g, c.gap_grad, e * c.gap_memory)
    num = tl.fma(slope, d, num)
    return tl.fma(e, tl.fma(d, c.memory_lambda, g), num), tl.fma(e, e, den)


@triton.jit
def sgd_update(x, g, d, keep, take, c):
    """The new x and d."""
    g = g * c.grad_factor
    g = tl.where(c.weight_decay != 0, tl.fma(x, c.weight_decay, g), g)
    d = tl.fma(g, take, d * keep)
    return tl.fma(d, -c.lr, x), d

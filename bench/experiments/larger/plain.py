"""AM-AdamW in plain PyTorch, for what the package does not have: other segments, other betas.

The letters are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SHORTEST_ROW = 16  # as in the package: shorter rows share the tensor's beta


@dataclass(frozen=True)
class Segments:
    """How a tensor is cut into parts that have one beta each.

    Attributes:
        sums: of a tensor's elements, by segment, [segments].
        spread: of a number a segment, to what broadcasts against the tensor.
    """

    sums: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]


def whole(_: Tensor) -> Segments:
    return Segments(lambda x: x.sum().view(1), lambda b: b.squeeze())


def rows(param: Tensor) -> Segments:
    if param.dim() < 2 or param[0].numel() < SHORTEST_ROW:
        return whole(param)
    return Segments(lambda x: x.flatten(1).sum(1), lambda b: b.view(-1, *[1] * (param.dim() - 1)))


def columns(param: Tensor) -> Segments:
    """Of a matrix, one for each index of its second dimension."""
    if param.dim() != 2:
        return whole(param)
    return Segments(lambda x: x.sum(0), lambda b: b.view(1, -1))


@dataclass(frozen=True)
class Blocks:
    """So many elements in a row each, of tensors that they divide."""

    size: int

    def __call__(self, param: Tensor) -> Segments:
        if param.dim() < 2 or param.numel() % self.size:
            return whole(param)
        return Segments(
            lambda x: x.reshape(-1, self.size).sum(1),
            lambda b: b.repeat_interleave(self.size).view(param.shape),
        )


@dataclass(frozen=True)
class Moment:
    """What a rule may choose a step's beta by.

    Attributes:
        tensor: the tensor's place among the optimizer's parameters.
        progress: the share of the steps that are done, in [0, 1).
        exact: this step's beta by the closed form, [segments].
        last: the last step's, by the closed form; None at the first step.
        silent: whether the segment's gradient is zero everywhere, [segments].
        size: mean of the squares of the gradient's elements as AdamW scales them, by the root of
            their own mean square over the last steps: about 1 of a gradient of the usual size,
            [segments].
        cap: the largest beta.
    """

    tensor: int
    progress: float
    exact: Tensor
    last: Tensor | None
    silent: Tensor
    size: Tensor
    cap: float


Rule = Callable[[Moment], Tensor]


def exact(moment: Moment) -> Tensor:
    """Adaptive Memory itself."""
    return moment.exact


def at_cap(moment: Moment) -> Tensor:
    """No adaptation: beta stands at the cap."""
    return torch.full_like(moment.exact, moment.cap)


def last_step(moment: Moment) -> Tensor:
    """The closed form's beta, a step late."""
    return at_cap(moment) if moment.last is None else moment.last


def cap_when_silent(moment: Moment) -> Tensor:
    """Adaptive Memory, and AdamW where a segment has no gradient: it keeps its memory there."""
    return torch.where(moment.silent, moment.cap, moment.exact)


def _gate(moment: Moment, size: Tensor) -> Tensor:
    if moment.exact.numel() == 1:
        return moment.exact
    return moment.cap - (moment.cap - moment.exact) * size.clamp(max=1.0)


def gated(moment: Moment) -> Tensor:
    """Adaptive Memory, in rows as far as their gradient is as large as it usually is.

    A small one says little: beta stays near the cap then, and what is remembered is kept. A tensor
    with one beta has adaptive memory as it is.
    """
    return _gate(moment, moment.size)


def gated_by_tensor(moment: Moment) -> Tensor:
    """As `gated`, as far as a row's gradient is as large as usual beside the tensor's others.

    Where all gradients have fallen at once, as after a start without warm-up, the gate is open.
    """
    # A tensor without a gradient has none to be measured by.
    mean = moment.size.mean().clamp(min=torch.finfo(moment.size.dtype).tiny)
    return _gate(moment, moment.size / mean)


class Drawn:
    """Adaptive Memory's betas at other times, and for other rows: drawn as often as it has them.

    Args:
        quantiles: of the betas of an adaptive run, [parts of the run, tensors, quantiles evenly
            spread from 0 to 1].
        seed: of the draws.
    """

    def __init__(self, quantiles: Tensor, seed: int) -> None:
        self.quantiles = quantiles
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, moment: Moment) -> Tensor:
        part = int(moment.progress * len(self.quantiles))
        table = self.quantiles[part, moment.tensor]
        place = torch.rand(moment.exact.shape, generator=self.generator) * (len(table) - 1)
        below = place.long()
        return torch.lerp(table[below], table[below + 1], place - below)


class PlainAMAdamW(Optimizer):
    """AM-AdamW, "level", with any segments and any rule for beta.

    `segments` and `rule` are options of each group. `steps`, the length of the run, is what
    `Moment.progress` is a share of.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        segments: Callable[[Tensor], Segments] = whole,
        rule: Rule = exact,
        betas: tuple[float, float] = (0.89, 0.999),
        memory_lambda: float = 0.1,
        eps: float = 1e-8,
        steps: int = 1,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "memory_lambda": memory_lambda, "eps": eps}
        super().__init__(params, defaults | {"segments": segments, "rule": rule})
        self.steps = steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        tensor = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, tensor, group)
                tensor += 1

    def _update(self, x: Tensor, g: Tensor, tensor: int, group: dict[str, Any]) -> None:
        state = self.state[x]
        eta, mu, lam, eps = (group[k] for k in ("lr", "weight_decay", "memory_lambda", "eps"))
        cap, beta2 = group["betas"]
        cut = group["segments"](x)
        if not state:
            ones = torch.ones_like(cut.sums(x))
            state.update(
                step=0, exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x),
                beta_prod=ones, prev_lr=0.0, exact=None,
            )  # fmt: skip
        state["step"] += 1
        t, d, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        bias = 1 - cap * cut.spread(state["beta_prod"])
        scale = (v / (1 - beta2**t)).sqrt_() + eps
        P = bias * scale
        M = 1 / (P * (1 + lam * P))
        e = d - g
        if t == 1:
            beta = torch.full_like(state["beta_prod"], cap)
        else:
            gap = state["prev_lr"] * cut.sums(g * (d / P + mu * x))
            num = (1 + mu * eta) * gap / eta - cut.sums(e * (g + lam * P * d) * M + mu * x * e)
            den = cut.sums(e * e * M)
            beta = torch.where(den == 0, 0.0, (num / den).clamp(0.0, cap))
        silent = cut.sums(g * g) == 0
        size = cut.sums((g / scale).square_()) / cut.sums(torch.ones_like(g))
        moment = Moment(tensor, (t - 1) / self.steps, beta, state["exact"], silent, size, cap)
        used = group["rule"](moment)
        state["exact"], state["beta"] = beta, used
        b = cut.spread(used)
        d.copy_(((1 - b) * g + (b + lam * P) * d) / (1 + lam * P))
        x.mul_(1 - eta * mu).sub_(eta * d / P)
        state["beta_prod"] *= used
        state["prev_lr"] = eta

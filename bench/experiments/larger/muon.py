"""Muon, and Muon whose momentum is Adaptive Memory's.

The orthogonalisation is in float32: torch.optim.Muon's is in bfloat16, which takes a CPU without
instructions for it twenty times as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic iteration, torch's defaults
ITERATIONS = 5
EPS = 1e-7


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix with its singular values near 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


class Muon(Optimizer):
    """torch.optim.Muon with Nesterov's form and `adjust_lr_fn="match_rms_adamw"`, in float32.

    With `adaptive`, the momentum of each row of a matrix is AM-SGD's ("level", memory_lambda 0.1),
    with `momentum` as its cap.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        adaptive: bool = False,
        memory_lambda: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        self.adaptive = adaptive
        self.memory_lambda = memory_lambda

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._update(x, x.grad, group)

    def _update(self, x: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        lr, state = group["lr"], self.state[x]
        if not state:
            # AM-SGD's memory begins with the first gradient, Muon's with zero.
            first = g.clone() if self.adaptive else torch.zeros_like(g)
            state.update(momentum_buffer=first, prev_lr=0.0)
        d = state["momentum_buffer"]
        if self.adaptive:
            beta = self._beta(d, g, state["prev_lr"] / lr)
            state["beta"] = beta.squeeze(1)
            lam = self.memory_lambda
            d.copy_(((beta + lam) * d + (1 - beta) * g) / (1 + lam))
        else:
            beta = torch.tensor(self.momentum)
            d.lerp_(g, 1 - self.momentum)
        state["prev_lr"] = lr
        update = orthogonalised(torch.lerp(g, d, beta))
        x.mul_(1 - lr * group["weight_decay"])
        x.sub_(update, alpha=0.2 * max(x.shape) ** 0.5 * lr)

    def _beta(self, d: Tensor, g: Tensor, ratio: float) -> Tensor:
        """AM-SGD's beta of each row, [rows, 1]; `ratio` is the last learning rate to this one."""
        lam, e = self.memory_lambda, d - g
        num = ((1 + lam) * ratio * g * d - e * (g + lam * d)).sum(1, keepdim=True)
        den = (e * e).sum(1, keepdim=True)
        return torch.where(den == 0, 0.0, (num / den).clamp(0.0, self.momentum))

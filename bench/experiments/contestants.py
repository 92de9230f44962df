"""The optimizers that are compared, and how each is made.

SGD's buffer is a sum of gradients where AMSGD's is an average: SGD gets 1 - momentum of the
grid's learning rate, so that the same point of the grid means the same size of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lion_pytorch import Lion
from schedulefree import AdamWScheduleFree
from torch.optim import Optimizer

from adamem_fused import AMSGD, AMAdamW

BETA2 = 0.999
SGD_MOMENTA = (0.0, 0.6, 0.9, 0.95)
ADAMW_BETAS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95)
PLANES = ("level", "anchored")
LAMBDAS = (0.0, 0.1, 1.0)
HIGH_CAP = 0.95


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its options.

    Attributes:
        name: as the results have it.
        family: "sgd" or "adam": which of a task's grids of learning rates it gets.
        make: the optimizer, from parameter groups and a learning rate.
        lr_scale: what the grid's learning rate is multiplied by.
    """

    name: str
    family: str
    make: Callable[..., Optimizer]
    lr_scale: float = 1.0


def am_adamw(plane: str, scope: str, memory_lambda: float, cap: float | None = None) -> Contestant:
    """AM-AdamW with the paper's cap for that lambda, 0.9 - 0.1 lambda, or with another."""
    name = f"AM-AdamW {plane} {scope} lambda {memory_lambda:g}"
    make = partial(
        AMAdamW,
        betas=(0.9 - 0.1 * memory_lambda if cap is None else cap, BETA2),
        memory_lambda=memory_lambda,
        memory_plane=plane,
        beta_scope=scope,
        fused=True,
    )
    return Contestant(name if cap is None else f"{name} cap {cap:g}", "adam", make)


def am_sgd(plane: str, scope: str) -> Contestant:
    make = partial(AMSGD, memory_plane=plane, beta_scope=scope, fused=True)
    return Contestant(f"AM-SGD {plane} {scope}", "sgd", make)


def sgd(momentum: float) -> Contestant:
    make = partial(torch.optim.SGD, momentum=momentum, fused=True)
    return Contestant(f"SGD {momentum:g}", "sgd", make, lr_scale=1.0 - momentum)


def adamw(beta1: float) -> Contestant:
    make = partial(torch.optim.AdamW, betas=(beta1, BETA2), fused=True)
    return Contestant(f"AdamW {beta1:g}", "adam", make)


def _contestants() -> list[Contestant]:
    return [
        *map(sgd, SGD_MOMENTA),
        *(am_sgd(plane, scope) for plane in PLANES for scope in ("global", "tensor")),
        *map(adamw, ADAMW_BETAS),
        *(
            am_adamw(plane, scope, memory_lambda)
            for plane in PLANES
            for scope in ("tensor", "global")
            for memory_lambda in LAMBDAS
        ),
        *(am_adamw(plane, "tensor", 0.1, cap=HIGH_CAP) for plane in PLANES),
        Contestant("schedule-free AdamW", "adam", partial(AdamWScheduleFree, betas=(0.9, BETA2))),
        Contestant("Lion", "adam", Lion),
    ]


CONTESTANTS = {contestant.name: contestant for contestant in _contestants()}
# In a grid of their own.
BY_ROW = {
    contestant.name: contestant
    for plane in PLANES
    for contestant in (am_adamw(plane, "row", 0.1), am_sgd(plane, "row"))
}

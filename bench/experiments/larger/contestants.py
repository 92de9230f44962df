"""The optimizers of the larger tasks, and how each is made.

All get the same weight decay, and the same clipping by the global norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamem_fused import AMAdamW, param_groups
from bench.experiments.larger import plain
from bench.experiments.larger.muon import Muon
from bench.experiments.larger.plain import Drawn, PlainAMAdamW, Rule, Segments, exact

BETA2 = 0.999
CAP = 0.89  # the paper's for its memory_lambda of 0.1
HIGH_CAP = 0.95
MEMORY_LAMBDA = 0.1


@dataclass(frozen=True)
class Setting:
    """What a run's optimizer is made of.

    Attributes:
        model: what it trains.
        inner: how the names of the layers begin whose matrices Muon takes.
        lr, weight_decay: the run's.
        steps: its length.
        seed: its seed.
        quantiles: of the betas of the contestant's `drawn_from`.
    """

    model: nn.Module
    inner: str
    lr: float
    weight_decay: float
    steps: int
    seed: int
    quantiles: Tensor | None = None

    def groups(self) -> list[dict[str, Any]]:
        return param_groups(self.model, self.weight_decay)

    def groups_of_layers_and_rest(
        self, layers: dict[str, Any], rest: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The layers' groups and those of embeddings, positions and head, with these options."""
        named: tuple[list[tuple[str, nn.Parameter]], ...] = [], []
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                named[not name.startswith(self.inner)].append((name, param))
        return [
            group | options
            for params, options in zip(named, (layers, rest), strict=True)
            if params
            for group in param_groups(params, self.weight_decay)
        ]


Optimizers: TypeAlias = list[Optimizer]


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its options.

    Attributes:
        name: as the results have it.
        make: its optimizers, which share the model's parameters out between them.
        start: octaves above the task's learning rate at which the search starts.
        drawn_from: the contestant whose distribution of betas it draws from.
    """

    name: str
    make: Callable[[Setting], Optimizers]
    start: int = 0
    drawn_from: str | None = None


def _adamw(betas: tuple[float, float], setting: Setting) -> Optimizers:
    return [torch.optim.AdamW(setting.groups(), lr=setting.lr, betas=betas, fused=True)]


def adamw(beta1: float, beta2: float = BETA2) -> Contestant:
    name = f"AdamW {beta1:g}" + ("" if beta2 == BETA2 else f", {beta2:g}")
    return Contestant(name, partial(_adamw, (beta1, beta2)))


def _am_adamw(
    options: dict[str, Any], embeddings: dict[str, Any] | None, setting: Setting
) -> Optimizers:
    modules = None if embeddings is None else {nn.Embedding: embeddings}
    groups = param_groups(setting.model, setting.weight_decay, modules=modules)
    return [AMAdamW(groups, lr=setting.lr, fused=True, **options)]


def am_adamw(
    plane: str,
    scope: str,
    *,
    cap: float = CAP,
    beta2: float = BETA2,
    embeddings: str | None = None,
) -> Contestant:
    name = f"AM-AdamW {plane} {scope}"
    name += "" if cap == CAP else f", cap {cap:g}"
    name += "" if beta2 == BETA2 else f", beta2 {beta2:g}"
    name += "" if embeddings is None else f", embeddings {embeddings}"
    options = {
        "betas": (cap, beta2),
        "memory_lambda": MEMORY_LAMBDA,
        "memory_plane": plane,
        "beta_scope": scope,
    }
    of_embeddings = None if embeddings is None else {"beta_scope": embeddings}
    make = partial(_am_adamw, options, of_embeddings)
    return Contestant(name, make, start=1 if scope == "row" else 0)


def _row_in_layers(options: dict[str, Any], setting: Setting) -> Optimizers:
    groups = setting.groups_of_layers_and_rest({"beta_scope": "row"}, {"beta_scope": "tensor"})
    return [AMAdamW(groups, lr=setting.lr, fused=True, **options)]


def row_in_layers(
    plane: str = "level",
    cap: float = HIGH_CAP,
    memory_lambda: float = MEMORY_LAMBDA,
    beta2: float = BETA2,
) -> Contestant:
    """One beta a row in the layers' matrices, one a tensor in embeddings and head."""
    name = f"AM-AdamW {plane} row, layers only" + ("" if cap == CAP else f", cap {cap:g}")
    name += "" if memory_lambda == MEMORY_LAMBDA else f", lambda {memory_lambda:g}"
    name += "" if beta2 == BETA2 else f", beta2 {beta2:g}"
    options = {
        "betas": (cap, beta2),
        "memory_lambda": memory_lambda,
        "memory_plane": plane,
    }
    return Contestant(name, partial(_row_in_layers, options), start=1)


def _rule(rule: Rule | None, setting: Setting) -> Rule:
    """None: drawn."""
    if rule is not None:
        return rule
    assert setting.quantiles is not None
    return Drawn(setting.quantiles, setting.seed)


def _plain(
    segments: Callable[[Tensor], Segments],
    rule: Rule | None,
    setting: Setting,
    betas: tuple[float, float] = (CAP, BETA2),
) -> Optimizers:
    used = _rule(rule, setting)
    return [PlainAMAdamW(setting.groups(), setting.lr, segments, used, betas, steps=setting.steps)]


def _plain_in_layers(
    segments: Callable[[Tensor], Segments],
    rule: Rule | None,
    setting: Setting,
    rest: Rule | None = None,
) -> Optimizers:
    """With the rule for the rest, too, where it has none of its own."""
    of_rest = {} if rest is None else {"rule": rest}
    groups = setting.groups_of_layers_and_rest({"segments": segments}, of_rest)
    used, betas = _rule(rule, setting), (HIGH_CAP, BETA2)
    return [PlainAMAdamW(groups, setting.lr, plain.whole, used, betas, steps=setting.steps)]


def gated_rows(beta2: float = BETA2) -> Contestant:
    """One beta a row in every matrix, whose adaptation is gated."""
    name = f"AM-AdamW level row, gated, cap {HIGH_CAP:g}"
    name += "" if beta2 == BETA2 else f", beta2 {beta2:g}"
    make = partial(_plain, plain.rows, plain.gated, betas=(HIGH_CAP, beta2))
    return Contestant(name, make, start=1)


def cut(name: str, segments: Callable[[Tensor], Segments]) -> Contestant:
    full = f"AM-AdamW level {name}, layers only, cap {HIGH_CAP:g}"
    return Contestant(full, partial(_plain_in_layers, segments, exact), start=1)


def _muon(adaptive: bool, rest: Contestant, setting: Setting) -> Optimizers:
    inner = {
        name: param
        for name, param in setting.model.named_parameters()
        if name.startswith(setting.inner) and param.dim() == 2
    }
    muon = Muon(inner.values(), setting.lr, setting.weight_decay, adaptive=adaptive)
    (others,) = rest.make(setting)
    taken = set(inner.values())
    for group in others.param_groups:
        group["params"] = [param for param in group["params"] if param not in taken]
    return [muon, others]


def muon(name: str, adaptive: bool, rest: Contestant) -> Contestant:
    return Contestant(f"{name} + {rest.name}", partial(_muon, adaptive, rest), start=1)


LEVEL_TENSOR = am_adamw("level", "tensor")
LEVEL_ROW = am_adamw("level", "row")
LAYERS = row_in_layers()
ADAMW = adamw(0.9)

# Adaptive Memory's step with betas that are not adapted to it.
ABLATIONS = [
    Contestant("beta at the cap", partial(_plain, plain.whole, plain.at_cap)),
    *(
        contestant
        for full, segments in ((LEVEL_TENSOR, plain.whole), (LEVEL_ROW, plain.rows))
        for scope in (full.name.rsplit(" ", 1)[1],)
        for contestant in (
            Contestant(
                f"beta drawn, {scope}",
                partial(_plain, segments, None),
                full.start,
                drawn_from=full.name,
            ),
            Contestant(
                f"beta of the last step, {scope}",
                partial(_plain, segments, plain.last_step),
                full.start,
            ),
        )
    ),
]
# The same of LAYERS.
ABLATIONS_OF_LAYERS = [
    Contestant(
        f"beta at the cap of {HIGH_CAP:g}", partial(_plain_in_layers, plain.whole, plain.at_cap)
    ),
    Contestant(
        "beta drawn, layers only",
        partial(_plain_in_layers, plain.rows, None),
        start=1,
        drawn_from=LAYERS.name,
    ),
    Contestant(
        "beta of the last step, layers only",
        partial(_plain_in_layers, plain.rows, plain.last_step),
        start=1,
    ),
]
FIXED = [adamw(0.6), adamw(0.8), ADAMW, adamw(0.95), adamw(0.9, 0.95), adamw(0.8, 0.95)]
ADAPTIVE = [am_adamw(p, s) for p in ("level", "anchored") for s in ("tensor", "global", "row")]
OPTIONS = [
    am_adamw("level", "tensor", cap=HIGH_CAP),
    am_adamw("level", "row", cap=HIGH_CAP),
    am_adamw("anchored", "row", cap=HIGH_CAP),
    am_adamw("level", "tensor", beta2=0.95),
    am_adamw("level", "row", embeddings="tensor"),
]
AROUND = [
    row_in_layers(cap=CAP),
    LAYERS,
    row_in_layers(cap=0.98),
    row_in_layers("anchored"),
    row_in_layers(memory_lambda=0.0),
    row_in_layers(memory_lambda=1.0),
    row_in_layers(beta2=0.95),
]
# LAYERS with what had done better than its betas on gpt-400k.
TUNED = [
    row_in_layers(beta2=0.95),
    row_in_layers(cap=0.98),
    row_in_layers(cap=0.98, beta2=0.95),
]
REST_FIXED = Contestant(
    f"{LAYERS.name}, rest at the cap",
    partial(_plain_in_layers, plain.rows, exact, rest=plain.at_cap),
    start=1,
)
GATED = gated_rows()
GATED_BY_TENSOR = Contestant(
    f"AM-AdamW level row, gated by the tensor, cap {HIGH_CAP:g}",
    partial(_plain, plain.rows, plain.gated_by_tensor, betas=(HIGH_CAP, BETA2)),
    start=1,
)
GATES = [GATED, GATED_BY_TENSOR, gated_rows(beta2=0.95)]
CUTS = [
    cut("columns", plain.columns),
    cut("blocks of 32", plain.Blocks(32)),
    cut("blocks of 128", plain.Blocks(128)),
]
SILENT = [
    Contestant(
        "AM-AdamW level row, cap without gradient",
        partial(_plain, plain.rows, plain.cap_when_silent),
        start=1,
    )
]
MUON = [
    muon("Muon", False, ADAMW),
    muon("Muon", False, LEVEL_ROW),
    muon("AM-Muon row", True, LEVEL_ROW),
]
# In plain PyTorch: what their steps take says nothing of a fused one.
PLAIN = (*ABLATIONS, *ABLATIONS_OF_LAYERS, REST_FIXED, *GATES, *CUTS, *SILENT, *MUON)
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        *FIXED,
        *ADAPTIVE,
        *OPTIONS,
        *AROUND,
        *TUNED,
        *ABLATIONS,
        *ABLATIONS_OF_LAYERS,
        REST_FIXED,
        *GATES,
        *CUTS,
        *SILENT,
        *MUON,
    )
}

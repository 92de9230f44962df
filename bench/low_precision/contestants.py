"""Optimizers and what they store: each optimizer with each of the formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor
from torch.optim import Optimizer

from adamem_fused import AMAdamW, storage
from bench.low_precision.adamw import AdamW, nearest_bfloat16

OPTIMIZERS = ("AdamW", "AMAdamW", "AMAdamW, row")
BASELINE = "float32"


@dataclass(frozen=True)
class Format:
    """What is stored how.

    Attributes:
        params: dtype of parameters and gradients.
        options: of a parameter group of AMAdamW, and of this folder's AdamW.
        nearest: memories are in bfloat16 and rounded to nearest, which is no option.
    """

    params: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    nearest: bool = False

    @property
    def guesses(self) -> bool:
        """Whether a step with one beta a tensor may guess it: `Packed.may_guess`."""
        rounds = self.options.keys() & {"stochastic_rounding", "store_param_remainders"}
        return self.params == torch.float32 or bool(rounds)


_BFLOAT16, _INT8 = {"state_dtype": torch.bfloat16}, {"state_dtype": "int8"}
_ROUNDED, _WHOLE = {"stochastic_rounding": True}, {"store_param_remainders": True}
FORMATS = {
    BASELINE: Format(),
    "bfloat16 state": Format(options=_BFLOAT16),
    "bfloat16 state, to nearest": Format(nearest=True),
    "int8 state": Format(options=_INT8),
    "bfloat16 parameters, to nearest": Format(torch.bfloat16),
    "bfloat16 parameters": Format(torch.bfloat16, _ROUNDED),
    "bfloat16 parameters, remainders": Format(torch.bfloat16, _WHOLE),
    "bfloat16 parameters and state": Format(torch.bfloat16, {**_ROUNDED, **_BFLOAT16}),
    "bfloat16 parameters, remainders, int8 state": Format(torch.bfloat16, {**_WHOLE, **_INT8}),
}
# Formats of the memories, for parameters in float32.
STATES = [name for name, how in FORMATS.items() if how.params == torch.float32]

# Of the backend that AMAdamW is to take.
BACKEND: dict[str, Any] = {"fused": True}


def new_optimizer(
    optimizer: str, stored: str, params: Iterable[Any], lr: float, seed: int
) -> Optimizer:
    """An optimizer with a format, for parameters of its dtype.

    seed: of stochastic rounding.
    """
    how = FORMATS[stored]
    if optimizer == "AdamW":
        if stored == BASELINE:
            return torch.optim.AdamW(params, lr=lr, fused=True)
        made: Optimizer = AdamW(params, lr, seed=seed, **how.options)
    else:
        scope = "row" if optimizer.endswith("row") else "tensor"
        options = {**BACKEND, **how.options}
        made = AMAdamW(params, lr=lr, beta_scope=scope, seed=seed, **options)
    return nearest_bfloat16(made) if how.nearest else made


def low_share(shapes: Sequence[Sequence[int]]) -> float:
    """Of the elements of such tensors, those whose memories may be int8."""
    group = {"state_dtype": "int8", "stochastic_rounding": False, "store_param_remainders": False}
    low = sum(
        math.prod(shape)
        for shape in shapes
        if storage.storage_of(_meta(shape), group).memory is not None
    )
    return low / sum(map(math.prod, shapes))


def _meta(shape: Sequence[int]) -> Tensor:
    return torch.empty(Size(shape), device="meta")

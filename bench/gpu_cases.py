"""The parameter lists of the GPU check, and what was aimed at and predicted for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.kernels.parameter_lists import MODELS, Shape, llama_shapes
from bench.kernels.traffic import segments


def llama2_7b(layers: int) -> tuple[Shape, ...]:
    """Llama-2-7B's parameters, of so many layers: 9 each, and 3."""
    return llama_shapes(width=4096, hidden=11008, layers=layers, vocabulary=32000, key_width=4096)


# What both backends aim at, by list and regime (bench/gpu_check/times.py): step time over torch's
# fused AdamW's, float32. A mixture of one tensor is made of eight. By row: on either plane.
TARGETS: dict[str, dict[str, float]] = {
    "2^28": {"cap": 1.05},
    "8x2^25": {"mixture": 1.15},
    "gpt2-small": {"cap": 1.05, "row": 1.05, "clip": 0.85},
    "resnet-50": {"cap": 1.05, "row": 1.05},
    "llama-2-7b": {"cap": 1.05, "mixture": 1.15, "row": 1.05},
    "5000x1000": {"cap": 0.3},
    "32x524288": {},
}
# What a list's step in few bits is to take at most: a fifth of what another Triton AdamW with
# stochastic rounding, one launch a tensor, takes on an H200.
TARGET_SECONDS = {"32x524288": 1.3e-3 / 5}
# The share of the elements whose beta is below its cap.
MISSED = {"cap": 0.0, "mixture": 0.12, "below": 1.0, "row": 0.0, "clip": 0.0}


@dataclass(frozen=True)
class Format:
    """What parameters, gradients and state are stored in."""

    name: str
    dtype: torch.dtype  # of parameters and gradients
    memory: float = 4.0  # bytes of an element of a memory
    options: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None  # step time over torch's fused AdamW's, float32, where it is low

    @property
    def is_low(self) -> bool:
        """Something is stored in few bits. torch's side is float32 then."""
        return bool(self.options)

    @property
    def guesses(self) -> bool:
        """AM-AdamW takes a step with the cap, where each tensor has a beta, and repairs it."""
        return self.dtype == torch.float32 or bool(self.options.get("stochastic_rounding"))


FLOAT32 = Format("float32", torch.float32)
BFLOAT16 = Format("bfloat16", torch.bfloat16)
ALL_BFLOAT16 = Format(
    "bfloat16 and state",
    torch.bfloat16,
    memory=2.0,
    options={"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    target=0.80,
)
INT8_STATE = Format("float32, int8 state", torch.float32, 1 + 4 / 256, {"state_dtype": "int8"})
BFLOAT16_INT8 = Format(
    "bfloat16, int8 state",
    torch.bfloat16,
    memory=1 + 4 / 256,
    options={"state_dtype": "int8", "stochastic_rounding": True},
)


@dataclass(frozen=True)
class Case:
    """A parameter list, and the ratio of step times that is aimed at in each regime."""

    name: str
    shapes: tuple[Shape, ...]
    targets: Mapping[str, float]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


# Of a float32 parameter, in a benchmark: itself, its gradient, and the state of two optimizers.
RESIDENT_BYTES = 4 * (2 + 2 + 2)


def llama_that_fits(free_bytes: int) -> tuple[Shape, ...]:
    """As many of Llama-2-7B's layers as fit four fifths of the free memory, one at least."""
    numel = 0.8 * free_bytes / RESIDENT_BYTES
    none, one = (sum(map(math.prod, llama2_7b(layers))) for layers in (0, 1))
    return llama2_7b(max(1, min(32, int((numel - none) / (one - none)))))


def cases(free_bytes: int) -> dict[str, Case]:
    """The cases by list, for a device with so much free memory."""
    llama = llama_that_fits(free_bytes)
    labels = {"llama-2-7b": f"llama-2-7b, {(len(llama) - 3) // 9} layers"}
    shapes: dict[str, tuple[Shape, ...]] = {
        "2^28": ((2**15, 2**13),),
        "8x2^25": ((2**12, 2**13),) * 8,
        "gpt2-small": MODELS["gpt2-small"][0],
        "resnet-50": MODELS["resnet-50"][0],
        "llama-2-7b": llama,
        "5000x1000": ((20, 50),) * 5000,
        "32x524288": ((512, 1024),) * 32,
    }
    return {
        name: Case(labels.get(name, name), shapes[name], targets)
        for name, targets in TARGETS.items()
    }


# Of L2, what an update finds there of what the sums have read.
KEPT_SHARE_OF_L2 = 0.6
# A tensor of one chunk is updated at once, from L2.
CHUNK = 8192
# A row of at most so many elements is held on chip, on an H100.
LONGEST_ROW = {"cuda": 14336, "triton": 8192}


def predicted_bytes(
    optimizer: str,
    shapes: tuple[Shape, ...],
    format: Format,
    l2_bytes: int,
    missed: float,
    longest_row: int | None = None,
) -> float:
    """Bytes an element that a step moves from and to memory.

    Everything is read and written once. What begin has left to do is read again: where AM-AdamW
    guesses, what it has guessed wrong, of which parameter and memory are written again too;
    elsewhere what the sums have read, parameters too with AM-AdamW, which has weight decay here, as
    AM-SGD has none. But for what L2 keeps, and for AM-AdamW's tensors of one chunk and rows that
    are held on chip, which are finished at once (AM-SGD's share one beta).
    """
    numel = sum(map(math.prod, shapes))
    element, memory = format.dtype.itemsize, format.memory
    if optimizer == "AMSGD":
        once, again, left = 3 * element + 2 * memory, float(element + memory), numel
    else:
        once, again = 3 * element + 4 * memory, 2.0 * (element + memory)
        found = segments(shapes, by_row=longest_row is not None)
        held = longest_row or CHUNK
        left = sum(n * max(rows, 1) for n, rows in found if n > (held if rows else CHUNK))
        if format.guesses:
            again = missed * 3 * (element + memory)
    second = max(0.0, again * left - KEPT_SHARE_OF_L2 * l2_bytes)
    return once + second / numel

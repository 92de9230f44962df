"""The parameter lists of the GPU check, and what was aimed at and predicted for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.kernels.parameter_lists import MODELS, Shape, llama_shapes


def llama2_7b(layers: int) -> tuple[Shape, ...]:
    """Llama-2-7B's parameters, of so many layers: 9 each, and 3."""
    return llama_shapes(width=4096, hidden=11008, layers=layers, vocabulary=32000, key_width=4096)


# What each backend aimed at, by list: its step time over torch's fused AdamW's, float32.
TARGETS: dict[str, dict[str, float]] = {
    "2^28": {"triton": 1.6, "cuda": 1.45},
    "gpt2-small": {"triton": 1.15, "cuda": 1.05},
    "resnet-50": {"cuda": 1.05},
    "llama-2-7b": {"cuda": 1.35},
    "5000x1000": {"triton": 0.5, "cuda": 0.35},
}


@dataclass(frozen=True)
class Case:
    """A parameter list, and the ratio of step times that each backend aimed at."""

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
        "2^28": ((2**28,),),
        "gpt2-small": MODELS["gpt2-small"][0],
        "resnet-50": MODELS["resnet-50"][0],
        "llama-2-7b": llama,
        "5000x1000": ((1000,),) * 5000,
    }
    return {
        name: Case(labels.get(name, name), shapes[name], targets)
        for name, targets in TARGETS.items()
    }


# Of L2, what an update finds there of what the sums have read.
KEPT_SHARE_OF_L2 = 0.6
# A tensor of one chunk is updated at once, from L2.
CHUNK = 8192


def predicted_bytes(
    optimizer: str,
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    l2_bytes: int,
    at_cap: float = 1.0,
) -> float:
    """Bytes an element that a step moves from and to memory.

    Everything is read and written once. AM-AdamW with float32 reads once more what is not at the
    cap, and writes the parameter and exp_avg. Elsewhere what the sums have read is read again for
    the update, but for what L2 keeps. AM-AdamW has weight decay here, whose sums read the
    parameters too, and AM-SGD has none; its tensors share one beta.
    """
    sizes = [math.prod(shape) for shape in shapes]
    element, memory = dtype.itemsize, 4
    if optimizer == "AMAdamW":
        once, again = 3 * element + 4 * memory, 2 * element + 2 * memory
        if dtype == torch.float32:
            return once + (1.0 - at_cap) * (again + element + memory)
        numel = sum(n for n in sizes if n > CHUNK)
    else:
        once, again, numel = 3 * element + 2 * memory, element + memory, sum(sizes)
    return once + max(0.0, again * numel - KEPT_SHARE_OF_L2 * l2_bytes) / sum(sizes)

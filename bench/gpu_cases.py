"""The parameter lists of the GPU benchmarks, float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Shapes: TypeAlias = "tuple[tuple[int, ...], ...]"


def gpt2_small() -> Shapes:
    """GPT-2 small's 148 parameters."""
    width = 768
    block = (
        *[(width,)] * 2,  # layer norm
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],  # attention
        *[(width,)] * 2,
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],  # feed-forward
    )
    return ((50257, width), (1024, width), *block * 12, (width,), (width,))


def resnet50() -> Shapes:
    """ResNet-50's 161 parameters."""

    def convolution(channels: int, inputs: int, size: int) -> Shapes:
        """With the batch norm that follows."""
        return ((channels, inputs, size, size), (channels,), (channels,))

    shapes = [*convolution(64, 3, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, channels, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, channels, 1)
            channels = 4 * width
    return (*shapes, (1000, 2048), (1000,))


def llama2_7b(layers: int = 32) -> Shapes:
    """Llama-2-7B's parameters, of so many layers: 9 each, and 3."""
    width, inner, tokens = 4096, 11008, 32000
    layer = (
        *[(width, width)] * 4,
        *[(inner, width), (inner, width), (width, inner)],
        *[(width,)] * 2,
    )
    return ((tokens, width), *layer * layers, (width,), (tokens, width))


@dataclass(frozen=True)
class Case:
    """A parameter list, and the ratio of step times that each backend aimed at."""

    name: str
    shapes: Shapes
    targets: Mapping[str, float]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


# Of a parameter, in a benchmark: itself, its gradient, and the state of two optimizers.
RESIDENT_BYTES = 4 * (2 + 2 + 2)


def llama_that_fits(free_bytes: int) -> Shapes:
    """As many of Llama-2-7B's layers as fit four fifths of the free memory, one at least."""
    numel = 0.8 * free_bytes / RESIDENT_BYTES
    none, one = (sum(map(math.prod, llama2_7b(layers))) for layers in (0, 1))
    return llama2_7b(max(1, min(32, int((numel - none) / (one - none)))))


def cases(free_bytes: int) -> list[Case]:
    """The cases, for a device with so much free memory."""
    llama = llama_that_fits(free_bytes)
    return [
        Case("one tensor of 2^28", ((2**28,),), {"triton": 1.6, "cuda": 1.45}),
        Case("GPT-2 small", gpt2_small(), {"triton": 1.15, "cuda": 1.05}),
        Case("ResNet-50", resnet50(), {"cuda": 1.05}),
        Case(f"Llama-2-7B, {(len(llama) - 3) // 9} layers", llama, {"cuda": 1.35}),
        Case("5,000 tensors of 1,000", ((1000,),) * 5000, {"triton": 0.5, "cuda": 0.35}),
    ]

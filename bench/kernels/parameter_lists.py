"""The lists of parameters that steps are timed on, with exact shapes and their sources."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Shape = tuple[int, ...]

# float32 parameter, gradient and the two moments; and what a second gradient set adds.
STATE_BYTES, WORKING_BYTES = 16, 20
LINE = 16  # float32 elements of a cache line
SWEEP = range(20, 29, 2)  # powers of two, for the picture of time against size
SCALED = 2**25  # elements of a model that does not fit as it is, at most


@dataclass(frozen=True)
class ParameterList:
    """Parameters to step on.

    Attributes:
        name: as --lists takes it.
        shapes: the tensors, in the model's order.
        source: where the shapes are from.
        scalable: a model, whose dimensions can be divided where memory is short.
        everyone: every contestant takes part in the whole suite; else this package's fused
            backends and torch's fused optimizers, as the rest would take an hour.
        first_dtype_only: in the whole suite, whose time is short.
        divisor: what every dimension was divided by.
    """

    name: str
    shapes: tuple[Shape, ...]
    source: str
    scalable: bool = False
    everyone: bool = False
    first_dtype_only: bool = False
    divisor: int = 1

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def label(self) -> str:
        return self.name if self.divisor == 1 else f"{self.name}, dimensions / {self.divisor}"


def fit(parameters: ParameterList, limit: int) -> ParameterList | None:
    """The list itself if it has at most `limit` elements, else a model's with each dimension
    divided by the least power of two that leaves at most `limit` and `SCALED` elements. None
    where nothing fits."""
    divisor, shapes = 1, parameters.shapes
    if parameters.numel > limit:
        limit = min(limit, SCALED)
    largest = max((n for shape in shapes for n in shape), default=1)
    while sum(map(math.prod, shapes)) > limit:
        divisor *= 2
        shapes = tuple(tuple(max(n // divisor, 1) for n in s) for s in parameters.shapes)
        if not parameters.scalable or divisor > largest:
            return None
    return replace(parameters, shapes=shapes, divisor=divisor)


def some_of(sizes: Sequence[int], share: float) -> list[int]:
    """Places of tensors with about that share of the elements, from all over a list."""
    chosen = []
    seen = taken = 0
    for place, size in enumerate(sizes):
        seen += size
        if taken + size / 2 <= share * seen:
            chosen.append(place)
            taken += size
    return chosen


# ---- models ---------------------------------------------------------------------------


def gpt2_shapes(width: int, layers: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """GPT-2's; its linear layers are [in, out], its head is the embedding."""
    block = (
        *[(width,)] * 2,  # layer norm
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],  # attention
        *[(width,)] * 2,  # layer norm
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],  # feed-forward
    )
    return ((vocabulary, width), (context, width), *block * layers, (width,), (width,))


def llama_shapes(
    width: int, hidden: int, layers: int, vocabulary: int, key_width: int
) -> tuple[Shape, ...]:
    """Llama's: 9 a block; no biases, head of its own. `key_width`: of keys and of values."""
    block = (
        *[(width, width), (key_width, width), (key_width, width), (width, width)],  # q, k, v, o
        *[(hidden, width), (hidden, width), (width, hidden)],  # gate, up, down
        *[(width,)] * 2,  # norms
    )
    return ((vocabulary, width), *block * layers, (width,), (vocabulary, width))


def resnet50_shapes() -> tuple[Shape, ...]:
    """ResNet-50's: convolutions without bias, each with a batch norm's weight and bias."""

    def conv(out: int, into: int, kernel: int) -> tuple[Shape, ...]:
        return ((out, into, kernel, kernel), (out,), (out,))

    shapes = [*conv(64, 3, 7)]
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [*conv(width, into, 1), *conv(width, width, 3), *conv(4 * width, width, 1)]
            if block == 0:
                shapes += conv(4 * width, into, 1)  # of the shortcut
            into = 4 * width
    return (*shapes, (1000, into), (1000,))


def vit_shapes(width: int, hidden: int, layers: int, patch: int, image: int) -> tuple[Shape, ...]:
    """A vision transformer's, with a class token and a head of 1,000 classes."""
    positions = (image // patch) ** 2 + 1
    block = (
        *[(width,)] * 2,  # layer norm
        *[(3 * width, width), (3 * width,), (width, width), (width,)],  # attention
        *[(width,)] * 2,  # layer norm
        *[(hidden, width), (hidden,), (width, hidden), (width,)],  # feed-forward
    )
    return (
        *[(1, 1, width), (width, 3, patch, patch), (width,), (1, positions, width)],
        *block * layers,
        *[(width,), (width,), (1000, width), (1000,)],
    )


# Name: shapes and their source. The tests hold each to its published number of parameters.
MODELS = {
    "gpt2-small": (
        gpt2_shapes(width=768, layers=12, vocabulary=50257, context=1024),
        "Radford et al. 2019, GPT-2 124M: 12 layers, width 768, 50,257 tokens, context 1,024",
    ),
    "llama-2-7b": (
        llama_shapes(width=4096, hidden=11008, layers=32, vocabulary=32000, key_width=4096),
        "Touvron et al. 2023, arXiv 2307.09288: 32 layers, width 4096, hidden 11008",
    ),
    "llama-3-8b": (
        llama_shapes(width=4096, hidden=14336, layers=32, vocabulary=128256, key_width=1024),
        "Llama team 2024, arXiv 2407.21783: as Llama 2, hidden 14336, 8 key-value heads of 128",
    ),
    "resnet-50": (
        resnet50_shapes(),
        "He et al. 2016, arXiv 1512.03385, as torchvision's resnet50",
    ),
    "vit-b": (
        vit_shapes(width=768, hidden=3072, layers=12, patch=16, image=224),
        "Dosovitskiy et al. 2021, arXiv 2010.11929, ViT-B/16, as torchvision's vit_b_16",
    ),
}


# ---- all of them ----------------------------------------------------------------------


def parameter_lists(l2: int, last_level: int) -> dict[str, ParameterList]:
    """Every list by its name.

    Args:
        l2: bytes of the L2 caches of all cores that work; 0 where there is none of its own.
        last_level: bytes of the last-level cache.
    """

    # Matrices, for betas by row: all other optimizers take them for vectors. A row is of whole
    # cache lines, as a model's are.
    def one(name: str, numel: int, rows: int, source: str) -> ParameterList:
        columns = numel // rows // LINE * LINE
        return ParameterList(name, ((rows, columns),), f"one tensor of {rows:,} rows{source}")

    def many(tensors: int, rows: int, columns: int) -> ParameterList:
        source = f"{tensors:,} tensors of {rows} x {columns}"
        return ParameterList(f"{tensors}x{rows * columns}", ((rows, columns),) * tensors, source)

    lists = [
        one(
            "8-llc",
            8 * last_level // STATE_BYTES,
            4096,
            ", with its gradient and moments 8 times the last-level cache in float32",
        ),
        one(
            "half-llc",
            last_level // 2 // WORKING_BYTES,
            1024,
            ", with two gradients and its moments half of the last-level cache",
        ),
        *(
            [
                one(
                    "l2",
                    3 * l2 // 4 // WORKING_BYTES,
                    256,
                    ", with two gradients and its moments 3/4 of the L2 caches",
                )
            ]
            if l2
            else []
        ),
        ParameterList(
            "decoder-300",
            llama_shapes(width=192, hidden=512, layers=33, vocabulary=4096, key_width=192),
            "300 tensors of a small Llama-like decoder",
            scalable=True,
            everyone=True,
        ),
        many(5000, 10, 10),
        many(5000, 20, 50),
        many(20000, 4, 16),
        *[
            ParameterList(
                name, shapes, source, scalable=True, first_dtype_only=name != "gpt2-small"
            )
            for name, (shapes, source) in MODELS.items()
        ],
        *[
            replace(one(f"2^{n}", 2**n, 2 ** (n // 2), ""), first_dtype_only=True, everyone=n == 24)
            for n in SWEEP
        ],
    ]
    return {parameters.name: parameters for parameters in lists}


def model_list(text: str) -> ParameterList:
    """The parameters of a user's model, from "module:factory".

    Raises:
        ImportError, AttributeError: there is no such module, or nothing of that name in it.
        ValueError: what the factory gives has no parameters that need a gradient.
    """
    module, _, factory = text.partition(":")
    model = getattr(importlib.import_module(module), factory)()
    shapes = tuple(_shapes_of(model))
    if not shapes:
        raise ValueError(f"{text} has no parameters that need a gradient")
    return ParameterList(text, shapes, "the user's", scalable=True, everyone=True)


def _shapes_of(model: object) -> Iterator[Shape]:
    parameters = getattr(model, "parameters", None)
    if callable(parameters):
        for param in parameters():
            if param.requires_grad:
                yield tuple(param.shape)

"""The floor of a step: the bytes that its algorithm has to move, and how fast bytes move here.

One pass reads parameter, gradient and state and writes parameter and state. An Adaptive
Memory optimizer waits for its sums and then reads gradient and memory again (and AM-AdamW, with
weight decay, the parameter too), unless what it waits for stays in cache between the two. AM-AdamW
guesses its beta and does not wait, unless it is "anchored" or the parameters are of 16 bits and
rounded to nearest: where the guess was wrong, a second pass reads all four and writes parameter and
memory. In bytes a float32 parameter: AdamW 28, AM-AdamW 28 and up to 24 more, anchored 28 to 44,
AM-SGD 20 to 28.

With a beta a row it is the row that has to stay in cache, which all but the longest do: 28, on
either plane, and 22 of 16-bit parameters and gradients.

Memories and parameters in few bits are fewer bytes. A float32 parameter with bfloat16 memories is
20, and up to 18 more where the guess was wrong; with int8 memories 16, and up to 15 more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from adamem_fused.state import beta_shape
from bench.kernels.contestants import Contestant
from bench.kernels.parameter_lists import Shape

MEMORY_BYTES = 4  # an element of an Adaptive Memory optimizer's state, for all but float64


def bytes_to_move(
    contestant: Contestant,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    state_bytes: int,
    last_level: int,
) -> int:
    """Bytes read and written in a step on these shapes.

    Args:
        state_bytes: of the whole state, as measured.
        last_level: bytes of the last-level cache.
    """
    numel, element = sum(map(math.prod, shapes)), dtype.itemsize
    one_pass = 3 * element * numel + 2 * state_bytes
    if not contestant.adaptive:
        return one_pass
    # AM-AdamW has weight decay here and one beta a tensor or a row, AM-SGD neither.
    memory: float = 8 if dtype == torch.float64 else MEMORY_BYTES
    if contestant.low:
        memory = state_bytes / numel / 2  # with scales and remainders
    if contestant.optimizer == "adamw":
        in_sums, together = 2 * element + 2 * memory, segments(shapes, contestant.by_row)
    else:
        in_sums, together = element + memory, [(numel, 1)]
    second = in_sums
    exact = contestant.low_guesses if contestant.low else element >= 4
    if contestant.optimizer == "adamw" and not contestant.anchored and exact:
        second = 3 * (element + memory) * (contestant.missed or 0.0)
    too_large = sum(n * count for n, count in together if n * in_sums > last_level)
    return one_pass + round(second * too_large)


def segments(shapes: Sequence[Shape], by_row: bool) -> list[tuple[int, int]]:
    """Of each tensor: how many elements share a beta, and how many betas there are."""
    found = []
    for shape in shapes:
        rows = beta_shape(torch.Size(shape), "row" if by_row else "tensor").numel()
        found.append((math.prod(shape) // max(rows, 1), rows))
    return found

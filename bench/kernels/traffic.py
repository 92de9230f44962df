"""The floor of a step: the bytes that its algorithm has to move, and how fast bytes move here.

One pass reads parameter, gradient and state and writes parameter and state. An Adaptive
Memory optimizer waits for its sums and then reads gradient and memory again (and AM-AdamW, with
weight decay, the parameter too), unless what it waits for stays in cache between the two. AM-AdamW
guesses its beta and does not wait, unless it is "anchored" or the parameters are of 16 bits: where
the guess was wrong, a second pass reads all four and writes parameter and memory. In bytes a
float32 parameter: AdamW 28, AM-AdamW 28 and up to 24 more, anchored 28 to 44, AM-SGD 20 to 28.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

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
    sizes = [math.prod(shape) for shape in shapes]
    numel, element = sum(sizes), dtype.itemsize
    one_pass = 3 * element * numel + 2 * state_bytes
    if not contestant.adaptive:
        return one_pass
    # AM-AdamW has weight decay here and one beta a tensor, AM-SGD neither.
    memory = 8 if dtype == torch.float64 else MEMORY_BYTES
    if contestant.optimizer == "adamw":
        in_sums, together = 2 * element + 2 * memory, sizes
    else:
        in_sums, together = element + memory, [numel]
    second = float(in_sums)
    if contestant.optimizer == "adamw" and not contestant.anchored and element >= 4:
        second = 3 * (element + memory) * (contestant.missed or 0.0)
    return one_pass + round(second * sum(n for n in together if n * in_sums > last_level))

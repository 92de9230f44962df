"""One run: what is trained on what, and its learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_SHARE = 0.1  # of the steps


@dataclass(frozen=True)
class Cell:
    """One run: what is trained on what, how. Also the key of its row in the results."""

    task: str
    contestant: str
    lr: float
    warmup: bool
    seed: int


def lr_factor(step: int, steps: int, warmup: bool, cosine: bool) -> float:
    """What the learning rate of a step, the first of them 0, is multiplied by."""
    warmup_steps = round(WARMUP_SHARE * steps) if warmup else 0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if not cosine:
        return 1.0
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))

"""What is run, the first things first."""

from __future__ import annotations

from collections.abc import Sequence

from bench.experiments.larger.contestants import (
    ABLATIONS,
    ADAMW,
    ADAPTIVE,
    CONTESTANTS,
    FIXED,
    LEVEL_ROW,
    LEVEL_TENSOR,
    MUON,
    OPTIONS,
    Contestant,
)
from bench.experiments.larger.plan import Study


def _names(*groups: Sequence[Contestant]) -> tuple[str, ...]:
    return tuple(contestant.name for group in groups for contestant in group)


FIRST = _names([ADAMW, LEVEL_TENSOR, LEVEL_ROW])
HIGH_CAP = [c for c in OPTIONS if c.name.endswith("cap 0.95")]
MAIN = (*FIRST, *(n for n in _names(FIXED, ADAPTIVE, ABLATIONS, HIGH_CAP, MUON) if n not in FIRST))
SHORT = (
    *FIRST,
    "AdamW 0.6",
    "AdamW 0.8",
    "AdamW 0.9, 0.95",
    "AM-AdamW anchored tensor",
    "AM-AdamW anchored row",
)
NETWORKS = (*SHORT, "AM-AdamW level row, layers only, cap 0.95", "AdamW 0.8, 0.95")
CORE = (
    *FIRST,
    "AM-AdamW level row, layers only, cap 0.95",
    *_names(MUON),
    "AdamW 0.8, 0.95",
    "AdamW 0.9, 0.95",
    "AM-AdamW level row, cap 0.95",
    "AM-AdamW anchored row",
)
# For rows that rarely have a gradient.
RARE = (
    *FIRST,
    "AM-AdamW level row, layers only",
    "AM-AdamW level row, layers only, cap 0.95",
    "AM-AdamW level row, embeddings tensor",
    "AM-AdamW level row, cap without gradient",
    "AdamW 0.8, 0.95",
)

STUDIES = (
    Study("gpt-400k", True, MAIN, seeds=3),
    Study("logistic-fashion", True, (*SHORT, "beta at the cap"), seeds=3),
    Study("gpt-bpe", True, RARE, seeds=3),
    Study("gpt-1m", True, CORE, seeds=1),
    Study("vit-fashion", True, MAIN, seeds=1),
    Study("gpt-400k", False, NETWORKS, seeds=1),
    Study("lora-documentation", True, NETWORKS, seeds=3),
    Study("gpt-400k", True, tuple(CONTESTANTS), seeds=1),
    Study("gpt-400k", True, FIRST, seeds=1, octaves=range(-2, 5)),
    Study("gpt-1m", True, CORE, seeds=3),
    Study("vit-fashion", True, MAIN, seeds=3),
    Study("gpt-400k", False, NETWORKS, seeds=3),
    Study("gpt-400k-no-decay", True, CORE[:4], seeds=3),
    Study("gpt-1m-batch128", True, CORE[:4], seeds=1),
    Study("gpt-1m", False, FIRST, seeds=1),
    Study("gpt-400k", True, tuple(CONTESTANTS), seeds=3),
)

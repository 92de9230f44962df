"""What is run, the first things first."""

from __future__ import annotations

from bench.experiments.larger.contestants import (
    ABLATIONS,
    ADAPTIVE,
    ADAMW,
    CONTESTANTS,
    FIXED,
    LEVEL_ROW,
    LEVEL_TENSOR,
    MUON,
    OPTIONS,
)
from bench.experiments.larger.plan import Study


def _names(*groups: list) -> tuple[str, ...]:
    return tuple(contestant.name for group in groups for contestant in group)


FIRST = _names([ADAMW, LEVEL_TENSOR, LEVEL_ROW])
HIGH_CAP = [c for c in OPTIONS if c.name.endswith("cap 0.95")]
MAIN = (*FIRST, *(n for n in _names(FIXED, ADAPTIVE, ABLATIONS, HIGH_CAP, MUON) if n not in FIRST))
CORE = (*FIRST, *_names(MUON), "AdamW 0.9, 0.95", "AdamW 0.8", "AM-AdamW anchored row")

STUDIES = (
    Study("gpt-400k", True, MAIN, seeds=1),
    Study("gpt-1m", True, CORE, seeds=1),
    Study("gpt-400k", True, MAIN, seeds=3),
    Study("vit-fashion", True, MAIN, seeds=1),
    Study("gpt-1m", True, CORE, seeds=3),
    Study("vit-fashion", True, MAIN, seeds=3),
    Study("gpt-400k", True, tuple(CONTESTANTS), seeds=3),
)

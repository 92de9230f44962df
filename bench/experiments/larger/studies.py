"""What is run, the first things first."""

from __future__ import annotations

from collections.abc import Sequence

from bench.experiments.larger.contestants import (
    ABLATIONS,
    ABLATIONS_OF_LAYERS,
    ADAMW,
    ADAPTIVE,
    AROUND,
    CONTESTANTS,
    CUTS,
    FIXED,
    GATED,
    GATED_BY_TENSOR,
    GATES,
    LAYERS,
    LEVEL_ROW,
    LEVEL_TENSOR,
    MUON,
    OPTIONS,
    REST_FIXED,
    TUNED,
    Contestant,
)
from bench.experiments.larger.plan import Study


def _names(*groups: Sequence[Contestant]) -> tuple[str, ...]:
    """Each once."""
    return tuple(dict.fromkeys(contestant.name for group in groups for contestant in group))


CAPS = [contestant for contestant in OPTIONS if contestant.name.endswith("cap 0.95")]
FIRST = _names([ADAMW, LEVEL_TENSOR, LEVEL_ROW])
MAIN = _names([ADAMW, LEVEL_TENSOR, LEVEL_ROW], FIXED, ADAPTIVE, ABLATIONS, CAPS, [LAYERS], MUON)
ANCHORED = ("AM-AdamW anchored tensor", "AM-AdamW anchored row")
SHORT = (*FIRST, "AdamW 0.6", "AdamW 0.8", "AdamW 0.9, 0.95", *ANCHORED)
# For rows that rarely have a gradient.
RARE = (
    *FIRST,
    "AM-AdamW level row, layers only",
    LAYERS.name,
    "AM-AdamW level row, embeddings tensor",
    "AM-AdamW level row, cap without gradient",
    "AdamW 0.8, 0.95",
)
CLOSELY = _names(AROUND, GATES, CUTS, [REST_FIXED])
ADAPTATION = _names([LAYERS], ABLATIONS[:1], ABLATIONS_OF_LAYERS)
LARGER = (*_names([ADAMW, LEVEL_TENSOR, LAYERS, GATED]), "AdamW 0.8, 0.95")

STUDIES = (
    Study("gpt-400k", True, MAIN, seeds=3),
    Study("logistic-fashion", True, (*SHORT, "beta at the cap"), seeds=3),
    Study("gpt-bpe", True, RARE, seeds=3),
    Study("gpt-bpe", True, (GATED.name,), seeds=3),
    Study("gpt-400k", True, (GATED.name,), seeds=3),
    Study("logistic-fashion", True, (GATED.name, "AM-AdamW level row, cap 0.95"), seeds=3),
    Study("vit-fashion", True, (*LARGER, LEVEL_ROW.name), seeds=1),
    Study("gpt-1m", True, LARGER, seeds=1),
    Study("lora-documentation", True, LARGER, seeds=1),
    Study("gpt-bpe", True, ("AM-AdamW level row, cap 0.95",), seeds=1),
    Study("gpt-400k", True, ADAPTATION, seeds=1),
    Study("gpt-bpe", True, ADAPTATION, seeds=1),
    Study("gpt-400k", False, (*LARGER, GATED_BY_TENSOR.name), seeds=1),
    Study("gpt-bpe", True, (GATED_BY_TENSOR.name,), seeds=1),
    Study("gpt-400k", True, (GATED_BY_TENSOR.name,), seeds=1),
    Study("logistic-fashion", True, (GATED_BY_TENSOR.name,), seeds=1),
    Study("gpt-400k", True, CLOSELY, seeds=1),
    Study("gpt-400k-no-decay", True, LARGER, seeds=1),
    Study("gpt-400k", True, _names(TUNED), seeds=1),
    Study("gpt-bpe", True, _names(TUNED), seeds=1),
    Study("gpt-400k", True, _names(TUNED[:1]), seeds=3),
    Study("gpt-bpe", True, _names(TUNED[:1]), seeds=3),
    Study("gpt-400k-batch128", True, LARGER, seeds=1),
    Study("gpt-400k", False, _names(TUNED[:1]), seeds=1),
    Study("lora-documentation", True, _names(TUNED[:1]), seeds=1),
    Study("vit-fashion", True, _names(TUNED[:1]), seeds=1),
    Study("gpt-1m", True, _names(TUNED[:1]), seeds=1),
    Study("gpt-1m", True, ("Muon + AdamW 0.9",), seeds=1),
    Study("gpt-400k", True, ADAPTATION, seeds=3),
    Study("gpt-bpe", True, ADAPTATION, seeds=3),
    Study("lora-documentation", True, LARGER, seeds=3),
    Study("gpt-400k", False, LARGER, seeds=3),
    Study("gpt-400k-no-decay", True, LARGER, seeds=3),
    Study("vit-fashion", True, LARGER, seeds=3),
    Study("gpt-400k-batch128", True, LARGER, seeds=3),
    Study("gpt-1m", True, LARGER, seeds=3),
    Study("vit-fashion", True, ("Muon + AdamW 0.9", *ADAPTATION), seeds=1),
    Study("gpt-400k", True, (*FIRST, LAYERS.name, GATED.name), seeds=1, octaves=range(-2, 5)),
    Study("gpt-1m", True, (*_names(TUNED[:1]), "Muon + AdamW 0.9"), seeds=3),
    Study("vit-fashion", True, (*_names(TUNED[:1]), *FIRST, *ADAPTATION, *ANCHORED), seeds=3),
    Study("lora-documentation", True, (*_names(TUNED[:1]), *ANCHORED), seeds=3),
    Study("gpt-400k", False, (*FIRST, *ANCHORED), seeds=3),
    Study("gpt-bpe", True, (REST_FIXED.name,), seeds=3),
    Study("gpt-400k", True, CLOSELY, seeds=3),
    Study("gpt-1m", False, LARGER, seeds=1),
    Study("gpt-400k", True, tuple(CONTESTANTS), seeds=3),
)

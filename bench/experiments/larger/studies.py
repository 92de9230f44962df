"""What is run, the first things first."""

from __future__ import annotations

from collections.abc import Sequence

from bench.experiments.larger.contestants import (
    ABLATIONS,
    ABLATIONS_OF_LAYERS,
    ADAMW,
    ADAPTIVE,
    CONTESTANTS,
    CUTS,
    FIXED,
    GATED,
    IN_LAYERS,
    LAYERS,
    LEVEL_ROW,
    LEVEL_TENSOR,
    MUON,
    OPTIONS,
    REST_FIXED,
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
# Around what did best in the first runs.
AROUND = _names(ABLATIONS_OF_LAYERS, [REST_FIXED], IN_LAYERS, CUTS)
LARGER = (
    *_names([ADAMW, LEVEL_TENSOR, LAYERS, GATED]),
    "AdamW 0.8, 0.95",
    "AdamW 0.9, 0.95",
    "Muon + AdamW 0.9",
)
ADAPTATION = _names([LEVEL_TENSOR, LAYERS], ABLATIONS[:1], ABLATIONS_OF_LAYERS)
NETWORKS = (
    *FIRST,
    LAYERS.name,
    GATED.name,
    "AdamW 0.8",
    "AdamW 0.8, 0.95",
    "AdamW 0.9, 0.95",
    *ANCHORED,
)
IMAGES = tuple(dict.fromkeys((*NETWORKS, *ADAPTATION)))
ADAPTERS = (*LARGER[:-1], LEVEL_ROW.name, "AM-AdamW anchored tensor")

STUDIES = (
    Study("gpt-400k", True, MAIN, seeds=3),
    Study("logistic-fashion", True, (*SHORT, "beta at the cap"), seeds=3),
    Study("gpt-bpe", True, RARE, seeds=3),
    Study("gpt-bpe", True, (GATED.name,), seeds=3),
    Study("gpt-400k", True, (GATED.name,), seeds=3),
    Study("logistic-fashion", True, (GATED.name, "AM-AdamW level row, cap 0.95"), seeds=3),
    Study("gpt-1m", True, LARGER, seeds=1),
    Study("vit-fashion", True, IMAGES, seeds=1),
    Study("gpt-400k", True, AROUND, seeds=1),
    Study("gpt-bpe", True, (REST_FIXED.name, *ADAPTATION), seeds=1),
    Study("lora-documentation", True, ADAPTERS, seeds=3),
    Study("gpt-400k", False, NETWORKS, seeds=1),
    Study("gpt-400k", True, ADAPTATION, seeds=3),
    Study("gpt-bpe", True, (REST_FIXED.name, *ADAPTATION), seeds=3),
    Study("vit-fashion", True, IMAGES, seeds=3),
    Study("gpt-1m", True, LARGER, seeds=3),
    Study("gpt-400k", True, AROUND, seeds=3),
    Study("gpt-400k", True, (*FIRST, LAYERS.name), seeds=1, octaves=range(-2, 5)),
    Study("gpt-400k", False, NETWORKS, seeds=3),
    Study("gpt-400k-no-decay", True, LARGER[:5], seeds=3),
    Study("gpt-1m-batch128", True, LARGER[:5], seeds=1),
    Study("gpt-1m", False, LARGER[:5], seeds=1),
    Study("gpt-400k", True, tuple(CONTESTANTS), seeds=3),
)

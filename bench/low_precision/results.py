"""The trainings' results on disk, and the rule by which a format is judged."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.low_precision.contestants import BASELINE

RESULTS = Path("bench/results/low-precision")
ROWS = "runs.json"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DIGITS = 5  # significant ones
# Of a run's "stored": float32 trains, and beside it the other formats of the memories are given
# the same parameters and gradients at each step, for their betas alone.
SAME_GRADIENTS = "same gradients"
OWN = "own"  # of other packages: what they store is theirs to say

RULE = (
    "Held to the same optimizer in float32 (another package's to AdamW), on each task, by the mean "
    "held-out loss over the seeds and by the spread of float32's: its highest less its lowest "
    "seed. Within: the mean is higher or lower than float32's by at most that spread. Higher, or "
    "lower: by more."
)
WITHIN, HIGHER, LOWER = "within", "higher", "lower"


@dataclass(frozen=True)
class Verdict:
    """A format beside float32: the difference of the means, float32's spread, and the outcome."""

    difference: float
    spread: float

    @property
    def outcome(self) -> str:
        if abs(self.difference) <= self.spread:
            return WITHIN
        return LOWER if self.difference < 0 else HIGHER  # NaN too


@dataclass
class Trainings:
    """What `python -m bench.experiments low-precision` has found."""

    content: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Trainings | None:
        """None where there is nothing."""
        path = folder / ROWS
        return Trainings(json.loads(path.read_text())) if path.exists() else None

    def write(self, folder: Path) -> Path:
        path = folder / ROWS
        runs = [json.dumps(run, allow_nan=False) for run in self.content["runs"]]
        head = json.dumps({k: v for k, v in self.content.items() if k != "runs"}, indent=1)
        # A line for each run.
        path.write_text(head[:-2] + ',\n "runs": [\n' + ",\n".join(runs) + "\n ]\n}\n")
        return path

    @property
    def tasks(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["tasks"]
        return found

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Optimizers with what they store, in order."""
        pairs = ((run["optimizer"], run["stored"]) for run in self.content["runs"])
        return [pair for pair in dict.fromkeys(pairs) if pair[1] != SAME_GRADIENTS]

    def runs(self, task: str, optimizer: str, stored: str) -> list[dict[str, Any]]:
        """Those of all seeds."""
        key = task, optimizer, stored
        runs = self.content["runs"]
        return [run for run in runs if (run["task"], run["optimizer"], run["stored"]) == key]

    def losses(self, task: str, optimizer: str, stored: str) -> list[float]:
        """Of all seeds; NaN where it is not finite."""
        losses = [run["loss"] for run in self.runs(task, optimizer, stored)]
        return [math.nan if loss is None else loss for loss in losses]

    def verdict(self, task: str, optimizer: str, stored: str) -> Verdict | None:
        """Another package's AdamW is held to AdamW. None for float32 itself, and without runs."""
        losses = self.losses(task, optimizer, stored)
        own = self.losses(task, optimizer, BASELINE)
        base = own or self.losses(task, "AdamW", BASELINE)
        if stored == BASELINE or not losses or not base:
            return None
        return Verdict(statistics.fmean(losses) - statistics.fmean(base), max(base) - min(base))

    def outcomes(self, stored: str) -> list[tuple[str, str, str]]:
        """Task, optimizer and outcome of each that has this format."""
        found = []
        for task in self.tasks:
            for optimizer, own in self.kinds:
                verdict = self.verdict(task, optimizer, own) if own == stored else None
                if verdict is not None:
                    found.append((task, optimizer, verdict.outcome))
        return found


def rounded(value: Any) -> Any:
    """Numbers to so many significant digits, within lists and dicts; what is not finite is None."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value

"""The table and the JSON of bench.cpu."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.environment import environment


@dataclass(frozen=True)
class Result:
    """What was measured of one comparison.

    Attributes:
        case, dtype, tensors, parameters: the parameter list; parameters counts elements.
        contestant, baseline: the two sides.
        target: the ratio of times that was aimed at, or None.
        contestant_seconds, baseline_seconds: samples, paired; a sample is the median
            seconds of the steps of a block.
        contestant_bytes, baseline_bytes: read and written a parameter and step; None where
            it is not known.
        copy_bandwidth: bytes a second that a copy of the same working set reads and writes.
    """

    case: str
    dtype: str
    tensors: int
    parameters: int
    contestant: str
    baseline: str
    target: float | None
    contestant_seconds: list[float]
    baseline_seconds: list[float]
    contestant_bytes: int | None
    baseline_bytes: int | None
    copy_bandwidth: float

    @property
    def ratio_quartiles(self) -> list[float]:
        """Lower quartile, median and upper quartile of the pairs' ratios."""
        pairs = zip(self.contestant_seconds, self.baseline_seconds, strict=True)
        ratios = [a / b for a, b in pairs]
        if len(ratios) == 1:
            return ratios * 3
        return statistics.quantiles(ratios, method="inclusive")

    @property
    def verdict(self) -> str:
        """The target and whether the median ratio meets it; empty without a target."""
        if self.target is None:
            return ""
        met = self.ratio_quartiles[1] <= self.target
        return f"{self.target:.2f} {'met' if met else 'not met'}"


def format_table(results: list[Result]) -> str:
    """A line for each comparison; both sides' figures stand as contestant / baseline."""
    return "\n".join(
        [
            "",
            tabulate(
                [_cells(result) for result in results],
                headers=[
                    "parameters",
                    "dtype",
                    "time of / time of",
                    "ratio\n(quartiles)",
                    "target\n(at most)",
                    "ms a step",
                    "bytes a\nparameter",
                    "GB/s",
                    "GB/s of\na copy",
                ],
                colalign=["left"] * 3 + ["right"] * 6,
                disable_numparse=True,
            ),
            "",
            "Ratios are medians over pairs of blocks in turns; a figure a / b is of the two sides.",
            "Bytes: what has to be read and written if tensors that fit in the last-level cache",
            "stay there between the sums and the update. A copy: of as many bytes of working set.",
            "",
        ]
    )


def _cells(result: Result) -> list[str]:
    low, median, high = result.ratio_quartiles
    seconds = [
        statistics.median(samples)
        for samples in (result.contestant_seconds, result.baseline_seconds)
    ]
    moved = [result.contestant_bytes, result.baseline_bytes]
    rates = [
        "-" if n is None else f"{n * result.parameters / s / 1e9:.1f}"
        for n, s in zip(moved, seconds, strict=True)
    ]
    return [
        result.case,
        result.dtype,
        f"{result.contestant} / {result.baseline}",
        f"{median:.2f} ({low:.2f} to {high:.2f})",
        result.verdict,
        " / ".join(f"{1e3 * s:.3f}" for s in seconds),
        " / ".join("-" if n is None else str(n) for n in moved),
        " / ".join(rates),
        f"{result.copy_bandwidth / 1e9:.1f}",
    ]


def write_json(results: list[Result], settings: dict[str, Any], path: Path) -> None:
    """Writes the settings, versions and every comparison with its samples."""
    report = {
        "settings": settings,
        "environment": environment(),
        "results": [
            {**asdict(result), "ratio_quartiles": result.ratio_quartiles} for result in results
        ],
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")

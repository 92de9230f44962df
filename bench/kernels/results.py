"""What was measured: rows of samples, ratios with their spread, and the JSON of both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_cases
from bench.kernels.contestants import ADAMW_BASELINE, SGD_BASELINE, VARIANTS

# A median that is no surer than this, relatively, may differ by 10% in another run.
NOISY = 0.05

# A list of rounds for each pass. Slow contestants sit out the last rounds.
Samples = list[list[float]]


@dataclass
class Row:
    """One contestant on one parameter list.

    Attributes:
        parameters: the list's label; `numel` elements in `tensors` tensors.
        dtype: without "torch.".
        cache: "warm" (steps one after the other) or "cold" (caches flushed before each).
        contestant, optimizer: its name, and "adamw" or "sgd".
        step, host, kernel: seconds, see bench.kernels.devices.Sample. The rounds of all
            rows of a list correspond.
        bytes_to_move: the floor of a step, see bench.kernels.traffic.
        copy_bandwidth: bytes a second that are read and written by a copy of as many bytes,
            or a change in place where that is faster.
        missed: share of the elements whose beta was below its cap: in float32 and float64 their
            update, begun with the cap, was repaired. None where nobody looked.
        launches, temporary_bytes, state_bytes: of a step, of a step, of the state.
        peak_bytes: parameters, one set of gradients, state and what a step takes for its time.
        reason: why it was not measured, or not to the end.
    """

    parameters: str
    numel: int
    tensors: int
    dtype: str
    cache: str
    contestant: str
    optimizer: str
    step: Samples = field(default_factory=list)
    host: Samples = field(default_factory=list)
    kernel: Samples = field(default_factory=list)
    bytes_to_move: int | None = None
    copy_bandwidth: float | None = None
    missed: float | None = None
    launches: int | None = None
    temporary_bytes: int | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.parameters, self.dtype, self.cache, self.contestant

    @property
    def seconds(self) -> Spread | None:
        """Of a step."""
        return Spread.of(self.step)

    @property
    def device_seconds(self) -> float | None:
        """The median of the kernels' time where there is one, and else of the step's."""
        spread = Spread.of(self.kernel) or self.seconds
        return spread.median if spread else None

    @property
    def floor_seconds(self) -> float | None:
        """What a step takes if its bytes move as fast as a copy's."""
        if self.bytes_to_move is None or not self.copy_bandwidth:
            return None
        return self.bytes_to_move / self.copy_bandwidth

    @property
    def of_floor(self) -> float | None:
        """The floor over the time taken: 1 at the floor."""
        if self.floor_seconds is None or self.device_seconds is None:
            return None
        return self.floor_seconds / self.device_seconds

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second: those that have to move, over the time taken."""
        if self.bytes_to_move is None or self.device_seconds is None:
            return None
        return self.bytes_to_move / self.device_seconds


@dataclass(frozen=True)
class Spread:
    """Samples in passes: their median, their quartiles, and how sure the median is.

    Attributes:
        uncertainty: what the median may be off by. A pass builds everything anew, minutes
            after the last, as another run does: the distance between the passes' medians
            counts as well as the samples' quartiles.
        passes: how many there were.
    """

    median: float
    low: float
    high: float
    uncertainty: float
    passes: int

    @staticmethod
    def of(passes: Sequence[Sequence[float]]) -> Spread | None:
        """None without a sample."""
        passes = [rounds for rounds in passes if rounds]
        samples = [sample for rounds in passes for sample in rounds]
        if not samples:
            return None
        low, median, high = (
            statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else samples * 3
        )
        medians = [statistics.median(rounds) for rounds in passes]
        # Twice the standard error of a median, of samples that are normally distributed.
        own = 2 * (high - low) / math.sqrt(len(samples))
        return Spread(median, low, high, max(own, max(medians) - min(medians)), len(passes))

    @property
    def noisy(self) -> bool:
        """Whether another run may differ by 10%; unknown, and so yes, after one pass."""
        return self.passes < 2 or self.uncertainty > NOISY * self.median


@dataclass
class Report:
    """A run of `python -m bench kernels`.

    Attributes:
        settings, environment: what it depends on.
        missing: contestants that are not there, and why.
        rows: in the order of the lists.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    missing: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def row(self, parameters: str, dtype: str, cache: str, contestant: str) -> Row | None:
        key = (parameters, dtype, cache, contestant)
        return next((row for row in self.rows if row.key == key), None)

    def ratio(self, row: Row, against: str, measure: str = "step") -> Spread | None:
        """A row's time over that of another contestant in the same rounds.

        Args:
            measure: "step", "host" or "kernel".
        """
        other = self.row(row.parameters, row.dtype, row.cache, against)
        if other is None:
            return None
        passes = zip(getattr(row, measure), getattr(other, measure), strict=False)
        return Spread.of(
            [[a / b for a, b in zip(ours, theirs, strict=False)] for ours, theirs in passes]
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @staticmethod
    def read(path: Path) -> Report:
        """Raises OSError, or ValueError where the file is not one of these."""
        try:
            content = json.loads(path.read_text())
            return Report(**{**content, "rows": [Row(**row) for row in content["rows"]]})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of bench kernels: {error}") from None


def baseline(row: Row) -> str:
    """torch's fused optimizer of the same kind."""
    return ADAMW_BASELINE if row.optimizer == "adamw" else SGD_BASELINE


@dataclass(frozen=True)
class Target:
    """A ratio of step times, caches warm, that was aimed at."""

    name: str  # of the parameter list
    dtype: str
    contestant: str
    against: str
    at_most: float


# Of the cpu backend, in the order of VARIANTS: nothing missed, 20%, all of it; anchored; and where
# that was aimed at, by row, level and anchored.
CPU_TARGETS: dict[tuple[str, str], tuple[float, ...]] = {
    ("8-llc", "float32"): (1.0, 1.2, 1.9, 1.9),
    ("2^28", "float32"): (1.0, 1.2, 1.9, 1.9, 1.05, 1.05),
    ("half-llc", "float32"): (0.95, 1.1, 1.75, 1.6, 1.25, 1.25),
    ("l2", "float32"): (1.0, 1.15, 1.6, 1.3, 1.3, 1.3),
    ("decoder-300", "float32"): (0.95, 1.1, 1.8, 1.8),
    ("gpt2-small", "float32"): (0.95, 1.1, 1.8, 1.8, 1.05, 1.05),
    ("5000x100", "float32"): (0.2, 0.22, 0.25, 0.25, 0.25, 0.25),
    ("gpt2-small", "bfloat16"): (1.3, 1.4, 1.6, 1.6, 1.3, 1.3),
}
GPU_REGIMES = {"": "cap", ", row": "row", ", anchored, row": "row"}
TARGETS = (
    *[
        Target(name, dtype, f"AMAdamW cpu{variant}", ADAMW_BASELINE, at_most)
        for (name, dtype), ratios in CPU_TARGETS.items()
        for variant, at_most in zip(VARIANTS, ratios, strict=False)
    ],
    *[
        Target(name, "float32", f"AMAdamW {backend}{variant}", ADAMW_BASELINE, regimes[regime])
        for name, regimes in gpu_cases.TARGETS.items()
        for variant, regime in GPU_REGIMES.items()
        if regime in regimes
        for backend in ("cuda", "triton")
    ],
    Target("decoder-300", "float32", "AMAdamW foreach", "AdamW foreach", 3.0),
)

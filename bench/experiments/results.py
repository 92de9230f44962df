"""The results on disk: a row of JSON for each run, and beside it what they were made with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.experiments.cell import Cell
from bench.experiments.data import text_digests
from bench.experiments.grid import Grid
from bench.experiments.rounding import rounded

PACKAGES = ("scikit-learn", "schedulefree", "lion-pytorch")
ROWS = "runs.jsonl"
SETTINGS = "settings.json"
DIGITS = 6  # significant ones of a loss
CURVE_DIGITS = 4


@dataclass
class Run:
    """What was measured of one run.

    Attributes:
        cell: which run it is.
        loss: the task's measure at the end; inf where the run diverged.
        diverged_at: the step whose loss was not finite, where the run ended; None where all
            were finite.
        untrained_loss: the measure of the initial weights.
        curve: mean training loss of each tenth of the steps that were taken; empty where it was
            not kept.
        beta: mean over steps and tensors; None where it is fixed.
        at_cap: share of the parameters whose beta was at its cap, mean over steps; None where it
            was not kept.
        betas: mean of each tensor in each tenth of the steps; empty where it was not kept.
        tensors: labels of the tensors in `betas`.
        optimizer_us: CPU time of optimizer.step(), the median, in microseconds.
        step_us: CPU time of a whole step, the mean, in microseconds.
    """

    cell: Cell
    loss: float
    diverged_at: int | None
    untrained_loss: float
    curve: list[float]
    beta: float | None
    at_cap: float | None = None
    betas: list[list[float]] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    optimizer_us: float = 0.0
    step_us: float = 0.0


def to_json(run: Run) -> str:
    row = asdict(run)
    row = row.pop("cell") | row
    short = {"curve", "betas", "beta", "at_cap", "optimizer_us", "step_us"}
    row = {k: rounded(v, CURVE_DIGITS if k in short else DIGITS) for k, v in row.items()}
    return json.dumps(
        {k: v for k, v in row.items() if v not in (None, [])},
        allow_nan=False,
        separators=(",", ":"),
    )


def from_json(line: str) -> Run:
    row = json.loads(line)
    cell = Cell(**{f.name: row.pop(f.name) for f in fields(Cell)})
    defaults: dict[str, Any] = {"loss": math.inf, "diverged_at": None, "beta": None, "curve": []}
    run = Run(cell, **(defaults | row))
    run.curve = [math.inf if value is None else value for value in run.curve]
    return run


class Results:
    """A folder of results, which runs are added to one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / ROWS
        self.settings = folder / SETTINGS

    def open_for(self, grid: Grid) -> None:
        """Makes the folder ready for runs of a grid, its own earlier ones included.

        Raises:
            ValueError: it holds runs of another grid, or made with other versions or on
                another machine: not to be mixed.
        """
        settings = _settings(grid)
        if self.settings.exists():
            there = json.loads(self.settings.read_text())
            if there != json.loads(json.dumps(settings)):
                different = [k for k in settings if settings[k] != there.get(k)]
                raise ValueError(
                    f"{self.folder} holds runs with other settings ({', '.join(different)}): "
                    "name another folder with --out"
                )
        else:
            self.settings.write_text(json.dumps(settings, indent=1) + "\n")
        if self.rows.exists():
            # Where it was killed, the last line may be half of one.
            content = self.rows.read_bytes()
            self.rows.write_bytes(content[: content.rfind(b"\n") + 1])

    def add(self, run: Run) -> None:
        with self.rows.open("a") as file:
            file.write(to_json(run) + "\n")

    def __iter__(self) -> Iterator[Run]:
        if self.rows.exists():
            with self.rows.open() as file:
                yield from (from_json(line) for line in file if line.endswith("\n"))


def _settings(grid: Grid) -> dict[str, Any]:
    return {
        "environment": environment() | {name: version(name) for name in PACKAGES},
        "texts": text_digests(),
        "seeds": grid.seeds,
        "contestants": {c.name: c.family for c in grid.contestants.values()},
        "tasks": {
            task.name: {
                "group": task.group,
                "measured": task.measured,
                "steps": task.steps,
                "weight_decay": task.weight_decay,
                "lrs": {family: list(lrs) for family, lrs in task.lrs.items()},
            }
            for task in grid.tasks.values()
        },
    }

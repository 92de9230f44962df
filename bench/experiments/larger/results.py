"""The results on disk: a row of JSON for each run, and beside it what they were made with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.experiments.cell import Cell
from bench.experiments.corpus import corpus
from bench.experiments.larger.tasks import LargerTask
from bench.experiments.rounding import rounded
from bench.gpu_check import gpu

ROWS = "runs.jsonl"
SETTINGS = "settings.json"
DIGITS = 6  # significant ones of the two held-out losses
CURVE_DIGITS = 4  # of everything else


@dataclass
class Run:
    """What was measured of one run.

    Attributes:
        cell: which run it is.
        environment: index of what it was made with, in the settings.
        choosing, comparing: the held-out losses at the end; inf where the run diverged.
        training: mean training loss of each part of the run.
        curve: loss of a few examples of the comparing part, at the end of each part of the run.
        optimizer_us: CPU time of the optimizer's step, the median, in microseconds; on a GPU the
            device's time.
        step_us: that of a whole step without evaluation.
        at_cap: of the elements that have a beta, the share whose beta was at its cap, by part of
            the run; empty for AdamW. With Muon, of those that it does not take.
        betas: mean beta of each tensor that has one, by part of the run; kept of one seed.
        tensors: labels of those tensors.
        quantiles: of the betas of each tensor, [parts, tensors, quantiles]; kept where another
            contestant draws from them.
    """

    cell: Cell
    environment: int
    choosing: float
    comparing: float
    training: list[float]
    curve: list[float]
    optimizer_us: float
    step_us: float
    at_cap: list[float] = field(default_factory=list)
    betas: list[list[float]] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    quantiles: list[list[list[float]]] = field(default_factory=list)


def to_json(run: Run) -> str:
    row = asdict(run)
    row = row.pop("cell") | row
    exact = {"choosing", "comparing", "lr"}
    row = {k: rounded(v, DIGITS if k in exact else CURVE_DIGITS) for k, v in row.items()}
    kept = {k: v for k, v in row.items() if v != []}
    return json.dumps(kept, allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> Run:
    row = json.loads(line)
    cell = Cell(**{f.name: row.pop(f.name) for f in fields(Cell)})
    for name in ("choosing", "comparing"):
        row[name] = math.inf if row[name] is None else row[name]
    for name in ("training", "curve"):
        row[name] = [math.inf if value is None else value for value in row.get(name, [])]
    return Run(cell, **row)


class Results:
    """A folder of results, which runs are added to one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / ROWS
        self.settings = folder / SETTINGS

    def open_for(
        self, tasks: Mapping[str, LargerTask], text: Mapping[str, Any] | None = None
    ) -> int:
        """Makes the folder ready for runs of these tasks, and says as which environment.

        Runs of several machines stand side by side; each says which it was made on. `text` says
        what they read, where that is not the corpus as it is here.

        Raises:
            ValueError: it holds runs of other tasks of the same names, or of another text.
        """
        text = {"corpus": corpus().digest()} if text is None else text
        settings: dict[str, Any] = {**text, "tasks": {}, "environments": []}
        if self.settings.exists():
            settings = json.loads(self.settings.read_text())
        if not text.items() <= settings.items():
            raise ValueError(
                f"{self.folder} holds runs on another text: other versions of the packages, or "
                "of Python. Name another folder with --out"
            )
        for task in tasks.values():
            new = {
                "about": task.about,
                "steps": task.steps,
                "lr": task.lr,
                "weight_decay": task.weight_decay,
            }
            if settings["tasks"].setdefault(task.name, new) != new:
                raise ValueError(
                    f"{self.folder} holds runs of another {task.name}: name another folder "
                    "with --out"
                )
        here: dict[str, Any] = environment()
        if gpu.is_available():
            here["gpu"] = gpu.describe()
        if here not in settings["environments"]:
            settings["environments"].append(here)
        unfinished = self.settings.with_suffix(".new")
        unfinished.write_text(json.dumps(settings, indent=1) + "\n")
        unfinished.replace(self.settings)
        if self.rows.exists():
            # Where it was killed, the last line may be half of one.
            os.truncate(self.rows, self.rows.read_bytes().rfind(b"\n") + 1)
        index: int = settings["environments"].index(here)
        return index

    def add(self, run: Run) -> None:
        with self.rows.open("a") as file:
            file.write(to_json(run) + "\n")

    def __iter__(self) -> Iterator[Run]:
        if self.rows.exists():
            with self.rows.open() as file:
                yield from (from_json(line) for line in file if line.endswith("\n"))

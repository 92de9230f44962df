"""The results as the verdicts need them: losses by task, contestant, learning rate and seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.experiments.cell import Cell
from bench.experiments.results import Run

# Below this share of its value at the start, least squares counts as solved: without a floor the
# easiest problem, which some take to rounding errors, would outweigh all the others.
SOLVED = 1e-6

Array = NDArray[np.float64]


class Table:
    """The runs of a grid, of which only whole blocks are used.

    A block is a task at a seed. One that is not finished is left out, so that every number
    of a task is of the same seeds for all contestants.

    Losses are logarithms, so that differences compare tasks whose losses are of different
    sizes. A run that diverged, or ended above where it started, counts as the untrained
    model's loss, and least squares as solved below SOLVED.

    Args:
        runs: the results.
        settings: what was run, as `Results.settings` has it.
    """

    def __init__(self, runs: Iterable[Run], settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.families: dict[str, str] = settings["contestants"]
        self.runs = {run.cell: run for run in runs}
        finished = Counter((cell.task, cell.seed) for cell in self.runs)
        self.seeds: dict[str, list[int]] = {}
        for task in settings["tasks"]:
            size = 2 * sum(len(self.lrs(task, name)) for name in self.families)
            whole = [seed for seed in range(settings["seeds"]) if finished[task, seed] == size]
            if whole:
                self.seeds[task] = whole

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a whole block."""
        return list(self.seeds)

    def group(self, task: str) -> str:
        group: str = self.settings["tasks"][task]["group"]
        return group

    def lrs(self, task: str, contestant: str) -> list[float]:
        lrs: list[float] = self.settings["tasks"][task]["lrs"][self.families[contestant]]
        return lrs

    def cells(self, task: str, contestant: str, warmup: bool) -> list[list[Run]]:
        """The runs, [learning rates][seeds]."""
        return [
            [self.runs[Cell(task, contestant, lr, warmup, seed)] for seed in self.seeds[task]]
            for lr in self.lrs(task, contestant)
        ]

    def log_losses(self, task: str, contestant: str, warmup: bool) -> Array:
        """Logarithms of the losses, [learning rates, seeds]."""
        rows = self.cells(task, contestant, warmup)
        losses = [[min(run.loss, run.untrained_loss) for run in row] for row in rows]
        logs: Array = np.log(np.maximum(losses, SOLVED))
        return logs

    def best(self, task: str, contestant: str, warmup: bool) -> int:
        """Index of the learning rate with the lowest log loss on average over the seeds."""
        return int(self.log_losses(task, contestant, warmup).mean(1).argmin())

    def best_log_loss(self, task: str, contestant: str, warmup: bool) -> Array:
        """Log losses at the best learning rate, [seeds]."""
        best = self.best(task, contestant, warmup)
        logs: Array = self.log_losses(task, contestant, warmup)[best]
        return logs

    def best_runs(self, task: str, contestant: str, warmup: bool) -> list[Run]:
        """The runs at the best learning rate, of each seed."""
        return self.cells(task, contestant, warmup)[self.best(task, contestant, warmup)]

    def at_edge(self, task: str, contestant: str, warmup: bool) -> bool:
        """Whether the best learning rate is the lowest or the highest of the grid."""
        best = self.best(task, contestant, warmup)
        return best in (0, len(self.lrs(task, contestant)) - 1)

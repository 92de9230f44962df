"""The results as verdicts, tables and pictures need them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.experiments.larger.contestants import CONTESTANTS
from bench.experiments.larger.plan import SEARCHED_SEED, Search
from bench.experiments.larger.results import Run
from bench.experiments.larger.tasks import TASKS


class Table:
    """The runs of the tasks that there are, in the contestants' order.

    Args:
        runs: the results.
        settings: what they were made with, as `Results.settings` has it.

    Raises:
        ValueError: there are runs of a contestant that is none of CONTESTANTS.
    """

    def __init__(self, runs: Iterable[Run], settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.runs = {run.cell: run for run in runs}
        unknown = {cell.contestant for cell in self.runs} - set(CONTESTANTS)
        if unknown:
            raise ValueError(f"there are runs of contestants that are not: {sorted(unknown)}")
        names = {cell.task for cell in self.runs}
        self.tasks = [name for name in TASKS if name in names]

    def search(self, task: str, warmup: bool, contestant: str) -> Search:
        return Search.of(self.runs, TASKS[task], CONTESTANTS[contestant], warmup)

    def searched(self, task: str, warmup: bool, contestant: str) -> Run | None:
        """The run of the searched seed at the learning rate that was found, if one was."""
        runs = self.found(task, warmup, contestant)
        return runs.get(SEARCHED_SEED)

    def found(self, task: str, warmup: bool, contestant: str) -> dict[int, Run]:
        """The runs at the learning rate that was found, by seed; none while it is searched."""
        lr = self.search(task, warmup, contestant).best_lr()
        if lr is None:
            return {}
        wanted = (task, contestant, lr, warmup)
        return {
            cell.seed: run
            for cell, run in sorted(self.runs.items(), key=lambda item: item[0].seed)
            if (cell.task, cell.contestant, cell.lr, cell.warmup) == wanted
        }

    def search_runs(self, task: str, warmup: bool, contestant: str) -> list[Run]:
        """All runs of the searched seed."""
        wanted = (task, contestant, warmup, SEARCHED_SEED)
        return [
            run
            for cell, run in self.runs.items()
            if (cell.task, cell.contestant, cell.warmup, cell.seed) == wanted
        ]

    def names(self, task: str, warmup: bool) -> list[str]:
        """The contestants of which there are runs."""
        return [name for name in CONTESTANTS if self.search_runs(task, warmup, name)]

    def finished(self, task: str, warmup: bool) -> list[str]:
        """The contestants whose learning rate has been found."""
        return [name for name in CONTESTANTS if self.found(task, warmup, name)]

    def loss(self, run: Run) -> float:
        """What it is compared by; guessing, where it diverged."""
        return min(run.comparing, math.log(TASKS[run.cell.task].classes))

    def log_losses(self, task: str, warmup: bool, contestant: str) -> dict[int, float]:
        """By seed, at the learning rate that was found."""
        found = self.found(task, warmup, contestant)
        return {seed: math.log(self.loss(run)) for seed, run in found.items()}

    def step_us(self, task: str, runs: Sequence[Run]) -> float:
        """CPU time of a step of these runs, in microseconds: the model's and their optimizer's.

        The model's, which is the same for all, is the median of all runs of the task: the
        machine's speed at the time of a run differs by more than optimizers do.
        """
        model = [
            run.step_us - run.optimizer_us for cell, run in self.runs.items() if cell.task == task
        ]
        return statistics.median(model) + statistics.median(run.optimizer_us for run in runs)

    def conditions(self) -> list[tuple[str, bool]]:
        """The tasks, with warm-up and without, of which there are runs with a learning rate."""
        return [
            (task, warmup)
            for task in self.tasks
            for warmup in (True, False)
            if self.finished(task, warmup)
        ]

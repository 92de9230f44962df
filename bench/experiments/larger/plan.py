"""Which runs there are, and in which order: a search for the learning rate, then more seeds.

A contestant's learning rate is searched on seed 0, a factor of 2 at a time, by the held-out part
that is for choosing: until the best one has been tried on both sides. The other seeds run at the
one that was found. What is next follows from the results alone, so that a search that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.experiments.cell import Cell
from bench.experiments.larger.contestants import CONTESTANTS, Contestant
from bench.experiments.larger.results import Run
from bench.experiments.larger.tasks import TASKS, LargerTask

SEARCHED_SEED = 0
OCTAVES = range(-8, 9)  # beyond which no search goes
Runs = Mapping[Cell, Run]


@dataclass(frozen=True)
class Study:
    """Contestants on a task.

    Attributes:
        task: its name.
        warmup: whether the learning rate is warmed up, over a tenth of the steps.
        contestants: their names.
        seeds: how many; the first is the one that learning rates are searched on.
        octaves: learning rates to be tried on that seed beside those of the search, in octaves
            above the task's.
    """

    task: str
    warmup: bool
    contestants: Sequence[str]
    seeds: int
    octaves: Sequence[int] = ()


def learning_rate(task: LargerTask, octave: int) -> float:
    return float(f"{task.lr * 2.0**octave:.6g}")


@dataclass(frozen=True)
class Search:
    """The search for a contestant's learning rate on a task.

    Attributes:
        losses: by octave above the task's learning rate, of the runs that there are.
    """

    task: LargerTask
    contestant: Contestant
    warmup: bool
    losses: Mapping[int, float]

    @staticmethod
    def of(runs: Runs, task: LargerTask, contestant: Contestant, warmup: bool) -> Search:
        cells = {
            octave: Cell(
                task.name, contestant.name, learning_rate(task, octave), warmup, SEARCHED_SEED
            )
            for octave in OCTAVES
        }
        losses = {octave: runs[cell].choosing for octave, cell in cells.items() if cell in runs}
        return Search(task, contestant, warmup, losses)

    def next_octave(self) -> int | None:
        """What is to be tried next; None where the best has been tried on both sides.

        None, too, where the next would be beyond OCTAVES.
        """
        if not self.losses:
            return self.contestant.start
        best = self.best_octave()
        sides = (best - 1, best + 1) if math.isinf(self.losses[best]) else (best + 1, best - 1)
        missing = (octave for octave in sides if octave not in self.losses and octave in OCTAVES)
        return next(missing, None)

    def best_octave(self) -> int:
        """Where the loss is lowest; the lower learning rate, where it is equal."""
        return min(self.losses, key=lambda octave: (self.losses[octave], octave))

    def best_lr(self) -> float | None:
        """The learning rate that was found; None as long as the search goes on."""
        if self.next_octave() is not None:
            return None
        return learning_rate(self.task, self.best_octave())


def next_cells(runs: Runs, studies: Sequence[Study]) -> Iterator[Cell]:
    """The runs that are missing and can be made now, the first ones first."""
    for study in studies:
        task = TASKS[study.task]
        found = []
        for name in study.contestants:
            search = Search.of(runs, task, CONTESTANTS[name], study.warmup)
            octave = search.next_octave()
            source = CONTESTANTS[name].drawn_from
            if source and not source_run(runs, task, source, study.warmup):
                continue
            if octave is None:
                found.append((name, learning_rate(task, search.best_octave())))
            else:
                lr = learning_rate(task, octave)
                yield Cell(task.name, name, lr, study.warmup, SEARCHED_SEED)
        for octave in study.octaves:
            for name, _ in found:
                lr = learning_rate(task, octave)
                cell = Cell(task.name, name, lr, study.warmup, SEARCHED_SEED)
                if cell not in runs:
                    yield cell
        for seed in range(study.seeds):
            for name, lr in found:
                cell = Cell(task.name, name, lr, study.warmup, seed)
                if cell not in runs:
                    yield cell


def source_run(runs: Runs, task: LargerTask, contestant: str, warmup: bool) -> Run | None:
    """The run of seed 0 at the learning rate that was found; None as long as there is none."""
    lr = Search.of(runs, task, CONTESTANTS[contestant], warmup).best_lr()
    return None if lr is None else runs[Cell(task.name, contestant, lr, warmup, SEARCHED_SEED)]

"""The grid: which runs there are, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.experiments.cell import Cell
from bench.experiments.contestants import BY_ROW, CONTESTANTS, Contestant
from bench.experiments.tasks import TASKS, Task


@dataclass(frozen=True)
class Grid:
    """Every contestant on every task, at each learning rate, without and with warm-up.

    Attributes:
        tasks, contestants: by name.
        seeds: how many; they are 0, 1, 2...
    """

    tasks: Mapping[str, Task]
    contestants: Mapping[str, Contestant]
    seeds: int

    def cells(self) -> list[Cell]:
        """All runs. Seed by seed and task by task: a cut-off leaves whole blocks behind."""
        return [
            Cell(task.name, contestant.name, lr, warmup, seed)
            for seed in range(self.seeds)
            for task in self.tasks.values()
            for warmup in (False, True)
            for contestant in self.contestants.values()
            for lr in task.lrs[contestant.family]
        ]


FULL = Grid(TASKS, CONTESTANTS, seeds=3)

# Betas by row, beside the fixed and the adaptive ones that they would replace.
REPLACED = (
    "AdamW 0.9",
    "AM-AdamW level tensor lambda 0.1",
    "AM-AdamW anchored tensor lambda 0.1",
    "SGD 0.9",
    "AM-SGD level global",
    "AM-SGD anchored global",
)
ROW = Grid(TASKS, {name: CONTESTANTS[name] for name in REPLACED} | BY_ROW, seeds=3)

QUICK_STEPS = 10  # a task's steps are divided by this


def quick_grid() -> Grid:
    """The full grid's tasks and contestants, with fewer steps and learning rates, and one seed."""
    tasks = {
        task.name: replace(
            task,
            steps=task.steps // QUICK_STEPS,
            lrs={family: lrs[1::2] for family, lrs in task.lrs.items()},
        )
        for task in TASKS.values()
    }
    return Grid(tasks, CONTESTANTS, seeds=1)

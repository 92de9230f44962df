"""Trains: one run, and all runs of a grid on several cores."""

from __future__ import annotations

import copy
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
from schedulefree import AdamWScheduleFree
from torch.optim import Optimizer

from adamem_fused import AMSGD, AMAdamW, param_groups
from bench.demo_model import tensor_label
from bench.experiments.cell import Cell, lr_factor
from bench.experiments.contestants import Contestant
from bench.experiments.grid import Grid
from bench.experiments.results import Run
from bench.experiments.tasks import Problem, Task

T = TypeVar("T")

SEGMENTS = 10  # points of a loss curve: means over as many parts of the run
# Loss curves are kept of one seed, and betas by tensor of that seed's runs of two contestants:
# the file of results is to stay small.
DETAILED_SEED = 0
TRACKED = ("AM-AdamW level tensor lambda 0.1", "AM-AdamW anchored tensor lambda 0.1")


@lru_cache(maxsize=2)
def _problem(make: Callable[[int, int], Problem], steps: int, seed: int) -> Problem:
    return make(steps, seed)


def train(task: Task, contestant: Contestant, cell: Cell) -> Run:
    """One run, to its end or to its first loss that is not finite."""
    problem = _problem(task.make, task.steps, cell.seed)
    model = copy.deepcopy(problem.model)
    weight_decay = task.weight_decay if contestant.family == "adam" else 0.0
    optimizer = contestant.make(param_groups(model, weight_decay), lr=cell.lr)
    lr = contestant.lr_scale * cell.lr
    cosine = task.cosine and not isinstance(optimizer, AdamWScheduleFree)

    losses: list[float] = []
    betas: list[list[float]] = []
    at_cap: list[float] = []
    optimizer_seconds: list[float] = []
    diverged_at: int | None = None
    start = time.thread_time()
    _set_training(optimizer, True)
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, task.steps, cell.warmup, cosine)
        optimizer.zero_grad()
        loss = problem.training_loss(model, step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            diverged_at = step
            break
        torch.autograd.backward(loss)
        step_start = time.thread_time()
        optimizer.step()
        optimizer_seconds.append(time.thread_time() - step_start)
        if isinstance(optimizer, (AMAdamW, AMSGD)):
            betas.append(torch.stack(list(optimizer.betas_by_name(model).values())).tolist())
        if isinstance(optimizer, AMAdamW):
            at_cap.append(optimizer.metrics()["at_cap"].item())
    seconds = time.thread_time() - start

    _set_training(optimizer, False)
    final = math.inf if diverged_at is not None else problem.measure(model, losses)
    if diverged_at is None and not math.isfinite(final):
        diverged_at = task.steps
    detailed = cell.seed == DETAILED_SEED
    tracked = detailed and contestant.name in TRACKED and not cell.warmup
    return Run(
        cell,
        loss=final if diverged_at is None else math.inf,
        diverged_at=diverged_at,
        untrained_loss=problem.untrained_loss,
        curve=[statistics.fmean(part) for part in parts(losses)] if detailed else [],
        beta=statistics.fmean(map(statistics.fmean, betas)) if betas else None,
        at_cap=statistics.fmean(at_cap) if at_cap else None,
        betas=_means_by_tensor(betas) if tracked else [],
        tensors=[tensor_label(name) for name, _ in model.named_parameters()] if tracked else [],
        optimizer_us=1e6 * statistics.median(optimizer_seconds) if optimizer_seconds else 0.0,
        step_us=1e6 * seconds / len(losses),
    )


def _set_training(optimizer: Optimizer, training: bool) -> None:
    """Schedule-free keeps one set of weights for gradients and another for evaluation."""
    if isinstance(optimizer, AdamWScheduleFree):
        (optimizer.train if training else optimizer.eval)()


def parts(values: Sequence[T]) -> list[Sequence[T]]:
    """The values in at most SEGMENTS parts of nearly equal length, in order, none empty."""
    count = min(SEGMENTS, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)]
    return [values[a:b] for a, b in pairwise(bounds)]


def _means_by_tensor(betas: list[list[float]]) -> list[list[float]]:
    """[steps][tensors] to [parts][tensors], means over the steps of each part."""
    by_tensor = [
        [statistics.fmean(part) for part in parts(column)] for column in zip(*betas, strict=True)
    ]
    return [list(row) for row in zip(*by_tensor, strict=True)]


# ---- many runs ------------------------------------------------------------------------

_grid: Grid


def _start_worker(grid: Grid) -> None:
    global _grid
    _grid = grid
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _run(cell: Cell) -> Run:
    return train(_grid.tasks[cell.task], _grid.contestants[cell.contestant], cell)


def run_cells(grid: Grid, cells: Iterable[Cell], workers: int) -> Iterator[Run]:
    """The cells' runs, as they finish: each on one thread of one of the worker processes."""
    torch.set_num_threads(1)  # before the fork, which threads of OpenMP would not survive
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_worker, (grid,)) as pool:
        yield from pool.imap_unordered(_run, cells)

"""Trains: one run, and all runs of a plan on several cores."""

from __future__ import annotations

import copy
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from multiprocessing.pool import AsyncResult

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.demo_model import tensor_label
from bench.experiments.grid import Cell
from bench.experiments.larger.contestants import CONTESTANTS, Contestant, Setting
from bench.experiments.larger.muon import Muon
from bench.experiments.larger.plan import SEARCHED_SEED, Study, next_cells, source_run
from bench.experiments.larger.results import Run
from bench.experiments.larger.tasks import TASKS, LargerTask, Problem
from bench.experiments.runner import lr_factor

MAX_NORM = 1.0  # gradients are clipped by their global norm, as everybody trains
PARTS = 20  # points of a curve
LOOK_EVERY = 5  # steps: betas are looked at in so many
QUANTILE_PARTS = 5
QUANTILES = 21


@lru_cache(maxsize=1)
def _problem(make: Callable[[int, int], Problem], steps: int, seed: int) -> Problem:
    return make(steps, seed)


class Betas:
    """The betas of a run, looked at now and then."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.steps: list[int] = []
        self.seen: list[dict[Tensor, Tensor]] = []
        self.at_cap: list[float] = []

    def look(self, step: int) -> None:
        seen, at_cap, elements = {}, 0.0, 0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if "beta" in optimizer.state[param]:
                        beta = optimizer.state[param]["beta"].reshape(-1).clone()
                        cap = (
                            optimizer.momentum if isinstance(optimizer, Muon) else group["betas"][0]
                        )
                        at_cap += (beta > cap - 1e-6).float().mean().item() * param.numel()
                        elements += param.numel()
                        seen[param] = beta
        if seen:
            self.steps.append(step)
            self.seen.append(seen)
            self.at_cap.append(at_cap / elements)

    def _parts(self, count: int, steps: int) -> list[list[int]]:
        """Indices of the looks, by part of the run."""
        parts: list[list[int]] = [[] for _ in range(count)]
        for index, step in enumerate(self.steps):
            parts[step * count // steps].append(index)
        return parts

    def shares_at_cap(self, steps: int) -> list[float]:
        return [
            statistics.fmean(self.at_cap[i] for i in part)
            for part in self._parts(PARTS, steps)
            if part
        ]

    def means(self, params: Sequence[Tensor], steps: int) -> list[list[float]]:
        """[parts, tensors]."""
        return [
            [statistics.fmean(self.seen[i][p].mean().item() for i in part) for p in params]
            for part in self._parts(PARTS, steps)
            if part
        ]

    def quantiles(self, steps: int) -> list[list[list[float]]]:
        """[parts, tensors in the optimizer's order, QUANTILES], evenly spread from 0 to 1."""
        places = torch.linspace(0, 1, QUANTILES)
        return [
            [
                torch.quantile(torch.cat([self.seen[i][param] for i in part]), places).tolist()
                for param in self.seen[0]
            ]
            for part in self._parts(QUANTILE_PARTS, steps)
        ]


def train(
    task: LargerTask,
    contestant: Contestant,
    cell: Cell,
    environment: int = 0,
    quantiles: list[list[list[float]]] | None = None,
) -> Run:
    """One run, to its end or to its first loss that is not finite."""
    problem = _problem(task.make, task.steps, cell.seed)
    model = copy.deepcopy(problem.model)
    params = [param for param in model.parameters() if param.requires_grad]
    setting = Setting(
        model, task.inner, cell.lr, task.weight_decay, task.steps, cell.seed,
        None if quantiles is None else torch.tensor(quantiles),
    )  # fmt: skip
    optimizers = contestant.make(setting)
    betas = Betas(optimizers)
    losses: list[float] = []
    curve: list[float] = []
    seconds: list[float] = []
    optimizer_seconds: list[float] = []
    ends = [task.steps * (part + 1) // PARTS for part in range(PARTS)]
    for step in range(task.steps):
        factor = lr_factor(step, task.steps, cell.warmup, cosine=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cell.lr * factor
        start = time.thread_time()
        loss = problem.training_loss(model, step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer_start = time.thread_time()
        for optimizer in optimizers:
            optimizer.step()
        optimizer_seconds.append(time.thread_time() - optimizer_start)
        for param in params:
            param.grad = None
        seconds.append(time.thread_time() - start)
        if step % LOOK_EVERY == 0:
            betas.look(step)
        if step + 1 in ends:
            curve.append(problem.curve(model))

    finished = len(seconds) == task.steps
    searched = cell.seed == SEARCHED_SEED and bool(betas.seen)
    drawn_from = any(other.drawn_from == contestant.name for other in CONTESTANTS.values())
    named = {
        name: param
        for name, param in model.named_parameters()
        if searched and param in betas.seen[0]
    }
    bounds = [0, *ends]
    return Run(
        cell,
        environment,
        choosing=problem.choosing(model) if finished else math.inf,
        comparing=problem.comparing(model) if finished else math.inf,
        training=[statistics.fmean(losses[a:b]) for a, b in pairwise(bounds) if losses[a:b]],
        curve=curve,
        optimizer_us=1e6 * statistics.median(optimizer_seconds or [0.0]),
        step_us=1e6 * statistics.median(seconds or [0.0]),
        at_cap=betas.shares_at_cap(task.steps),
        betas=betas.means(list(named.values()), task.steps) if searched else [],
        tensors=[tensor_label(name) for name in named],
        quantiles=betas.quantiles(task.steps) if searched and drawn_from and finished else [],
    )


# ---- many runs ------------------------------------------------------------------------


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _train_cell(cell: Cell, environment: int, quantiles: list[list[list[float]]] | None) -> Run:
    return train(TASKS[cell.task], CONTESTANTS[cell.contestant], cell, environment, quantiles)


def run_studies(
    runs: dict[Cell, Run], studies: Sequence[Study], environment: int, workers: int
) -> Iterator[Run]:
    """What is missing, as it finishes: each run on one thread of one of the worker processes.

    `runs` is added to.
    """
    torch.set_num_threads(1)  # before the fork, which threads of OpenMP would not survive
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_worker) as pool:
        pending: dict[Cell, AsyncResult[Run]] = {}
        while True:
            for cell in next_cells(runs, studies):
                if len(pending) == workers:
                    break
                if cell not in pending:
                    source = CONTESTANTS[cell.contestant].drawn_from
                    quantiles = None
                    if source is not None:
                        found = source_run(runs, TASKS[cell.task], source, cell.warmup)
                        assert found is not None  # next_cells waits for it
                        quantiles = found.quantiles
                    pending[cell] = pool.apply_async(_train_cell, (cell, environment, quantiles))
            if not pending:
                return
            done = [cell for cell, result in pending.items() if result.ready()]
            if not done:
                time.sleep(0.2)
            for cell in done:
                runs[cell] = pending.pop(cell).get()
                yield runs[cell]

"""Trains: one run, and all runs of a plan on several cores."""

from __future__ import annotations

import copy
import importlib
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.demo_model import tensor_label
from bench.experiments.cell import Cell, lr_factor
from bench.experiments.larger.contestants import CONTESTANTS, Contestant, Setting
from bench.experiments.larger.muon import Muon
from bench.experiments.larger.plan import SEARCHED_SEED, Study, next_cells, source_run
from bench.experiments.larger.results import Run, from_json, to_json
from bench.experiments.larger.tasks import TASKS, LargerTask, Problem
from bench.gpu_check import gpu

MAX_NORM = 1.0  # gradients are clipped by their global norm, as everybody trains
PARTS = 20  # points of a curve
LOOK_EVERY = 5  # steps: betas are looked at in so many
QUANTILE_PARTS = 5
QUANTILES = 21


@lru_cache(maxsize=1)
def _problem(make: Callable[[int, int], Problem], steps: int, seed: int) -> Problem:
    return make(steps, seed)


class Betas:
    """The betas of a run, looked at now and then. A look waits for no GPU; `read` does.

    Attributes:
        steps: that were looked at.
        seen, mean, at_cap: what has been read of each: the betas, on the CPU; their mean, and the
            share at their cap, in which a beta counts with the elements that it is for.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.steps: list[int] = []
        self.seen: list[dict[Tensor, Tensor]] = []
        self.mean: list[float] = []
        self.at_cap: list[float] = []
        self._unread: list[tuple[dict[Tensor, float], list[int], Tensor]] = []

    def look(self, step: int) -> None:
        caps: dict[Tensor, float] = {}
        betas: list[Tensor] = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if "beta" in optimizer.state[param]:
                        caps[param] = (
                            optimizer.momentum if isinstance(optimizer, Muon) else group["betas"][0]
                        )
                        betas.append(optimizer.state[param]["beta"].reshape(-1))
        if betas:
            self.steps.append(step)
            self._unread.append((caps, list(map(len, betas)), torch.cat(betas)))

    def read(self) -> None:
        for caps, sizes, betas in self._unread:
            seen = dict(zip(caps, torch.split(betas.cpu(), sizes), strict=True))
            total, at_cap, elements = 0.0, 0.0, 0
            for param, beta in seen.items():
                total += beta.mean().item() * param.numel()
                at_cap += (beta > caps[param] - 1e-6).float().mean().item() * param.numel()
                elements += param.numel()
            self.seen.append(seen)
            self.mean.append(total / elements)
            self.at_cap.append(at_cap / elements)
        self._unread.clear()

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


@dataclass
class Progress:
    """How far a run has come, at the end of a part of it.

    Attributes:
        step: steps that are done.
        training: mean training loss of the part.
        curve: the held-out loss, as `Problem.curve` has it.
        beta, at_cap: mean beta, and share of the parameters whose beta was at its cap, when they
            were last looked at; None where beta is fixed.
        seconds: since the run's begin, evaluation included.
    """

    step: int
    training: float
    curve: float
    beta: float | None
    at_cap: float | None
    seconds: float


def _cpu_seconds(start: float, end: float) -> float:
    return end - start


def train(
    task: LargerTask,
    contestant: Contestant,
    cell: Cell,
    environment: int = 0,
    quantiles: list[list[list[float]]] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Run:
    """One run, to its end or to its first loss that is not finite.

    On a GPU losses are read where a part ends, so that no step waits for the one before; a run
    that diverges goes on to there.
    """
    began = time.perf_counter()
    problem = _problem(task.make, task.steps, cell.seed)
    model = copy.deepcopy(problem.model)
    params = [param for param in model.parameters() if param.requires_grad]
    setting = Setting(
        model, task.inner, cell.lr, task.weight_decay, task.steps, cell.seed,
        None if quantiles is None else torch.tensor(quantiles),
    )  # fmt: skip
    optimizers = contestant.make(setting)
    betas = Betas(optimizers)
    on_gpu = params[0].device.type == gpu.device.type
    now: Callable[[], Any] = gpu.mark if on_gpu else time.thread_time
    between = gpu.seconds_between if on_gpu else _cpu_seconds
    moments: list[tuple[Any, Any, Any, Any]] = []
    unread: list[Tensor] = []
    losses: list[float] = []
    curve: list[float] = []
    bounds = [task.steps * part // PARTS for part in range(PARTS + 1)]
    ends = bounds[1:]
    for step in range(task.steps):
        factor = lr_factor(step, task.steps, cell.warmup, cosine=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cell.lr * factor
        start = now()
        loss = problem.training_loss(model, step)
        unread.append(loss.detach())
        if not on_gpu or step + 1 in ends:
            read = torch.stack(unread).tolist()
            losses += read
            unread.clear()
            if not all(map(math.isfinite, read)):
                break
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer_start = now()
        for optimizer in optimizers:
            optimizer.step()
        optimizer_end = now()
        for param in params:
            param.grad = None
        moments.append((start, optimizer_start, optimizer_end, now()))
        if step % LOOK_EVERY == 0:
            betas.look(step)
        if step + 1 in ends:
            curve.append(problem.curve(model))
            betas.read()
            if report is not None:
                report(
                    Progress(
                        step + 1,
                        statistics.fmean(losses[bounds[ends.index(step + 1)] :]),
                        curve[-1],
                        betas.mean[-1] if betas.mean else None,
                        betas.at_cap[-1] if betas.at_cap else None,
                        time.perf_counter() - began,
                    )
                )

    betas.read()
    finished = len(losses) == task.steps and all(map(math.isfinite, losses))
    searched = cell.seed == SEARCHED_SEED and bool(betas.seen)
    drawn_from = any(other.drawn_from == contestant.name for other in CONTESTANTS.values())
    named = {
        name: param
        for name, param in model.named_parameters()
        if searched and param in betas.seen[0]
    }
    return Run(
        cell,
        environment,
        choosing=problem.choosing(model) if finished else math.inf,
        comparing=problem.comparing(model) if finished else math.inf,
        training=[statistics.fmean(losses[a:b]) for a, b in pairwise(bounds) if losses[a:b]],
        curve=curve,
        optimizer_us=1e6 * statistics.median([between(b, c) for _, b, c, _ in moments] or [0.0]),
        step_us=1e6 * statistics.median([between(a, d) for a, _, _, d in moments] or [0.0]),
        at_cap=betas.shares_at_cap(task.steps),
        betas=betas.means(list(named.values()), task.steps) if searched else [],
        tensors=[tensor_label(name) for name in named],
        quantiles=betas.quantiles(task.steps) if searched and drawn_from and finished else [],
    )


# ---- many runs ------------------------------------------------------------------------


def _train_cell(
    connection: Connection,
    cell: Cell,
    environment: int,
    quantiles: list[list[list[float]]] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    task, contestant = TASKS[cell.task], CONTESTANTS[cell.contestant]
    connection.send(train(task, contestant, cell, environment, quantiles))


def run_studies(
    runs: dict[Cell, Run], studies: Sequence[Study], environment: int, workers: int
) -> Iterator[Run]:
    """What is missing, as it finishes: each run on one thread of a process of its own.

    `runs` is added to.

    Raises:
        RuntimeError: a process ended without a result. Its own error is on stderr.
    """
    # Before the fork, which threads of OpenMP would not survive; and so what optimizers import at
    # their first step, which would take every process seconds.
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")
    context = multiprocessing.get_context("fork")
    running: dict[Cell, tuple[ForkProcess, Connection]] = {}
    try:
        while True:
            for cell in next_cells(runs, studies):
                if len(running) == workers:
                    break
                if cell not in running:
                    ours, theirs = context.Pipe(duplex=False)
                    arguments = theirs, cell, environment, _quantiles(runs, cell)
                    process = context.Process(target=_train_cell, args=arguments)
                    process.start()
                    theirs.close()  # so that ours ends when the process does
                    running[cell] = process, ours
            if not running:
                return
            ready = wait([connection for _, connection in running.values()])
            for cell, (process, connection) in list(running.items()):
                if connection in ready:
                    del running[cell]
                    try:
                        run = connection.recv()
                    except EOFError:
                        raise RuntimeError(
                            f"the process of {cell} ended without a result"
                        ) from None
                    process.join()
                    # With the digits that are kept, so that what is drawn from it is the same
                    # after an interruption.
                    runs[cell] = from_json(to_json(run))
                    yield runs[cell]
    finally:
        for process, _ in running.values():
            process.terminate()


def _quantiles(runs: dict[Cell, Run], cell: Cell) -> list[list[list[float]]] | None:
    """Of the betas that a contestant draws from, if it does; next_cells waits for them."""
    source = CONTESTANTS[cell.contestant].drawn_from
    found = source and source_run(runs, TASKS[cell.task], source, cell.warmup)
    return found.quantiles if found else None

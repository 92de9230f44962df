"""python -m bench.experiments low-precision: whether what has few bits trains as float32 does."""

from __future__ import annotations

import copy
import math
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from adamem_fused import AMAdamW, param_groups, storage
from bench.arguments import output_folder
from bench.environment import environment
from bench.experiments import data
from bench.experiments.cell import lr_factor
from bench.experiments.models import ViT
from bench.experiments.runner import parts
from bench.experiments.tasks import Problem, digit_images, new_gpt, text
from bench.kernels.contestants import PEERS, peer_versions
from bench.low_precision.command import QUICK_RESULTS
from bench.low_precision.contestants import (
    BASELINE,
    FORMATS,
    OPTIMIZERS,
    STATES,
    low_share,
    new_optimizer,
)
from bench.low_precision.report import write_report
from bench.low_precision.results import OWN, QUANTILES, RESULTS, SAME_GRADIENTS, Trainings, rounded

CAP = 0.89  # of beta: AMAdamW's default
# Of other packages, whose loss goes into the table of step times where they are installed.
QUANTIZED_PEERS = tuple(peer.name for peer in PEERS if peer.quantized and "cpu" in peer.devices)


@dataclass(frozen=True)
class Task:
    """A model, data and a learning rate.

    Of the tasks of bench.experiments these have the widest matrices, made wider yet: a row is 64
    elements, so that its memory may be int8.

    Attributes:
        like: the task there whose best learning rate without warm-up, for AdamW with a beta of
            0.9 and for AMAdamW alike, is this one's.
        lr: of all optimizers.
    """

    name: str
    like: str
    steps: int
    lr: float
    weight_decay: float
    make: Callable[[int, int], Problem]


TASKS = {
    task.name: task
    for task in (
        Task(
            "gpt-python",
            "gpt-large-python",
            steps=600,
            lr=3e-3,
            weight_decay=0.1,
            make=partial(text, data.python_source, partial(new_gpt, 64, 4, 3)),
        ),
        Task(
            "vit-digits",
            "vit-digits",
            steps=500,
            lr=1e-2,
            weight_decay=0.05,
            make=partial(digit_images, partial(ViT, 64, 4, 2)),
        ),
    )
}
SEEDS = 3
QUICK_STEPS, QUICK_SEEDS = 10, 2


@dataclass(frozen=True)
class Cell:
    """A run. `optimizer` may be a peer's name, and `stored` SAME_GRADIENTS."""

    task: str
    optimizer: str
    stored: str
    seed: int


def cells(tasks: Mapping[str, Task], seeds: int) -> list[Cell]:
    """All runs, those that take longest first."""
    adaptive = [name for name in OPTIMIZERS if name.startswith("AMAdamW")]
    return [
        Cell(task, optimizer, stored, seed)
        for task in tasks
        for optimizer, formats in (
            *((name, [SAME_GRADIENTS]) for name in adaptive),
            *((name, list(FORMATS)) for name in OPTIMIZERS),
            *((name, [OWN]) for name in installed_peers()),
        )
        for stored in formats
        for seed in range(seeds)
    ]


def installed_peers() -> list[str]:
    device = torch.device("cpu")
    return [p.name for p in PEERS if p.name in QUANTIZED_PEERS and p.missing(device) is None]


# ---- a run ----------------------------------------------------------------------------


class Betas:
    """The betas of an optimizer's larger tensors, those whose memories may be in few bits."""

    def __init__(self, optimizer: AMAdamW) -> None:
        self.optimizer = optimizer
        self.steps: list[Tensor] = []

    def read(self) -> None:
        state = self.optimizer.state
        own = [state[p]["beta"].flatten() for p in state if p.numel() >= storage.LEAST_NUMEL]
        self.steps.append(torch.cat(own))

    def summary(self) -> dict[str, Any]:
        """Quantiles, and the share at the cap, over all steps; quantiles of each tenth of them."""
        levels = torch.tensor(QUANTILES)
        everything = torch.cat(self.steps)
        return {
            "quantiles": everything.quantile(levels).tolist(),
            "at_cap": (everything >= torch.tensor(CAP)).float().mean().item(),
            "course": [
                torch.cat(list(part)).quantile(levels).tolist() for part in parts(self.steps)
            ],
        }

    def distance(self, other: Betas) -> float:
        """The mean distance to another optimizer's betas at the same steps."""
        return (torch.cat(self.steps) - torch.cat(other.steps)).abs().mean().item()


@lru_cache(maxsize=2)
def _problem(make: Callable[[int, int], Problem], steps: int, seed: int) -> Problem:
    return make(steps, seed)


def _with_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that takes its inputs in the dtype of its parameters."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = next(module.parameters()).dtype
        return tuple(x.to(own) if x.is_floating_point() else x for x in inputs)

    model = copy.deepcopy(model).to(dtype)
    model.register_forward_pre_hook(cast)
    return model


def _make(cell: Cell, task: Task, stored: str, model: nn.Module) -> Optimizer:
    groups = param_groups(model, task.weight_decay)
    if cell.optimizer in OPTIMIZERS:
        return new_optimizer(cell.optimizer, stored, groups, task.lr, cell.seed)
    (peer,) = (peer for peer in PEERS if peer.name == cell.optimizer)
    return peer.make(groups, lr=task.lr)


def _set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def train(task: Task, cell: Cell) -> dict[str, Any]:
    """One run, as the results have it."""
    problem = _problem(task.make, task.steps, cell.seed)
    is_shadowed = cell.stored == SAME_GRADIENTS
    stored = BASELINE if is_shadowed else cell.stored
    dtype = FORMATS[stored].params if stored in FORMATS else torch.float32
    model = _with_dtype(problem.model, dtype)
    optimizer = _make(cell, task, stored, model)
    shadows = {
        name: Shadow(model, partial(_make, cell, task, name))
        for name in (STATES[1:] if is_shadowed else ())
    }
    betas = Betas(optimizer) if isinstance(optimizer, AMAdamW) else None

    losses: list[float] = []
    for step in range(task.steps):
        lr = task.lr * lr_factor(step, task.steps, warmup=False, cosine=True)
        _set_lr(optimizer, lr)
        optimizer.zero_grad()
        loss = problem.training_loss(model, step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        torch.autograd.backward(loss)
        for shadow in shadows.values():
            shadow.step(model, lr)
        optimizer.step()
        if betas is not None:
            betas.read()

    final = problem.measure(_with_dtype(model, torch.float32), losses)
    found: dict[str, Any] = {
        "task": cell.task,
        "optimizer": cell.optimizer,
        "stored": cell.stored,
        "seed": cell.seed,
        "loss": final,
        "curve": [statistics.fmean(part) for part in parts(losses)],
    }
    if betas is not None:
        found["betas"] = betas.summary()
    if betas is not None and is_shadowed:
        own = {BASELINE: {**betas.summary(), "distance": 0.0}}
        for name, shadow in shadows.items():
            own[name] = {**shadow.betas.summary(), "distance": shadow.betas.distance(betas)}
        found["betas"] = own
    return found


class Shadow:
    """An optimizer whose parameters and gradients are another's at each step."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> None:
        self.model = copy.deepcopy(model)
        optimizer = make(self.model)
        assert isinstance(optimizer, AMAdamW)
        self.optimizer = optimizer
        self.betas = Betas(optimizer)

    @torch.no_grad()
    def step(self, model: nn.Module, lr: float) -> None:
        for own, param in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(param)
            own.grad = param.grad
        _set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.betas.read()


# ---- all of them ----------------------------------------------------------------------

_tasks: Mapping[str, Task]


def _start_worker(tasks: Mapping[str, Task]) -> None:
    global _tasks
    _tasks = tasks
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _run(cell: Cell) -> dict[str, Any]:
    return train(_tasks[cell.task], cell)


def run_cells(
    tasks: Mapping[str, Task], todo: list[Cell], workers: int
) -> Iterator[dict[str, Any]]:
    """The runs, in their order: each on one thread of one of the worker processes."""
    torch.set_num_threads(1)  # before the fork, which threads of OpenMP would not survive
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_worker, (tasks,)) as pool:
        yield from pool.imap(_run, todo)


def run(quick: bool, workers: int, folder: Path | None) -> int:
    """Trains, and writes the results, the report and its pictures."""
    folder = folder or output_folder(str(QUICK_RESULTS if quick else RESULTS))
    tasks, seeds = TASKS, SEEDS
    if quick:
        tasks = {name: replace(task, steps=QUICK_STEPS) for name, task in TASKS.items()}
        seeds = QUICK_SEEDS
    todo = cells(tasks, seeds)
    runs = list(tqdm(run_cells(tasks, todo, workers), total=len(todo), unit="run"))
    found = Trainings(
        {
            "environment": environment() | peer_versions(),
            "texts": data.text_digests(),
            "seeds": seeds,
            "tasks": {name: _facts(task) for name, task in tasks.items()},
            "runs": [rounded(found) for found in runs],
        }
    )
    written = [found.write(folder), *write_report(found, folder)]
    print("Wrote " + ", ".join(map(str, written)))
    return 0


def _facts(task: Task) -> dict[str, Any]:
    model = _problem(task.make, 1, 0).model
    shapes = [tuple(param.shape) for param in model.parameters()]
    return {
        "like": task.like,
        "steps": task.steps,
        "lr": task.lr,
        "weight_decay": task.weight_decay,
        "parameters": sum(map(math.prod, shapes)),
        "low_share": low_share(shapes),
    }

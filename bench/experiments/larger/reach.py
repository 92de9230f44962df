"""How much of a gradient reaches momentum: why rows lose where large gradients are rare.

With a fixed beta every gradient arrives whole, over the steps that follow it. A beta of Adaptive
Memory's falls when a gradient is much smaller than what is remembered, and then the rest of what is
remembered never arrives. What does is measured here at weights that stand still.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress, starmap
from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.experiments.cell import lr_factor
from bench.experiments.formatting import markdown
from bench.experiments.larger.contestants import (
    ADAMW,
    CONTESTANTS,
    GATED,
    LEVEL_TENSOR,
    Setting,
)
from bench.experiments.larger.tasks import TASKS
from bench.experiments.larger.training import MAX_NORM
from bench.experiments.rounding import rounded

ROWS = "reach.json"
PICTURE = "reach.png"
COMPARED = {
    ADAMW.name: "#000000",
    LEVEL_TENSOR.name: "#0072B2",
    "AM-AdamW level row, cap 0.95": "#D55E00",
    GATED.name: "#56B4E9",
}
# Parts of models, by how the names of their parameters begin.
PARTS = {
    "gpt-bpe": {"embedding": "embedding.", "layers": "blocks.", "head": "head."},
    "logistic-fashion": {"the ten classes": "1."},
}
TRAINED_FOR = 300  # steps of AdamW, before the weights stand still
FORGOTTEN = 50  # steps: the optimizers begin without momentum
SUMMED = 400  # steps
STILL = 1e-12  # the learning rate: nothing that float32 could add to a weight
QUANTILES = 21
WHAT = f"""
AdamW trains for {TRAINED_FOR} steps at the task's learning rate, seed 0, of which a tenth warm it
up. Then the weights stand still, and the gradients of the next {FORGOTTEN + SUMMED} batches,
clipped, go to several new optimizers alike (at a learning rate of {STILL:g}, without weight decay).
Of each row of a matrix g is the sum of its gradients over the last {SUMMED}, and d that of its
momentum, exp_avg. The share that arrives is <d, g> / |g|^2: 1 with a fixed beta, but for the first
and last few steps. Where d points elsewhere than g: cosine. Rows that had no gradient are not
counted. Some shares lie outside of the picture.
"""


@dataclass(frozen=True)
class Reach:
    """What reached the steps of some rows.

    Attributes:
        task, part, contestant: of which they are.
        rows: how many.
        shares: quantiles of the share that arrives, evenly spread from 0 to 1.
        cosines: of the cosine between momentum and gradients, summed.
    """

    task: str
    part: str
    contestant: str
    rows: int
    shares: list[float]
    cosines: list[float]


class Follower:
    """An optimizer that is given gradients while its weights stand still.

    Attributes:
        momentum: the sum of its momentum over the steps after the first FORGOTTEN, by parameter.
    """

    def __init__(self, contestant: str, model: nn.Module, inner: str) -> None:
        own = copy.deepcopy(model)
        self.params = list(own.parameters())
        setting = Setting(own, inner, STILL, 0.0, FORGOTTEN + SUMMED, 0)
        (self.optimizer,) = CONTESTANTS[contestant].make(setting)
        self.momentum = [torch.zeros_like(param) for param in self.params]
        self.steps = 0

    def step(self, gradients: Sequence[Tensor]) -> None:
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        self.optimizer.step()
        self.steps += 1
        if self.steps > FORGOTTEN:
            for total, param in zip(self.momentum, self.params, strict=True):
                total += self.optimizer.state[param]["exp_avg"]


def arrived(momentum: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Share and cosine of each row of two matrices of sums, [rows with a gradient] each."""
    there = gradients.square().sum(1) > 0
    d, g = momentum[there], gradients[there]
    along, norm = (d * g).sum(1), g.norm(dim=1)
    return along / norm.square(), along / (norm * d.norm(dim=1)).clamp_min(1e-30)


def measure(task_name: str) -> list[Reach]:
    """What arrives, by part of the task's model and contestant."""
    task = TASKS[task_name]
    problem = task.make(TRAINED_FOR + FORGOTTEN + SUMMED, 0)
    model = problem.model
    named = dict(model.named_parameters())
    setting = Setting(model, task.inner, task.lr, task.weight_decay, TRAINED_FOR, 0)
    (optimizer,) = ADAMW.make(setting)

    def gradients(step: int) -> list[Tensor]:
        model.zero_grad()
        torch.autograd.backward(problem.training_loss(model, step))
        nn.utils.clip_grad_norm_(named.values(), MAX_NORM)
        return [cast(Tensor, param.grad) for param in named.values()]

    for step in range(TRAINED_FOR):
        for group in optimizer.param_groups:
            group["lr"] = task.lr * lr_factor(step, TRAINED_FOR, warmup=True, cosine=False)
        gradients(step)
        optimizer.step()
    followers = {name: Follower(name, model, task.inner) for name in COMPARED}
    sums = [torch.zeros_like(param) for param in named.values()]
    for step in range(FORGOTTEN + SUMMED):
        of_step = gradients(TRAINED_FOR + step)
        for follower in followers.values():
            follower.step(of_step)
        if step >= FORGOTTEN:
            for total, gradient in zip(sums, of_step, strict=True):
                total += gradient
    which = {
        part: [name.startswith(start) and param.dim() == 2 for name, param in named.items()]
        for part, start in PARTS[task_name].items()
    }
    return [
        _reach(task_name, part, contestant, follower.momentum, sums, which[part])
        for part in which
        for contestant, follower in followers.items()
    ]


def _reach(
    task: str,
    part: str,
    contestant: str,
    momentum: Sequence[Tensor],
    gradients: Sequence[Tensor],
    which: Sequence[bool],
) -> Reach:
    """Of the parameters of which `which` is true."""
    matrices = zip(compress(momentum, which), compress(gradients, which), strict=True)
    shares, cosines = map(torch.cat, zip(*starmap(arrived, matrices), strict=True))
    places = torch.linspace(0, 1, QUANTILES)
    of_shares, of_cosines = (torch.quantile(x, places).tolist() for x in (shares, cosines))
    return Reach(task, part, contestant, len(shares), of_shares, of_cosines)


def write(found: Sequence[Reach], folder: Path) -> None:
    rows = [{k: rounded(v, 4) for k, v in asdict(reach).items()} for reach in found]
    unfinished = (folder / ROWS).with_suffix(".new")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.replace(folder / ROWS)


def read(folder: Path) -> list[Reach]:
    """What was measured; nothing where nothing was."""
    path = folder / ROWS
    lines = path.read_text().splitlines() if path.exists() else []
    return [Reach(**json.loads(line)) for line in lines]


def picture(found: Sequence[Reach]) -> Figure:
    """For each part the rows by the share that arrives."""
    panels = list(dict.fromkeys((reach.task, reach.part) for reach in found))
    figure = Figure(figsize=(3.4 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for reach in found:
            if (reach.task, reach.part) == panel:
                places = [i / (len(reach.shares) - 1) for i in range(len(reach.shares))]
                colour = COMPARED[reach.contestant]
                ax.plot(reach.shares, places, color=colour, label=reach.contestant)
        ax.set_title(": ".join(panel), loc="left", fontsize=10)
        ax.set_xlim(-0.6, 1.2)
        ax.grid(alpha=0.25)
        ax.set_xlabel("share of the gradients that arrives")
    axes[0].set_ylabel("rows with less")
    axes[0].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    return figure


def section(found: Sequence[Reach], folder: Path) -> list[str]:
    """The report's, and its picture; nothing where nothing was measured."""
    if not found:
        return []
    picture(found).savefig(folder / PICTURE, dpi=90, metadata={"Software": None})
    median, low, high = (QUANTILES - 1) // 2, (QUANTILES - 1) // 4, 3 * (QUANTILES - 1) // 4
    rows = [
        [
            f"{reach.task}: {reach.part}",
            reach.contestant,
            f"{reach.rows:,}",
            f"{reach.shares[median]:.2f} ({reach.shares[low]:.2f} to {reach.shares[high]:.2f})",
            f"{reach.cosines[median]:.2f} ({reach.cosines[low]:.2f} to {reach.cosines[high]:.2f})",
        ]
        for reach in found
    ]
    headers = ["", "optimizer", "rows", "share that arrives, median (quartiles)", "cosine"]
    return [
        "## How much of a gradient arrives",
        WHAT.strip(),
        markdown(rows, headers),
        f"![Share of the gradients that arrives, by row]({PICTURE})",
    ]

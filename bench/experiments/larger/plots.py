"""The pictures of the larger trainings' report: a panel for each task, or two."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.experiments.larger.contestants import (
    ADAMW,
    CONTESTANTS,
    LEVEL_ROW,
    LEVEL_TENSOR,
    PLAIN,
)
from bench.experiments.larger.results import Run
from bench.experiments.larger.table import Table
from bench.experiments.larger.tasks import TASKS
from bench.experiments.larger.training import PARTS
from bench.experiments.larger.verdicts import GATED, LAYERS
from bench.experiments.table import Array

# Okabe and Ito's colours, which colour-blind readers can tell apart.
SHOWN = {
    ADAMW.name: "#000000",
    "AdamW 0.8, 0.95": "#999999",
    LEVEL_TENSOR.name: "#0072B2",
    LEVEL_ROW.name: "#D55E00",
    LAYERS: "#E69F00",
    GATED: "#56B4E9",
    "Muon + AdamW 0.9": "#009E73",
    "AM-Muon row + AM-AdamW level row": "#CC79A7",
}
WITH_BETA = {
    LEVEL_TENSOR.name: "#0072B2",
    "AM-AdamW level global": "#CC79A7",
    LEVEL_ROW.name: "#D55E00",
    LAYERS: "#E69F00",
    GATED: "#56B4E9",
    "AM-AdamW anchored tensor": "#999999",
    "AM-AdamW anchored row": "#000000",
}
BY_LAYER = (LEVEL_TENSOR.name, LEVEL_ROW.name, LAYERS, GATED)
PLACES = (np.arange(PARTS) + 1) / PARTS
HIGHEST_CAP = 0.95
WIDTH = 5.2  # inches of a panel
COLUMNS = 3

Condition = tuple[str, bool]


def title(condition: Condition) -> str:
    task, warmup = condition
    return f"{task}, {'with' if warmup else 'without'} warm-up"


def _panels(
    conditions: Sequence[Condition], draw: Callable[[Axes, Condition], None], legend: str
) -> Figure:
    """A panel for each condition, with one legend above them all."""
    columns = min(COLUMNS, len(conditions))
    rows = math.ceil(len(conditions) / columns)
    figure = Figure(figsize=(WIDTH * columns, 3.6 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    labels: dict[str, Artist] = {}
    for ax in axes[len(conditions) :]:
        ax.set_axis_off()
    for ax, condition in zip(axes, conditions, strict=False):
        draw(ax, condition)
        ax.set_title(title(condition), loc="left", fontsize=10)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        handles, names = ax.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside upper left",
        ncols=3 if columns > 1 else 2,
        frameon=False,
        title=textwrap.fill(legend, 60 * columns),
        alignment="left",
    )
    return figure


def _mean_curve(runs: Sequence[Run]) -> Array:
    curve: Array = np.mean([run.curve for run in runs], axis=0)
    return curve


def _whole(table: Table, condition: Condition, name: str) -> list[Run]:
    """The runs at the learning rate that was found, of which none diverged."""
    runs = list(table.found(*condition, name).values())
    return runs if all(len(run.curve) == PARTS for run in runs) else []


def loss_curves(table: Table, time: bool) -> Figure:
    """Held-out loss over the steps, or over the CPU time that they took."""

    def draw(ax: Axes, condition: Condition) -> None:
        lowest, highest = math.inf, 0.0
        for name, colour in SHOWN.items():
            if time and CONTESTANTS[name] in PLAIN:
                continue
            if runs := _whole(table, condition, name):
                curve = _mean_curve(runs)
                steps = PLACES * table.settings["tasks"][condition[0]]["steps"]
                seconds = 1e-6 * table.step_us(condition[0], runs)
                ax.plot(steps * (seconds if time else 1), curve, color=colour, label=name)
                lowest, highest = min(lowest, curve.min()), max(highest, curve[PARTS // 5])
        if lowest < highest:
            ax.set_ylim(lowest - 0.02 * (highest - lowest), highest)
        ax.set_xlabel("seconds of CPU time, evaluation not counted" if time else "step")
        ax.set_ylabel("held-out loss")

    legend = "Held-out loss, each at the learning rate that was found for it, mean over its seeds"
    return _panels(table.conditions(), draw, legend)


def loss_by_lr(table: Table) -> Figure:
    """Loss at the end at every learning rate that was tried."""

    def draw(ax: Axes, condition: Condition) -> None:
        for name, colour in SHOWN.items():
            runs = sorted(table.search_runs(*condition, name), key=lambda run: run.cell.lr)
            if runs:
                lrs, losses = [run.cell.lr for run in runs], [table.loss(run) for run in runs]
                ax.plot(lrs, losses, marker=".", color=colour, label=name)
        tried = sorted(
            {run.cell.lr for name in SHOWN for run in table.search_runs(*condition, name)}
        )
        ax.set_xscale("log")
        ax.set_xticks(tried, [f"{lr:g}" for lr in tried])
        ax.minorticks_off()
        ax.set_xlabel("learning rate")
        ax.set_ylabel("held-out loss at the end")

    return _panels(
        table.conditions(), draw, "Loss by learning rate, on the part for comparing, seed 0"
    )


def steps_needed(table: Table, condition: Condition, name: str) -> float | None:
    """The share of the run after which a loss is as low as AdamW 0.9's at its end.

    Curves are means over the seeds. None where it never is, or where either is not there.
    """
    ours, theirs = (_whole(table, condition, n) for n in (name, ADAMW.name))
    if not ours or not theirs:
        return None
    goal, curve = _mean_curve(theirs)[-1], _mean_curve(ours)
    below = np.nonzero(curve <= goal)[0]
    if not len(below):
        return None
    first = int(below[0])
    if first == 0:
        return float(PLACES[0])
    above, under = curve[first - 1], curve[first]
    part = (above - goal) / (above - under) if above > under else 1.0
    return float(PLACES[first - 1] + part * (PLACES[first] - PLACES[first - 1]))


def steps_to_adamw(table: Table) -> Figure:
    """Bars of the share of the steps that each needs to AdamW 0.9's final loss."""

    def draw(ax: Axes, condition: Condition) -> None:
        needed = {name: steps_needed(table, condition, name) for name in SHOWN}
        shown = {name: share for name, share in needed.items() if share is not None}
        places = range(len(shown))
        ax.barh(places, list(shown.values()), color=[SHOWN[name] for name in shown])
        for place, share in zip(places, shown.values(), strict=True):
            ax.text(share + 0.01, place, f"{share:.0%}", va="center", fontsize=8)
        ax.set_yticks(places, list(shown), fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        ax.set_xlabel(f"steps to {ADAMW.name}'s final loss")

    return _panels(table.conditions(), draw, "Who is not named does not reach it")


def at_cap(table: Table) -> Figure:
    """The share of the parameters whose beta is at its cap, over training."""

    def draw(ax: Axes, condition: Condition) -> None:
        for name, colour in WITH_BETA.items():
            if runs := _whole(table, condition, name):
                shares = np.mean([run.at_cap for run in runs], axis=0)
                places = (np.arange(len(shares)) + 1) / len(shares)
                ax.plot(places, shares, color=colour, label=name)
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        ax.set_xlabel("share of the run")
        ax.set_ylabel("parameters at the cap")

    return _panels(table.conditions(), draw, "Share of the parameters whose beta is at its cap")


def beta_by_layer(table: Table, condition: Condition) -> Figure | None:
    """Beta of each tensor over the run, seed 0."""
    runs = [table.searched(*condition, name) for name in BY_LAYER]
    shown = [run for run in runs if run is not None and run.betas]
    if not shown:
        return None
    height = 0.19 * len(shown[0].tensors) + 1.2
    figure = Figure(figsize=(4.6 * len(shown), height), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, run in zip(axes, shown, strict=True):
        image = ax.imshow(
            np.array(run.betas).T,
            aspect="auto",
            interpolation="nearest",
            extent=(0, 1, len(run.tensors) - 0.5, -0.5),
            vmin=0.0,
            vmax=HIGHEST_CAP,
            cmap="cividis",
        )
        words = f"{run.cell.contestant}, lr {run.cell.lr:g}"
        ax.set_title(textwrap.fill(words, 34), loc="left", fontsize=9)
        ax.set_xlabel("share of the run")
    axes[0].set_yticks(range(len(shown[0].tensors)), shown[0].tensors, fontsize=7)
    figure.colorbar(image, ax=axes, label="beta (of rows: the mean)", pad=0.01)
    figure.suptitle(title(condition), x=0.01, ha="left", fontsize=10)
    return figure


def write_pictures(table: Table, folder: Path) -> dict[str, str]:
    """Draws all of them; file names and what each shows."""
    pictures: dict[str, tuple[Figure | None, str]] = {
        "loss-by-step.png": (loss_curves(table, time=False), "Held-out loss by step"),
        "loss-by-time.png": (loss_curves(table, time=True), "Held-out loss by CPU time"),
        "loss-by-lr.png": (loss_by_lr(table), "Loss by learning rate"),
        "steps.png": (steps_to_adamw(table), "Steps to AdamW's final loss"),
        "at-cap.png": (at_cap(table), "Share of the parameters at the cap, over training"),
    }
    networks = [condition for condition in table.conditions() if not TASKS[condition[0]].convex]
    for task, warmup in networks:
        name = f"beta-{task}{'' if warmup else '-without-warmup'}.png"
        figure = beta_by_layer(table, (task, warmup))
        pictures[name] = (figure, f"Beta by tensor and time, {title((task, warmup))}")
    written = {name: (figure, what) for name, (figure, what) in pictures.items() if figure}
    for name, (figure, _) in written.items():
        # No date or version in the file: the same results give the same bytes.
        figure.savefig(folder / name, dpi=90, metadata={"Software": None})
    return {name: what for name, (_, what) in written.items()}

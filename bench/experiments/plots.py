"""The report's pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.experiments.runner import TRACKED
from bench.experiments.table import Table
from bench.experiments.verdicts import BASELINES, Interval, interval, log_ratio, tasks_of_kind

COLUMNS = 4
DEEP = ("gpt2", "gpt-large-python", "vit-digits", "resnet-digits")  # drawn by tensor
# Okabe and Ito's colours, which colour-blind readers can tell apart.
SHOWN = {
    "adam": {
        "AdamW 0.9": "#000000",
        "AdamW 0.6": "#999999",
        "AM-AdamW level tensor lambda 0.1": "#0072B2",
        "AM-AdamW anchored tensor lambda 0.1": "#D55E00",
        "schedule-free AdamW": "#009E73",
        "Lion": "#CC79A7",
    },
    "sgd": {
        "SGD 0": "#999999",
        "SGD 0.9": "#000000",
        "AM-SGD level global": "#0072B2",
        "AM-SGD anchored global": "#D55E00",
    },
}


def _shown(table: Table, family: str) -> dict[str, str]:
    """Colours of those that are drawn in detail."""
    return {name: colour for name, colour in SHOWN[family].items() if name in table.families}


def _log_losses(ax: Axes) -> None:
    """A logarithmic axis, whose labels are plain numbers where they stay short."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 1000:
        ax.yaxis.set_major_formatter("{x:g}")
    if high / low < 10:
        ax.yaxis.set_minor_formatter("{x:.3g}")
        ax.tick_params(axis="y", which="minor", labelsize=7)


def _by_task(table: Table, draw: Callable[[Axes, str], None], title: str) -> Figure:
    """A panel for each task, with one legend above all of them."""
    rows = math.ceil(len(table.tasks) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.1 * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for ax in axes[len(table.tasks) :]:
        ax.set_axis_off()
    for ax, task in zip(axes, table.tasks, strict=False):
        draw(ax, task)
        count = len(table.seeds[task])
        ax.set_title(f"{task}, {count} seed{'s' if count > 1 else ''}", loc="left", fontsize=10)
        ax.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, title=title)
    return figure


def loss_by_lr(table: Table, family: str) -> Figure:
    """Loss at the end by learning rate, means and ranges over the seeds."""

    def draw(ax: Axes, task: str) -> None:
        for name, colour in _shown(table, family).items():
            for warmup, style in ((False, "-"), (True, ":")):
                losses = np.exp(table.log_losses(task, name, warmup))
                lrs = table.lrs(task, name)
                label = None if warmup else name
                ax.plot(lrs, losses.mean(1), style, marker=".", color=colour, label=label)
                if not warmup:
                    ax.fill_between(lrs, losses.min(1), losses.max(1), color=colour, alpha=0.15)
        ax.set_xscale("log")
        _log_losses(ax)
        ax.set_xlabel("learning rate")

    return _by_task(
        table,
        draw,
        "Loss at the end by learning rate: without warm-up (solid; band: range over the seeds) "
        "and with it (dotted)",
    )


def loss_curves(table: Table, family: str) -> Figure:
    """Training loss over the run at each one's best learning rate, of the first seed."""

    def draw(ax: Axes, task: str) -> None:
        for name, colour in _shown(table, family).items():
            run = table.best_runs(task, name, False)[0]
            places = (np.arange(len(run.curve)) + 0.5) / max(len(run.curve), 1)
            ax.plot(places, run.curve, marker=".", color=colour, label=name)
        _log_losses(ax)
        ax.set_xlabel("share of the run")

    return _by_task(
        table,
        draw,
        "Training loss, each at its best learning rate without warm-up; seed 0, means of a tenth "
        "of the steps",
    )


def beta_by_layer(table: Table, tasks: Sequence[str]) -> Figure:
    """Beta of each tensor over the run, at the best learning rate without warm-up."""
    runs = [[table.best_runs(task, name, False)[0] for name in TRACKED] for task in tasks]
    heights = [max(len(run.tensors) for run in row) for row in runs]
    figure = Figure(figsize=(14, 0.21 * sum(heights) + 1.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, height_ratios=heights)
    for row, (task, pair) in enumerate(zip(tasks, runs, strict=True)):
        for ax, name, run in zip(axes[row], TRACKED, pair, strict=True):
            image = ax.imshow(
                np.array(run.betas, dtype=float).T,
                aspect="auto",
                interpolation="nearest",
                extent=(0, 1, len(run.tensors) - 0.5, -0.5),
                vmin=0.0,
                vmax=0.9,
                cmap="cividis",
            )
            ax.set_yticks(range(len(run.tensors)), run.tensors, fontsize=7)
            ax.set_title(f"{task}: {name}, lr {run.cell.lr:g}", loc="left", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("share of the run")
    figure.colorbar(image, ax=axes, label="beta", aspect=60, pad=0.01)
    return figure


def ratios(table: Table, baseline: str) -> Figure:
    """Loss ratios to a baseline, each at its best learning rate: tasks, mean and interval."""
    family = table.families[baseline]
    names = [name for name in table.families if table.families[name] == family][::-1]
    tasks = tasks_of_kind(table, "learning")
    figure = Figure(figsize=(13, 0.32 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, sharex=True)
    for ax, warmup in zip(axes, (False, True), strict=True):
        for place, name in enumerate(names):
            values = [log_ratio(table, task, name, baseline, warmup) for task in tasks]
            _draw_ratio(ax, place, values, interval(values))
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:.2g}")
        ax.xaxis.set_minor_formatter("{x:.2g}")
        ax.tick_params(axis="x", which="minor", labelsize=7)
        ax.grid(alpha=0.25, axis="x", which="both")
        ax.set_title(f"{'With' if warmup else 'Without'} warm-up", loc="left")
        ax.set_xlabel(f"loss / loss of {baseline}, learning tasks (below 1: better)")
    axes[0].set_yticks(range(len(names)), names)
    return figure


def _draw_ratio(ax: Axes, place: int, values: Sequence[float], mean: Interval) -> None:
    ax.plot(np.exp(values), [place] * len(values), ".", color="#999999", markersize=5)
    if np.isfinite([mean.low, mean.high]).all():
        ax.plot(np.exp([mean.low, mean.high]), [place] * 2, color="#0072B2", linewidth=2)
    ax.plot([np.exp(mean.mean)], [place], "o", color="#0072B2")


def write_pictures(table: Table, folder: Path) -> dict[str, str]:
    """Draws all of them; file names and what each shows."""
    pictures: dict[str, tuple[Figure, str]] = {}
    families = [family for family in SHOWN if family in table.families.values()]
    for family in families:
        title = {"adam": "the Adam family", "sgd": "the SGD family"}[family]
        if tasks_of_kind(table, "learning"):
            pictures[f"ratios-{family}.png"] = (
                ratios(table, BASELINES[family]),
                f"Loss ratios to {BASELINES[family]}, {title}",
            )
        pictures[f"loss-by-lr-{family}.png"] = (
            loss_by_lr(table, family),
            f"Loss by learning rate, {title}",
        )
        pictures[f"loss-curves-{family}.png"] = (
            loss_curves(table, family),
            f"Loss curves, {title}",
        )
    deep = [task for task in DEEP if task in table.seeds]
    if deep:
        pictures["beta-by-layer.png"] = (beta_by_layer(table, deep), "Beta by tensor and time")
    for name, (figure, _) in pictures.items():
        # No date or version in the file: the same results give the same bytes.
        figure.savefig(folder / name, dpi=90, metadata={"Software": None})
    return {name: title for name, (_, title) in pictures.items()}

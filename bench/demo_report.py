"""What the demo measured, and the table, the JSON and the picture of it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from bench.demo_text import Text
from bench.environment import environment

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73")
# The matrix whose rows' betas are shown one by one: a row is a byte, and some bytes are rare.
ROWS_OF = "embedding"
PARTS, DECILES = 10, 10  # of the steps, and of the rows: what the JSON has of these betas
HEAT_MAP_COLUMNS = 240  # a few pixels each; more would be merged unseen by the renderer


@dataclass
class Run:
    """What was measured of one contestant.

    Attributes:
        name: the contestant.
        tensors: labels of the model's parameter tensors, in the model's order.
        eval_steps: steps after which the held-out loss was measured, the first of them 0.
        held_out_losses: those losses, in nats a byte.
        train_losses: each step's training loss, in nats a byte.
        betas: each step's beta1 of each tensor, the mean over its rows where they have their own.
        row_betas: each step's beta1 of each row of `ROWS_OF`; empty where these have none.
        at_cap: each step's share of the parameters whose beta was at its cap, of AMAdamW.
        optimizer_ms: each optimizer.step() alone, in milliseconds.
        diverged_at: the step at which a loss was not finite, where the run then ended.
        seconds: the run's wall time, evaluations included.
    """

    name: str
    tensors: list[str]
    eval_steps: list[int] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    betas: list[list[float]] = field(default_factory=list)
    row_betas: list[Tensor] = field(default_factory=list)
    at_cap: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    diverged_at: int | None = None
    seconds: float = 0.0

    @property
    def final_loss(self) -> float | None:
        """Held-out loss at the end, in nats a byte; None where the run diverged."""
        return self.held_out_losses[-1] if self.diverged_at is None else None

    @property
    def mean_betas(self) -> list[float]:
        """Each tensor's beta, averaged over the steps; empty if there was no step."""
        return [statistics.fmean(of_tensor) for of_tensor in zip(*self.betas, strict=True)]

    @property
    def mean_beta(self) -> float | None:
        """Beta, averaged over tensors and steps."""
        return statistics.fmean(self.mean_betas) if self.betas else None

    @property
    def mean_at_cap(self) -> float | None:
        """Share of the parameters at the cap, averaged over the steps; None of a fixed beta."""
        return statistics.fmean(self.at_cap) if self.at_cap else None

    @property
    def optimizer_ms_quartiles(self) -> list[float] | None:
        """Lower quartile, median and upper quartile of optimizer_ms; None below two steps."""
        return statistics.quantiles(self.optimizer_ms) if len(self.optimizer_ms) > 1 else None

    @property
    def train_curve(self) -> list[float]:
        """Mean training loss of the steps between each two evaluations, in nats a byte."""
        ends = self.eval_steps
        return [statistics.fmean(self.train_losses[a:b]) for a, b in pairwise(ends)]


@dataclass
class Comparison:
    """The runs, and what they had in common.

    Attributes:
        config: the demo's settings.
        sizes: elements of each of the model's parameter tensors.
        baseline: name of the contestant that the others are measured against.
        beta_cap: upper end of the adaptive betas.
        training, held_out: the text.
        runs: of the contestants that finished, in their order.
        unfinished: names of those that did not, because the demo was interrupted.
        seconds: wall time of all runs.
    """

    config: dict[str, Any]
    sizes: list[int]
    baseline: str
    beta_cap: float
    training: Text
    held_out: Text
    runs: list[Run] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def baseline_run(self) -> Run | None:
        return next((run for run in self.runs if run.name == self.baseline), None)

    @property
    def target(self) -> float | None:
        """The baseline's final held-out loss, in nats a byte; None if it has none."""
        return self.baseline_run.final_loss if self.baseline_run else None

    def optimizer_ratio(self, run: Run) -> float | None:
        """Time of all optimizer steps over the baseline's; None if either diverged."""
        base = self.baseline_run.optimizer_ms if self.baseline_run else []
        if not base or len(run.optimizer_ms) != len(base):
            return None
        return sum(run.optimizer_ms) / sum(base)


def _has_rows(run: Run) -> bool:
    return len(run.row_betas) > 1


def steps_to_reach(run: Run, target: float | None) -> int | None:
    """The first step at which a held-out loss of at most `target` was measured, or None."""
    if target is None:
        return None
    curve = zip(run.eval_steps, run.held_out_losses, strict=True)
    return next((step for step, loss in curve if loss <= target), None)


# ---- table ----------------------------------------------------------------------------


def format_table(comparison: Comparison) -> str:
    """The comparison as text: a line of settings, the table, and what was left undone."""
    c = comparison.config
    lines = [
        "",
        f"{sum(comparison.sizes) / 1e6:.2f} M parameters in {len(comparison.sizes)} tensors; "
        f"{c['steps']} steps of {c['batch_size']} x {c['context']} bytes; "
        f"lr {c['lr']:g}, cosine to zero, no warm-up;",
        f"weight decay {c['weight_decay']:g}; seed {c['seed']}; threads {c['threads']}; "
        f"{comparison.seconds:.0f} s in all. Held-out loss every {c['eval_every']} steps.",
        "",
    ]
    if comparison.runs:
        lines += [_runs_table(comparison), ""]
    if comparison.unfinished:
        lines.append(f"Interrupted. Not finished: {', '.join(comparison.unfinished)}.")
    return "\n".join(lines)


def _runs_table(comparison: Comparison) -> str:
    return tabulate(
        [_row(run, comparison) for run in comparison.runs],
        headers=[
            "",
            "held-out loss\n(nats a byte)",
            f"steps to {comparison.baseline}'s\nfinal loss",
            "\nmean beta",
            "\nat the cap",
            "optimizer.step() alone\nms, median (quartiles)",
            f"all of them, to\n{comparison.baseline}'s",
            "whole run\nseconds",
        ],
        colalign=["left"] + ["right"] * 7,
        disable_numparse=True,
    )


def _row(run: Run, comparison: Comparison) -> list[str]:
    loss, reached = run.final_loss, steps_to_reach(run, comparison.target)
    beta, at_cap, ratio = run.mean_beta, run.mean_at_cap, comparison.optimizer_ratio(run)
    times = "-"
    if run.optimizer_ms_quartiles is not None:
        low, median, high = run.optimizer_ms_quartiles
        times = f"{median:.3f} ({low:.3f} to {high:.3f})"
    return [
        run.name,
        f"diverged at step {run.diverged_at}" if loss is None else f"{loss:.4f}",
        "not reached" if reached is None else str(reached),
        "-" if beta is None else f"{beta:.3f}",
        "-" if at_cap is None else f"{at_cap:.0%}",
        times,
        "-" if ratio is None else f"{ratio:.2f}",
        f"{run.seconds:.0f}",
    ]


# ---- JSON -----------------------------------------------------------------------------


def write_json(comparison: Comparison, path: Path) -> None:
    """Writes the settings, versions, text digests and every contestant's numbers."""
    report = {
        "config": comparison.config,
        "parameters": sum(comparison.sizes),
        "environment": environment(),
        "text": {
            part: {"files": text.files, "bytes": len(text.content), "sha256": text.sha256}
            for part, text in (
                ("training", comparison.training),
                ("held_out", comparison.held_out),
            )
        },
        "baseline": comparison.baseline,
        "contestants": {run.name: _numbers(run, comparison) for run in comparison.runs},
        "unfinished": comparison.unfinished,
        "seconds": comparison.seconds,
    }
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def _numbers(run: Run, comparison: Comparison) -> dict[str, Any]:
    return {
        "final_held_out_loss": run.final_loss,
        "steps_to_baseline_loss": steps_to_reach(run, comparison.target),
        "diverged_at": run.diverged_at,
        "eval_steps": run.eval_steps,
        "held_out_losses": run.held_out_losses,
        "mean_train_losses_between": run.train_curve,
        "mean_beta": run.mean_beta,
        "mean_beta_by_tensor": dict(zip(run.tensors, run.mean_betas, strict=False)),
        **({f"beta_by_row_of_{ROWS_OF}": _by_row(run.row_betas)} if _has_rows(run) else {}),
        "mean_at_cap": run.mean_at_cap,
        "optimizer_time_to_baseline": comparison.optimizer_ratio(run),
        "optimizer_ms_quartiles": run.optimizer_ms_quartiles,
        "seconds": run.seconds,
    }


def _rows_in_use(row_betas: list[Tensor]) -> tuple[Tensor, int]:
    """The betas [rows, steps] of the rows that had a gradient, and how many had none.

    Their beta is 0 but at the first step.
    """
    betas = torch.stack(row_betas, 1).double()
    used = (betas[:, 1:] > 0).any(1)
    return betas[used], int((~used).sum())


def _by_row(row_betas: list[Tensor]) -> dict[str, Any]:
    """Each row's mean over the steps, and in each part of the steps how the rows' means spread."""
    betas, unused = _rows_in_use(row_betas)
    parts = F.adaptive_avg_pool1d(betas, min(PARTS, betas.shape[1]))
    deciles = parts.quantile(torch.linspace(0, 1, DECILES + 1, dtype=torch.float64), 0)
    return {
        "rows_without_a_gradient": unused,
        "mean_by_other_row": [round(beta, 4) for beta in betas.mean(1).tolist()],
        "deciles_of_the_rows_by_part_of_the_run": [
            [round(beta, 4) for beta in of_part] for of_part in deciles.T.tolist()
        ],
    }


# ---- picture --------------------------------------------------------------------------


def plot(comparison: Comparison, path: Path) -> None:
    """Draws losses and beta by row at the left and, at the right, beta by tensor, as a PNG."""
    heat_maps = [run for run in comparison.runs if run.name != comparison.baseline and run.betas]
    by_row = next(filter(_has_rows, comparison.runs), None)
    height = 3 if by_row or len(heat_maps) > 2 else 2
    figure = Figure(figsize=(14 if heat_maps else 7, 4.25 * height), layout="constrained")
    grid = figure.add_gridspec(
        height, 2 if heat_maps else 1, width_ratios=[4, 5][: 1 + bool(heat_maps)]
    )
    losses = figure.add_subplot(grid[0, 0])
    _plot_losses(losses, comparison)
    _plot_differences(figure.add_subplot(grid[1, 0], sharex=losses), comparison)
    if by_row:
        _plot_rows(figure.add_subplot(grid[2, 0]), by_row, comparison.beta_cap)
    axes = [figure.add_subplot(grid[row, 1]) for row in range(len(heat_maps))]
    for ax, run in zip(axes, heat_maps, strict=True):
        image = _plot_betas(ax, run, comparison.beta_cap)
    if heat_maps:
        ticks = [0.0, 0.2, 0.4, 0.6, 0.8, comparison.beta_cap]
        bar = figure.colorbar(image, ax=axes, label="beta", aspect=50, pad=0.01, ticks=ticks)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks[:-1]] + [f"cap {ticks[-1]:g}"])
    figure.savefig(path, dpi=150)


def _plot_losses(ax: Axes, comparison: Comparison) -> None:
    for run, colour in zip(comparison.runs, COLOURS, strict=False):
        middles = [(a + b) / 2 for a, b in pairwise(run.eval_steps)]
        ax.plot(middles, run.train_curve, color=colour, alpha=0.3, linewidth=1)
        if run.final_loss is None:
            label = f"{run.name}, diverged at step {run.diverged_at}"
        else:
            label = f"{run.name}, {run.final_loss:.3f} at the end"
        ax.plot(run.eval_steps, run.held_out_losses, color=colour, linewidth=1.6, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_ylabel("loss, nats a byte")
    ax.set_title("Held-out loss (faint: training loss)", loc="left")
    ax.grid(alpha=0.25, which="both")
    ax.legend(frameon=False)


def _plot_differences(ax: Axes, comparison: Comparison) -> None:
    baseline = comparison.baseline_run
    if baseline is None:
        return
    for run, colour in zip(comparison.runs, COLOURS, strict=False):
        pairs = zip(run.held_out_losses, baseline.held_out_losses, strict=False)
        difference = [loss - reference for loss, reference in pairs]
        ax.plot(run.eval_steps[: len(difference)], difference, color=colour, linewidth=1.6)
    ax.set_xlabel("step")
    ax.set_ylabel("difference, nats a byte")
    ax.set_title(f"Held-out loss minus {comparison.baseline}'s (below 0: better)", loc="left")
    ax.grid(alpha=0.25)


def _heat_map(ax: Axes, betas: Tensor, beta_cap: float) -> ScalarMappable:
    """Draws [lines, steps], the first line at the top."""
    columns = F.adaptive_avg_pool1d(betas, min(HEAT_MAP_COLUMNS, betas.shape[1]))
    ax.set_xlabel("step")
    return ax.imshow(
        columns.numpy(),
        aspect="auto",
        interpolation="nearest",
        extent=(0, betas.shape[1], len(betas) - 0.5, -0.5),
        vmin=0.0,
        vmax=beta_cap,
        cmap="cividis",
    )


def _plot_rows(ax: Axes, run: Run, beta_cap: float) -> None:
    betas, unused = _rows_in_use(run.row_betas)
    means = betas.mean(1)
    _heat_map(ax, betas[means.argsort(descending=True)], beta_cap)
    ax.set_ylabel("rows, by their mean")
    ax.set_title(
        f"{run.name}: beta by row of {ROWS_OF}\n"
        f"(a row is a byte; means {means.min():.2f} to {means.max():.2f}; {unused} never came: 0)",
        loc="left",
    )


def _plot_betas(ax: Axes, run: Run, beta_cap: float) -> ScalarMappable:
    image = _heat_map(ax, torch.tensor(run.betas).T, beta_cap)
    layers = [label.split()[0] for label in run.tensors]
    for row, (above, below) in enumerate(pairwise(layers)):
        if above != below and (above.isdigit() or below.isdigit()):
            ax.axhline(row + 0.5, color="white", linewidth=1.5)
    ax.set_yticks(range(len(run.tensors)), run.tensors, fontsize=8)
    ax.set_title(f"{run.name}: beta by tensor (mean {run.mean_beta:.2f})", loc="left")
    return image

"""The trainings' report: verdicts, betas and pictures, from the results alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from bench.low_precision.contestants import BASELINE, STATES
from bench.low_precision.results import QUANTILES, RULE, SAME_GRADIENTS, WITHIN, Trainings

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = dict(zip(STATES, ("#000000", "#0072B2", "#D55E00", "#009E73"), strict=True))

ABOUT = """
The same initial weights, data and order for all; the learning rate falls to zero as a cosine,
without warm-up. AdamW in float32 is torch's, and in other formats a plain one that stores as
AMAdamW does. Parameters in bfloat16 are computed with in bfloat16, and their held-out loss is taken
in float32. "to nearest" is what a bfloat16 tensor does by itself; all other bfloat16 and int8
memories are rounded stochastically, and so are bfloat16 parameters where nothing else is said.
Memories are in float32 where no format of theirs is named, and always those of tensors of fewer
than 4,096 elements.
"""
BETAS = """
Betas of the tensors whose memories are in few bits (of their rows, with one a row): quantiles over
all of them, steps and seeds, and the share at the cap. "Same gradients": the parameters and
gradients of the float32 training, at each step, so that nothing differs but the memory and what
its own betas have made of it; "distance" is the mean distance of a beta to float32's.
"In its own training": as the losses above came about.
"""


def write_report(found: Trainings, folder: Path) -> list[Path]:
    """Writes report.md and its pictures. Returns their paths."""
    pictures = {"losses.png": losses_picture(found), "betas.png": betas_picture(found)}
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110)
    (folder / "report.md").write_text(report(found))
    return [folder / "report.md", *(folder / name for name in pictures)]


def report(found: Trainings) -> str:
    sections = [
        "# Training with state and parameters in few bits",
        "Made by `python -m bench.experiments low-precision` from runs.json in this folder.",
        ABOUT.strip(),
        "The rule: " + RULE[0].lower() + RULE[1:],
        _markdown(list(outcome_cells(found)), OUTCOME_HEADERS),
        "![Held-out losses](losses.png)",
    ]
    for task, facts in found.tasks.items():
        sections += [
            f"## {task}",
            f"{facts['parameters']:,} parameters, {facts['low_share']:.1%} of them in tensors that "
            f"the formats of memories are for; {facts['steps']} steps, weight decay "
            f"{facts['weight_decay']:g}, {found.content['seeds']} seeds, lr {facts['lr']:g}: the "
            f"best of {facts['like']} in [the experiments](../experiments/report.md), a narrower "
            "model, without warm-up, for AdamW at 0.9 and AMAdamW alike.",
            _markdown(list(loss_cells(found, task)), LOSS_HEADERS),
        ]
    sections += ["## Beta", BETAS.strip(), "![Betas over the training](betas.png)"]
    for task in found.tasks:
        sections += [
            f"{task}, same gradients:",
            _markdown(list(beta_cells(found, task, same=True)), [*BETA_HEADERS, "distance"]),
            f"{task}, in its own training:",
            _markdown(list(beta_cells(found, task, same=False)), BETA_HEADERS),
        ]
    return "\n\n".join(sections) + "\n"


LOSS_HEADERS = ["optimizer", "stored", "held-out loss", "lowest", "highest"]
LOSS_HEADERS += ["to float32", "its spread", "verdict"]
OUTCOME_HEADERS = ["stored", "within", "others"]
BETA_HEADERS = ["optimizer", "state", *(f"{q:.0%}" for q in QUANTILES), "at the cap"]


def outcome_cells(found: Trainings) -> Iterator[list[str]]:
    """A row for each format: how many are within, and which are not."""
    for stored in dict.fromkeys(stored for _, stored in found.kinds if stored != BASELINE):
        outcomes = found.outcomes(stored)
        others = [f"{task}, {opt}: {out}" for task, opt, out in outcomes if out != WITHIN]
        within = f"{len(outcomes) - len(others)} of {len(outcomes)}"
        yield [stored, within, "; ".join(others)]


def loss_cells(found: Trainings, task: str) -> Iterator[list[str]]:
    """A row for each optimizer and format."""
    for optimizer, stored in found.kinds:
        losses = found.losses(task, optimizer, stored)
        numbers = [statistics.fmean(losses), min(losses), max(losses)]
        verdict = found.verdict(task, optimizer, stored)
        judged = ["", "", ""]
        if verdict is not None:
            judged = [f"{verdict.difference:+.4f}", f"{verdict.spread:.4f}", verdict.outcome]
        yield [optimizer, stored, *(f"{number:.4f}" for number in numbers), *judged]


def beta_cells(found: Trainings, task: str, same: bool) -> Iterator[list[str]]:
    """A row for each optimizer and format that has betas: means over the seeds."""
    for optimizer, stored in found.kinds:
        betas = _betas(found, task, optimizer, stored, same)
        if betas:
            quantiles = np.mean([own["quantiles"] for own in betas], axis=0)
            cells = [f"{quantile:.3f}" for quantile in quantiles]
            cells.append(f"{statistics.fmean(own['at_cap'] for own in betas):.1%}")
            if same:
                cells.append(f"{statistics.fmean(own['distance'] for own in betas):.1e}")
            yield [optimizer, stored, *cells]


def _betas(
    found: Trainings, task: str, optimizer: str, stored: str, same: bool
) -> list[dict[str, Any]]:
    """What is known of a format's betas, for each seed."""
    if same:
        runs = found.runs(task, optimizer, SAME_GRADIENTS)
        return [run["betas"][stored] for run in runs if stored in run["betas"]]
    runs = found.runs(task, optimizer, stored)
    return [run["betas"] for run in runs if "betas" in run]


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    align = ["left", "left"] + ["right"] * (len(headers) - 2)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


# ---- pictures -------------------------------------------------------------------------


def losses_picture(found: Trainings) -> Figure:
    """A panel for each task and optimizer: each seed's loss by format, and float32's spread."""
    optimizers = list(dict.fromkeys(o for o, s in found.kinds if s == BASELINE))
    figure = Figure(
        figsize=(4.6 * len(optimizers) + 3, 3.4 * len(found.tasks)), layout="constrained"
    )
    axes = figure.subplots(len(found.tasks), len(optimizers), squeeze=False, sharey=True)
    figure.suptitle(
        "Held-out loss of each seed, and the mean (line); grey: float32's mean and its spread to "
        "either side", x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    for row, task in zip(axes, found.tasks, strict=True):
        for ax, optimizer in zip(row, optimizers, strict=True):
            formats = [s for o, s in found.kinds if o == optimizer]
            base = found.losses(task, optimizer, BASELINE)
            mean, spread = statistics.fmean(base), max(base) - min(base)
            ax.axvspan(mean - spread, mean + spread, color="#cccccc", alpha=0.6)
            for place, stored in enumerate(formats):
                losses = found.losses(task, optimizer, stored)
                ax.plot(losses, [place] * len(losses), "o", color="#0072B2", markersize=4)
                ax.plot(statistics.fmean(losses), place, "|", color="#D55E00", markersize=16)
            ax.set_yticks(range(len(formats)), formats, fontsize=8)
            ax.set_title(f"{task}: {optimizer}", loc="left", fontsize=10)
            ax.grid(axis="x", alpha=0.25)
    axes[0][0].invert_yaxis()
    return figure


def betas_picture(found: Trainings) -> Figure:
    """A panel for each task and adaptive optimizer: quantiles by tenth of the training."""
    optimizers = list(dict.fromkeys(o for o, s in found.kinds if _betas_of(found, o, s)))
    figure = Figure(
        figsize=(5.5 * len(optimizers) + 1, 3.2 * len(found.tasks) + 0.6), layout="constrained"
    )
    axes = figure.subplots(len(found.tasks), len(optimizers), squeeze=False, sharey=True)
    for row, task in zip(axes, found.tasks, strict=True):
        for ax, optimizer in zip(row, optimizers, strict=True):
            for stored, colour in COLOURS.items():
                betas = _betas(found, task, optimizer, stored, same=True)
                course = np.mean([own["course"] for own in betas], axis=0)  # [tenths, quantiles]
                places = (np.arange(len(course)) + 0.5) / len(course)
                low, _, median, _, high = course.T
                ax.plot(places, median, ".-", color=colour, label=stored)
                for edge in (low, high):
                    ax.plot(places, edge, ":", color=colour, linewidth=1)
            ax.set_title(f"{task}: {optimizer}", loc="left", fontsize=10)
            ax.grid(alpha=0.25)
            ax.set_xlabel("share of the training")
    axes[0][0].set_ylabel("beta")
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = "Beta at the same gradients: the median, and 5% and 95% (dotted)"
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, title=title)
    return figure


def _betas_of(found: Trainings, optimizer: str, stored: str) -> bool:
    return any(_betas(found, task, optimizer, stored, same=True) for task in found.tasks)

"""The pictures of README and docs/kernels.md, made from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.demo_report import COLOURS
from bench.experiments.larger.results import SETTINGS, Results
from bench.experiments.larger.table import Table
from bench.experiments.larger.verdicts import BEST_ADAMW, best_adamw
from bench.kernels.results import Report

LARGER = "bench/results/experiments-larger"
TRAIN = "bench/results/amd-epyc-avx512/train.json"
KERNELS = "bench/results/amd-epyc-avx512/kernels.json"
GPU = "bench/results/nvidia-h100-80gb-hbm3/gpu.json"
FOLDER = Path("docs/pictures")

GREY, BLUE, ORANGE, GREEN = "#999999", *COLOURS[1:]
# The same bytes again for the same pictures, with text as shapes: a reader's fonts are others.
STYLE = {"svg.hashsalt": "adamem_fused", "svg.fonttype": "path", "font.size": 11}

# Steps of GPT-2 small on an H100: the case in gpu.json, and in words.
GPU_CASES = {
    "AMAdamW, float32, cap": "beta at its cap",
    "AMAdamW, float32, mixture": "12 % of the elements below it",
    "AMAdamW, float32, below": "all below it",
    "AMAdamW, float32, row": "one beta a row",
}
FEW_BITS_CASES = {
    "AMAdamW, bfloat16, cap": "bfloat16, float32 state",
    "AMAdamW, bfloat16 and state, cap": "bfloat16, and its state",
    "AMAdamW, bfloat16 and state, row": "the same, one beta a row",
    "AMAdamW, float32, int8 state, cap": "float32, int8 state",
    "AMAdamW, bfloat16, int8 state, cap": "bfloat16, int8 state",
    "AMAdamW, bfloat16, int8 state, row": "the same, one beta a row",
}
CPU_CASES = {
    "AdamW fused": "torch's fused AdamW",
    "AMAdamW cpu": "beta at its cap",
    "AMAdamW cpu, 20% missed": "20 % of the elements below it",
    "AMAdamW cpu, all missed": "all below it",
    "AMAdamW cpu, anchored": 'memory_plane="anchored"',
    "AMAdamW cpu, row": "one beta a row",
}

# Of the larger trainings, with warm-up: the task, and the contestants that are drawn.
LOSSES_OF = "gpt-400k"
LOSSES = {
    "AdamW 0.9": ("AdamW", "#000000"),
    BEST_ADAMW: ("AdamW, best of six betas", GREY),
    "AM-AdamW level tensor": ("AMAdamW", BLUE),
    "AM-AdamW level row, layers only, cap 0.95": ("AMAdamW, rows in the layers", ORANGE),
    "Muon + AdamW 0.9": ("Muon, and AdamW beside it", GREEN),
}

# Bytes of a float32 parameter, of each reading and writing: of one reading, and of what follows.
LISTS = ("gradient", "exp_avg", "exp_avg_sq", "parameter")
ONE_PASS = (("read", LISTS), ("written", LISTS[1:]))
PASSES = {
    "AdamW": ONE_PASS,
    "two passes": (("read", LISTS), *ONE_PASS),
    "one pass, beta at the cap": ONE_PASS,
    "one pass, and the repair": (
        *ONE_PASS,
        ("read", LISTS),
        ("written", ("exp_avg", "parameter")),
    ),
    "one beta a row": ONE_PASS,
}


class Step(NamedTuple):
    """A step's time, and what its bytes take at a copy's bandwidth, in milliseconds."""

    name: str
    floor: float
    measured: float


def write(root: Path, folder: Path) -> list[Path]:
    """Writes all of them; the paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        figures = {
            "overview": draw_overview(root),
            "bytes": draw_bytes(),
            "floors": draw_floors(root),
        }
        for name, figure in figures.items():
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _gpu_times(root: Path) -> dict[str, Any]:
    times: dict[str, Any] = _read(root / GPU)["stages"]["times"]["cuda"]["cases"]
    return times


# ---- overview -------------------------------------------------------------------------


def ratios(root: Path) -> dict[str, list[tuple[str, float]]]:
    """Step times over those of torch's fused AdamW."""
    trained = []
    for model, found in _read(root / TRAIN)["models"].items():
        seconds = {k: sum(v["optimizer_seconds"]) for k, v in found["contestants"].items()}
        for name, words in (("AMAdamW fused", ""), ("AMAdamW fused, row", ", one beta a row")):
            label = "the demo's GPT" if model == "the demo's" else f"a GPT of {model}"
            trained.append((label + words, seconds[name] / seconds["AdamW fused"]))
    times = _gpu_times(root)
    steps = []
    for case, words in GPU_CASES.items():
        sides = (times[f"gpt2-small, {case}"][side]["device"] for side in ("ours", "torch"))
        steps.append((words, median(ours / theirs for ours, theirs in zip(*sides, strict=True))))
    return {
        "whole trainings, two cores (AVX-512)": trained,
        "GPT-2 small's tensors in float32, H100": steps,
    }


def draw_overview(root: Path) -> Figure:
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[5, 4])
    _plot_losses(left, Table(Results(root / LARGER), _read(root / LARGER / SETTINGS)))
    _plot_ratios(right, ratios(root))
    return figure


def _plot_losses(ax: Axes, table: Table) -> None:
    """The held-out loss of a task of the larger trainings, means over its seeds."""
    for name, (label, colour) in LOSSES.items():
        if name == BEST_ADAMW:
            name = best_adamw(table, LOSSES_OF, True) or name
        runs = list(table.found(LOSSES_OF, True, name).values())
        if not runs:
            continue
        steps = table.settings["tasks"][LOSSES_OF]["steps"]
        curve = np.mean([run.curve for run in runs], axis=0)
        places = steps * (np.arange(len(curve)) + 1) / len(curve)
        end = np.mean([run.comparing for run in runs])
        ax.plot(places, curve, color=colour, linewidth=1.6, label=f"{label}: {end:.3f}")
    ax.set_ylim(1.5, 3.6)
    ax.set_xlabel("step")
    ax.set_ylabel("held-out loss, nats a byte")
    ax.set_title("A small GPT, each at its best lr", loc="left")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, title="at the end", alignment="left")


def _plot_ratios(ax: Axes, parts: dict[str, list[tuple[str, float]]]) -> None:
    y, ticks = 0.0, []
    for title, rows in parts.items():
        ax.text(-1.3, y, title, va="center", style="italic")
        for words, ratio in rows:
            y += 1
            ax.barh(y, ratio, height=0.62, color=BLUE if ratio <= 1 else ORANGE)
            ax.text(max(ratio, 1) + 0.03, y, f"{ratio:.2f}", va="center")
            ticks.append((y, words))
        y += 1.4
    ax.axvline(1, color="black", linewidth=1, zorder=0)
    ax.set_yticks([at for at, _ in ticks], [words for _, words in ticks])
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 2)
    ax.set_ylim(y - 0.6, -0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("step time over torch's fused AdamW's")


# ---- docs/kernels.md ------------------------------------------------------------------


def draw_bytes() -> Figure:
    figure = Figure(figsize=(9.5, 3.3), layout="constrained")
    ax = figure.subplots()
    colours = dict(zip(LISTS, (GREEN, BLUE, "#56B4E9", GREY), strict=True))
    for y, passes in enumerate(PASSES.values()):
        x = 0.0
        for number, (kind, lists) in enumerate(passes):
            x += 0.4 * (number > 0)
            for of in lists:
                hatch = "////" if kind == "written" else None
                ax.barh(y, 4, left=x, height=0.6, color=colours[of], edgecolor="white", hatch=hatch)
                x += 4
        total = 4 * sum(len(lists) for _, lists in passes)
        ax.text(x + 0.5, y, f"{total} bytes", va="center")
    ax.set_yticks(range(len(PASSES)), list(PASSES))
    ax.invert_yaxis()
    ax.set_xlim(0, 62)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    for name in LISTS:
        ax.barh(0, 0, color=colours[name], label=name)
    ax.barh(0, 0, color="#666666", edgecolor="white", label="read")
    ax.barh(0, 0, color="#666666", edgecolor="white", hatch="////", label="written")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def gpu_steps(root: Path, cases: dict[str, str]) -> list[Step]:
    """Of GPT-2 small on the H100. The floor: predicted bytes, at the bandwidth of a copy."""
    times = _gpu_times(root)
    steps = []
    for case, words in cases.items():
        found = times[f"gpt2-small, {case}"]
        floor = found["predicted_bytes"] * found["numel"] / times["copy"]["bandwidth"]
        steps.append(Step(words, 1e3 * floor, 1e3 * median(found["ours"]["device"])))
    return steps


def gpu_baseline(root: Path) -> Step:
    """torch's fused AdamW beside the first of them: 28 bytes a parameter."""
    times = _gpu_times(root)
    found = times["gpt2-small, AMAdamW, float32, cap"]
    floor = 28 * found["numel"] / times["copy"]["bandwidth"]
    return Step("torch's fused AdamW", 1e3 * floor, 1e3 * median(found["torch"]["device"]))


def cpu_steps(root: Path) -> list[Step]:
    """Of 2^28 elements in one tensor."""
    report = Report.read(root / KERNELS)
    steps = []
    for contestant, words in CPU_CASES.items():
        row = report.row("2^28", "float32", "warm", contestant)
        assert row is not None and row.seconds is not None and row.of_floor is not None
        seconds = 1e3 * row.seconds.median
        steps.append(Step(words, row.of_floor * seconds, seconds))
    return steps


def draw_floors(root: Path) -> Figure:
    parts = {
        "H100, GPT-2 small, float32": [gpu_baseline(root), *gpu_steps(root, GPU_CASES)],
        "H100, GPT-2 small, in few bits": gpu_steps(root, FEW_BITS_CASES),
        "two cores (AVX-512), 2^28 elements, float32": cpu_steps(root),
    }
    figure = Figure(figsize=(9.5, 6.8), layout="constrained")
    heights = [len(steps) for steps in parts.values()]
    axes = figure.subplots(len(parts), 1, height_ratios=heights)
    for ax, (title, steps) in zip(axes, parts.items(), strict=True):
        for y, step in enumerate(steps):
            colour = GREY if step.name.startswith("torch") else BLUE
            ax.barh(y, step.measured, height=0.62, color=colour)
            ax.plot([step.floor] * 2, [y - 0.42, y + 0.42], color=ORANGE, linewidth=2.5)
            words = f"  {step.measured:.3g} ms, {step.floor / step.measured:.0%}"
            ax.text(max(step.measured, step.floor), y, words, va="center")
        ax.set_yticks(range(len(steps)), [step.name for step in steps])
        ax.set_xlim(0, 1.25 * max(step.measured for step in steps))
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.set_title(title, loc="left")
    axes[0].plot(
        [],
        [],
        color=ORANGE,
        linewidth=2.5,
        label="the floor: its bytes, moved as fast as by a copy",
    )
    figure.legend(loc="outside lower center", frameon=False)
    return figure

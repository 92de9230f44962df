"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.kernels.contestants import ADAMW_BASELINE, is_ours_fused
from bench.kernels.results import TARGETS, Report, Row, baseline

COLORS = {
    "AMAdamW": "tab:blue",
    "AMAdamW, 20% missed": "tab:cyan",
    "AMAdamW, all missed": "tab:purple",
    "AMAdamW, anchored": "tab:orange",
    "AMAdamW, row": "tab:olive",
    "AMAdamW, anchored, row": "tab:pink",
    "AMSGD": "tab:green",
    "AdamW fused": "black",
    "SGD fused": "tab:gray",
}


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Writes what there is data for; the paths."""
    written = []
    for name, draw in (
        ("sizes", draw_sizes),
        ("roofline", draw_roofline),
        ("ratios", draw_ratios),
        ("contestants", draw_contestants),
    ):
        figure = draw(report)
        path = folder / f"{name}.png"
        if figure is not None:
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def _measured(report: Report, dtype: str = "float32", cache: str = "warm") -> list[Row]:
    return [
        row
        for row in report.rows
        if row.seconds is not None and (row.dtype, row.cache) == (dtype, cache)
    ]


def _color(contestant: str) -> str | None:
    name, comma, variant = contestant.partition(",")
    if is_ours_fused(contestant):
        name = name.split()[0]
    return COLORS.get(name + comma + variant)


def _core(rows: list[Row]) -> list[str]:
    """Contestants that are on every list, in order."""
    lists = {row.parameters for row in rows}
    names = dict.fromkeys(row.contestant for row in rows)
    return [
        name
        for name in names
        if {row.parameters for row in rows if row.contestant == name} == lists
    ]


def _new_figure(report: Report, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(report.environment["device"], fontsize=9, loc="right")
    return figure, axes


def draw_sizes(report: Report) -> Figure | None:
    """Step time against the size of a single tensor."""
    rows = [row for row in _measured(report) if row.tensors == 1]
    if len({row.numel for row in rows}) < 2:
        return None
    figure, axes = _new_figure(report, 8, 5)
    for name in dict.fromkeys(row.contestant for row in rows):
        points = sorted(
            (row.numel, row.seconds.median)
            for row in rows
            if row.contestant == name and row.seconds is not None
        )
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), "o-", label=name, color=_color(name))
    sample = min(rows, key=lambda row: row.contestant != ADAMW_BASELINE)
    floors = sorted(
        (row.numel, row.floor_seconds)
        for row in rows
        if row.contestant == sample.contestant and row.floor_seconds is not None
    )
    axes.plot(*zip(*floors, strict=True), "k:", label=f"floor of {sample.contestant}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("elements of a float32 tensor")
    axes.set_ylabel("seconds a step (caches warm)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _grouped_bars(axes: Axes, rows: list[Row], height: Callable[[Row], float | None]) -> list[str]:
    """A group of bars for each parameter list; the lists' labels."""
    names, lists = _core(rows), list(dict.fromkeys(row.parameters for row in rows))
    width = 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        heights = {row.parameters: height(row) for row in rows if row.contestant == name}
        places = [i + (k - (len(names) - 1) / 2) * width for i in range(len(lists))]
        axes.bar(
            places,
            [heights[label] or 0.0 for label in lists],
            width,
            label=name,
            color=_color(name),
        )
    axes.set_xticks(range(len(lists)), [_wrapped(label) for label in lists], fontsize=7)
    return lists


def _wrapped(label: str) -> str:
    """A label in two lines where it says how a model was scaled."""
    return label.replace(", dimensions ", "\n")


def draw_roofline(report: Report) -> Figure | None:
    """Achieved bandwidth by parameter list, under that of a copy."""
    rows = _measured(report)
    if not rows:
        return None
    figure, axes = _new_figure(report, 13, 4.5)
    lists = _grouped_bars(axes, rows, lambda row: row.bandwidth and row.bandwidth / 1e9)
    copies = {row.parameters: row.copy_bandwidth or 0.0 for row in rows}
    for i, label in enumerate(lists):
        axes.plot(
            [i - 0.45, i + 0.45],
            [copies[label] / 1e9] * 2,
            color="tab:red",
            label="a copy of as many bytes" if i == 0 else None,
        )
    axes.set_ylabel("GB/s: bytes that have to move,\nover the time taken")
    axes.set_title("float32, caches warm", fontsize=9, loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_ratios(report: Report) -> Figure | None:
    """The ratio to torch's fused optimizer of the same kind, by parameter list and dtype."""
    dtypes = [
        dtype
        for dtype in dict.fromkeys(row.dtype for row in report.rows)
        if any(
            row.contestant.startswith("AM") and report.ratio(row, baseline(row))
            for row in _measured(report, dtype)
        )
    ]
    if not dtypes:
        return None
    figure = Figure(figsize=(13, 0.5 + 3.2 * len(dtypes)), layout="constrained")
    for axes, dtype in zip(figure.subplots(len(dtypes), squeeze=False).flat, dtypes, strict=True):
        rows = _measured(report, dtype)
        names = [name for name in _core(rows) if name.startswith("AM")]
        lists = list(dict.fromkeys(row.parameters for row in rows))
        step = min(0.12, 0.84 / max(len(names), 1))
        offsets = {name: step * (k - (len(names) - 1) / 2) for k, name in enumerate(names)}
        for name in names:
            found = [
                (i, row, ratio)
                for i, label in enumerate(lists)
                if (row := report.row(label, dtype, "warm", name))
                and (ratio := report.ratio(row, baseline(row)))
            ]
            for point, (i, row, ratio) in enumerate(found):
                axes.errorbar(
                    i + offsets[name],
                    ratio.median,
                    [[ratio.median - ratio.low], [ratio.high - ratio.median]],
                    fmt="o",
                    mfc="white" if ratio.noisy else None,
                    color=_color(name),
                    label=f"{name} / {baseline(row)}" if point == 0 else None,
                )
        axes.set_xlim(-0.5, len(lists) - 0.5)
        for target in TARGETS:
            drawn = target.name in lists and target.contestant in names
            if dtype == target.dtype and drawn and target.against == ADAMW_BASELINE:
                place = lists.index(target.name) + offsets[target.contestant]
                axes.plot([place - step / 2, place + step / 2], [target.at_most] * 2, "tab:red")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks(range(len(lists)), [_wrapped(label) for label in lists], fontsize=7)
        axes.set_ylabel("ratio of step times")
        axes.set_title(
            f"{dtype}, caches warm; red: aimed at; hollow: noisy", fontsize=9, loc="left"
        )
        axes.set_title(report.environment["device"], fontsize=9, loc="right")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def draw_contestants(report: Report) -> Figure | None:
    """Every contestant, on the lists that all take part in."""
    rows = _measured(report)
    core = set(_core(rows))
    lists = [
        label
        for label in dict.fromkeys(row.parameters for row in rows)
        if {row.contestant for row in rows if row.parameters == label} - core
    ]
    if not lists:
        return None
    groups = [[row for row in rows if row.parameters == label] for label in lists]
    height = 1 + 0.22 * max(map(len, groups))
    figure = Figure(figsize=(5.5 * len(lists), height), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(lists), squeeze=False).flat, groups, strict=True):
        pairs = [(row.contestant, report.ratio(row, ADAMW_BASELINE)) for row in group]
        found = sorted(((r.median, name) for name, r in pairs if r is not None), reverse=True)
        axes.barh(
            [name for _, name in found],
            [median - 1 for median, _ in found],
            left=1,
            # Whatever the backend: the optimizers of this package stand out.
            color=[_color(name) or COLORS.get(name.split()[0], "tab:gray") for _, name in found],
        )
        for y, (median, _) in enumerate(found):
            axes.text(max(median, 1), y, f" {median:.2f}", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(f"step time over {ADAMW_BASELINE}'s")
        axes.set_title(f"{group[0].parameters}, float32, warm", fontsize=9)
    return figure

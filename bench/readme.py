"""python -m bench readme: the README's performance section, made from the committed results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import train
from bench.kernels.contestants import ADAMW_BASELINE
from bench.kernels.results import Report, Row, Spread, baseline
from bench.kernels.tables import format_ratio, format_reasons, target_cells

ROOT = Path(__file__).parent.parent
RESULTS = Path("bench/results")
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "readme",
        help="writes the README's performance section from the committed results",
        description=f"Writes what stands between {BEGIN} and {END} in README.md from every "
        f"{RESULTS}/*/kernels.json, and the train.json and pictures beside it.",
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Rewrites the section in README.md."""
    path = ROOT / "README.md"
    path.write_text(replace_section(path.read_text(), performance(ROOT)))
    print(f"Wrote the performance section of {path}")
    return 0


def replace_section(text: str, section: str) -> str:
    """A README with another performance section.

    Raises:
        ValueError: there is no section in it, or more than one.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the text has not one section from {BEGIN} to {END}")
    return f"{before}{BEGIN}\n{section}{END}{after}"


def performance(root: Path) -> str:
    """The section: for each device what was measured there."""
    parts = []
    for path in sorted((root / RESULTS).glob("*/kernels.json")):
        parts.append(device_section(Report.read(path), path.parent, root))
    if not parts:
        parts = ["Nothing was measured yet.\n"]
    return "\n" + "\n".join(parts) + "\n"


def device_section(report: Report, folder: Path, root: Path) -> str:
    """What was measured on one device."""
    link = folder.relative_to(root).as_posix()
    environment, settings = report.environment, report.settings
    where = f"{environment['device']}, torch {environment['torch']}, {environment['date']}"
    if settings["device"] == "cpu":
        threads = settings["threads"]
        where = f"{environment['device']}, {threads} threads, torch {environment['torch']}"
        where += f", {environment['date']}"
    parts = [
        f"### {environment['device']}\n",
        f"{where}. Ratios of step times are medians over rounds in which both sides took turns; "
        f"in brackets the quartiles. A tilde marks a noisy row: another run may differ by 10% or "
        f"more. Every sample is in [kernels.json]({link}/kernels.json).\n",
    ]
    targets = target_cells(report)
    if targets:
        parts.append("What was aimed at, float32, caches warm:\n")
        parts.append(
            _table(targets, ["parameters", "time of / time of", "ratio", "quartiles", "aim", ""])
        )
    for dtype in dict.fromkeys(row.dtype for row in report.rows):
        cells = list(_ratio_cells(report, dtype))
        if cells:
            parts.append(
                f"By parameter list, {dtype}: ms a step and its ratio to torch's fused "
                "optimizer of the same kind, and the fraction of the floor that was "
                "reached:\n"
            )
            parts.append(_table(cells, _RATIO_HEADERS))
    for label in _lists_of_everyone(report):
        parts.append(f"Every contestant on {label}, float32, caches warm:\n")
        parts.append(_table(list(_contestant_cells(report, label)), _CONTESTANT_HEADERS))
    for name, words in _PICTURES.items():
        if (folder / name).exists():
            parts.append(f"![{words}]({link}/{name})\n")
    trained = folder / "train.json"
    if trained.exists():
        result = json.loads(trained.read_text())
        parts.append(
            f"A training step of a GPT of {result['parameters'] / 1e6:.1f} M parameters in "
            f"{result['tensors']} tensors on {result['tokens']:,} tokens "
            f"([train.json]({link}/train.json)):\n"
        )
        parts.append(_table(train.table_cells(result), train.HEADERS))
    reasons = [*format_reasons(report), *(f"{k}: {v}" for k, v in report.missing.items())]
    if reasons:
        parts.append("Not measured:\n")
        parts.append("\n".join(f"- {reason}" for reason in reasons) + "\n")
    return "\n".join(parts)


_PICTURES = {
    "ratios.png": "Ratio of step times by parameter list",
    "sizes.png": "Step time against the size of a tensor",
    "roofline.png": "Achieved bandwidth by parameter list, and a copy's",
    "contestants.png": "Step time of every contestant over torch's fused AdamW's",
}
_RATIO_HEADERS = ["parameters", "tensors", "elements", "cache", "optimizer", "ms", "ratio", "floor"]
_CONTESTANT_HEADERS = ["", "ms", f"/ {ADAMW_BASELINE}", "GB/s", "launches", "peak MB", "state B"]


def _table(cells: list[list[str]], headers: list[str]) -> str:
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def _ratio_cells(report: Report, dtype: str) -> Iterator[list[str]]:
    for row in report.rows:
        ratio = report.ratio(row, baseline(row))
        fused = row.contestant.split()[-1] in ("cpu", "triton", "cuda")
        if (
            row.dtype != dtype
            or not row.contestant.startswith("AM")
            or not fused
            or not row.seconds
        ):
            continue
        yield [
            row.parameters,
            f"{row.tensors:,}",
            f"{row.numel:,}",
            row.cache,
            row.contestant,
            f"{1e3 * row.seconds.median:.3f}",
            _ratio(ratio),
            f"{row.of_floor:.0%}" if row.of_floor else "-",
        ]


def _ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    return f"{format_ratio(ratio)} ({ratio.low:.2f} to {ratio.high:.2f})"


def _lists_of_everyone(report: Report) -> list[str]:
    """Lists with contestants that are not on all lists."""
    lists = list(dict.fromkeys(row.parameters for row in report.rows))
    on: dict[str, set[str]] = {label: set() for label in lists}
    for row in report.rows:
        on[row.parameters].add(row.contestant)
    common = set.intersection(*on.values()) if on else set()
    return [label for label in lists if on[label] - common]


def _contestant_cells(report: Report, label: str) -> Iterator[list[str]]:
    rows = [
        row
        for row in report.rows
        if row.parameters == label and (row.dtype, row.cache) == ("float32", "warm")
    ]
    for row in rows:
        if row.seconds is not None:
            yield _contestant(report, row, row.seconds)


def _contestant(report: Report, row: Row, seconds: Spread) -> list[str]:
    return [
        row.contestant,
        f"{1e3 * seconds.median:.2f}",
        _ratio(report.ratio(row, ADAMW_BASELINE)),
        f"{row.bandwidth / 1e9:.1f}" if row.bandwidth else "-",
        f"{row.launches:,}" if row.launches is not None else "-",
        f"{row.peak_bytes / 1e6:.0f}" if row.peak_bytes is not None else "-",
        f"{row.state_bytes / row.numel:.2f}" if row.state_bytes is not None else "-",
    ]

"""python -m bench readme: what docs/ has of the committed results, tables and pictures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import host, phase, pictures, train
from bench.experiments.formatting import ratio
from bench.experiments.larger.results import SETTINGS
from bench.experiments.larger.results import Results as LargerResults
from bench.experiments.larger.table import Table as LargerTable
from bench.experiments.larger.verdicts import verdicts
from bench.kernels.contestants import ADAMW_BASELINE, is_ours_fused
from bench.kernels.results import Report, Row, Spread, baseline
from bench.kernels.tables import format_ratio, format_reasons, target_cells
from bench.low_precision import steps
from bench.low_precision.results import RESULTS as TRAININGS
from bench.low_precision.results import Trainings

ROOT = Path(__file__).parent.parent
RESULTS = Path("bench/results")
LARGER = "experiments-larger"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

PICTURES = {
    "ratios.png": "Ratio of step times by parameter list",
    "sizes.png": "Step time against the size of a tensor",
    "roofline.png": "Achieved bandwidth by parameter list, and a copy's",
    "contestants.png": "Step time of every contestant over torch's fused AdamW's",
}
MAIN_PICTURE = "ratios.png"
RATIO_HEADERS = ["parameters", "tensors", "elements", "dtype", "cache", "ms", "of floor"]
CONTESTANT_HEADERS = [
    "",
    "ms",
    f"/ {ADAMW_BASELINE}",
    "GB/s",
    "launches",
    "peak MB",
    "state bytes / parameter",
]


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    words = " and ".join(map(str, PAGES))
    parser = commands.add_parser(
        "readme",
        help=f"writes the tables of {words}, and {pictures.FOLDER}, from the committed results",
        description=f"Writes what stands between {BEGIN} and {END} in {words} from every "
        f"{RESULTS}/*/kernels.json, and the train.json, phase.json, {steps.NAME}, host.json and "
        f"pictures beside it, and from {RESULTS}/{LARGER}; and the pictures in {pictures.FOLDER}.",
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Rewrites the section of each page, and the pictures."""
    for page, section in PAGES.items():
        path = ROOT / page
        path.write_text(replace_section(path.read_text(), section(ROOT)))
        print(f"Wrote the tables of {path}")
    pictures.write(ROOT, ROOT / pictures.FOLDER)
    print(f"Wrote {ROOT / pictures.FOLDER}")
    return 0


def replace_section(text: str, section: str) -> str:
    """A page with another section.

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
    parts = [
        device_section(Report.read(path), path.parent, root)
        for path in sorted((root / RESULTS).glob("*/kernels.json"))
    ]
    return "\n" + "\n".join(parts or ["Nothing was measured yet.\n"]) + "\n"


def larger(root: Path) -> str:
    """The section: the verdicts of the larger trainings."""
    folder = root / RESULTS / LARGER
    table = LargerTable(LargerResults(folder), json.loads((folder / SETTINGS).read_text()))
    parts = []
    for question, of_question in groupby(verdicts(table), key=lambda verdict: verdict.question):
        rows = [
            [
                verdict.contestant,
                verdict.against,
                ", ".join(f"{task} {math.exp(v):.3f}" for task, v in verdict.per_task.items()),
                "with" if verdict.warmup else "without",
                str(verdict.numbers),
                ratio(verdict.interval),
                f"**{verdict.outcome}**",
            ]
            for verdict in of_question
        ]
        headers = [
            question,
            "against",
            "each task",
            "warm-up",
            "runs",
            "ratio of losses",
            "verdict",
        ]
        parts.append(_table(rows, headers))
    return "\n" + "\n".join(parts) + "\n"


def device_section(report: Report, folder: Path, root: Path) -> str:
    """What was measured on one device: paragraphs and tables, each with a line after it."""
    link = f"../{folder.relative_to(root).as_posix()}"
    environment, settings = report.environment, report.settings
    threads = f", {settings['threads']} threads" if settings["device"] == "cpu" else ""
    parts = [
        f"### {environment['device']}\n",
        f"{environment['device']}{threads}, torch {environment['torch']}, {environment['date']}. "
        "Ratios are medians over rounds in which both sides took turns, in brackets the quartiles. "
        "A tilde marks a noisy one: another run may differ by 10%. Every sample is in "
        f"[kernels.json]({link}/kernels.json).\n",
    ]
    headers, targets = target_cells(report)
    if targets:
        by_row = (
            ' Row: `beta_scope="row"`, which guesses nothing either.' if "row" in headers else ""
        )
        parts += [
            "Ratio and what was aimed at, caches warm, by the share of the elements whose beta "
            "`AMAdamW` had guessed wrong (the anchored plane guesses nothing, nor is anything "
            f"guessed of bfloat16 parameters).{by_row} 20%: tensors of about that share; one "
            "tensor alone is cut into fifths, one of which misses:\n",
            _table(targets, headers),
        ]
    details = []
    names = _fused_contestants(report)
    if names:
        details += [
            "Step times over those of torch's fused optimizer of the same kind; milliseconds and "
            f"the fraction of the floor that was reached are those of {names[0]}:\n",
            _table(list(_ratio_cells(report, names)), RATIO_HEADERS + names),
        ]
    pictures = {
        name: f"![{words}]({link}/{name})\n"
        for name, words in PICTURES.items()
        if (folder / name).exists()
    }
    parts += [picture for name, picture in pictures.items() if name == MAIN_PICTURE]
    trained = folder / "train.json"
    if trained.exists():
        result = json.loads(trained.read_text())
        parts += [
            "Whole trainings of two byte-level GPTs on Python's source, the optimizers in turns "
            "from step to step: times are means, the ratio is that of the time in all of an "
            "optimizer's steps (in brackets, quartiles of tenths of the training; of what was "
            f"aimed at) ([train.json]({link}/train.json)):\n",
            _table(train.table_cells(result), train.HEADERS),
        ]
    whole = folder / "phase.json"
    if whole.exists():
        for text, headers, cells in phase.tables(json.loads(whole.read_text())):
            parts += [f"{text} ([phase.json]({link}/phase.json)):\n", _table(cells, headers)]
    low_precision = folder / steps.NAME
    if low_precision.exists():
        parts += _low_precision(json.loads(low_precision.read_text()), link, root)
    submitted = folder / "host.json"
    if submitted.exists():
        result = json.loads(submitted.read_text())
        parts += [
            f"What a step of the `triton` backend on {result['tensors']:,} tensors takes the host, "
            f"launches left out, by what has new addresses ([host.json]({link}/host.json)):\n",
            _table(host.table_cells(result), host.HEADERS),
        ]
    for label in _lists_of_everyone(report):
        details += [
            f"Every contestant on {label}, float32, caches warm. Launches are kernels, on the CPU "
            "torch operators that call no other:\n",
            _table(list(_contestant_cells(report, label)), CONTESTANT_HEADERS),
        ]
    details += [picture for name, picture in pictures.items() if name != MAIN_PICTURE]
    reasons = [*format_reasons(report), *(f"{k}: {v}" for k, v in report.missing.items())]
    if reasons:
        details += ["Not measured:\n", "\n".join(f"- {reason}" for reason in reasons) + "\n"]
    if details:
        summary = "Every parameter list, every contestant, and what was not measured"
        parts += [f'<details markdown="1"><summary>{summary}</summary>\n', *details, "</details>\n"]
    return "\n".join(parts)


def _low_precision(result: dict[str, Any], link: str, root: Path) -> list[str]:
    """State and parameters in few bits."""
    trainings = Trainings.read(root / TRAININGS)
    words = (
        f"State and parameters in few bits on {result['parameters']}'s tensors: the time over that "
        f"of torch's fused AdamW in float32, bytes a parameter (of the state; of state and "
        "parameter; predicted to be read and written in a step), and memory at its peak, of "
        f"parameters, gradients, state and temporaries ([{steps.NAME}]({link}/{steps.NAME})). "
        "AMAdamW's beta is at its cap."
    )
    if trainings is not None:
        words += (
            f" Losses are of {trainings.content['seeds']} seeds of a small GPT, and in brackets "
            "the difference to the same optimizer in float32, and whether it is within the seeds' "
            f"spread ([report.md](../{TRAININGS.as_posix()}/report.md))."
        )
    cells = steps.table_cells(result, trainings)
    lines = [f"- {reason}" for reason in steps.reasons(result)]
    missing = ["Not measured:\n", "\n".join(lines) + "\n"] if lines else []
    return [f"{words}\n", _table(cells, steps.HEADERS), *missing]


def _table(cells: list[list[str]], headers: list[str]) -> str:
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def _fused_contestants(report: Report) -> list[str]:
    """This package's fused contestants that have a ratio somewhere."""
    found = dict.fromkeys(
        row.contestant
        for row in report.rows
        if is_ours_fused(row.contestant) and report.ratio(row, baseline(row))
    )
    return list(found)


def _ratio_cells(report: Report, names: list[str]) -> Iterator[list[str]]:
    cases = dict.fromkeys((row.parameters, row.dtype, row.cache) for row in report.rows)
    for parameters, dtype, cache in cases:
        found = [report.row(parameters, dtype, cache, name) for name in names]
        first = found[0]
        if first is None or first.seconds is None:
            continue
        yield [
            parameters,
            f"{first.tensors:,}",
            f"{first.numel:,}",
            dtype,
            cache,
            f"{1e3 * first.seconds.median:.3f}",
            f"{first.of_floor:.0%}" if first.of_floor else "-",
            *(_ratio(report.ratio(row, baseline(row)) if row else None) for row in found),
        ]


def _ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    return f"{format_ratio(ratio)} ({ratio.low:.2f} to {ratio.high:.2f})"


def _lists_of_everyone(report: Report) -> list[str]:
    """Lists with contestants that are not on all lists."""
    on: dict[str, set[str]] = {}
    for row in report.rows:
        on.setdefault(row.parameters, set()).add(row.contestant)
    common = set.intersection(*on.values()) if on else set()
    return [label for label in on if on[label] - common]


def _contestant_cells(report: Report, label: str) -> Iterator[list[str]]:
    for row in report.rows:
        if row.key[:3] == (label, "float32", "warm") and row.seconds is not None:
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


PAGES: dict[Path, Callable[[Path], str]] = {
    Path("docs/performance.md"): performance,
    Path("docs/experiments.md"): larger,
}

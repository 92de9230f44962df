"""python -m bench compare: what changed between two results of bench kernels, and by how much."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.arguments import POSITIVE
from bench.kernels.contestants import ADAMW_BASELINE
from bench.kernels.results import Report, Row, Spread


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "compare",
        help="what changed between two kernels.json",
        description="Compares the ratios to torch's fused AdamW in two results of bench kernels, "
        "row by row. A row is a regression where its ratio grew by more than the limit and by "
        "more than its spread, or where it was measured in the first and failed in the second. "
        "Exits 1 where there is one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="kernels.json to compare with")
    parser.add_argument("after", type=Path, help="kernels.json that may have changed")
    parser.add_argument("--limit", type=POSITIVE, default=10.0, help="percent that are allowed")
    parser.add_argument("--all", action="store_true", help="list the rows that did not change too")
    parser.set_defaults(run=run, parser=parser)


@dataclass(frozen=True)
class Change:
    """A row in both results.

    Attributes:
        before, after: its ratio to torch's fused AdamW, both in one run.
        reason: why it was not measured any more, or None.
    """

    row: Row
    before: Spread
    after: Spread | None
    reason: str | None

    @property
    def percent(self) -> float:
        """How much the median ratio grew."""
        if self.after is None:
            return math.inf
        return 100 * (self.after.median / self.before.median - 1)

    @property
    def spread(self) -> float:
        """What the two medians may be off by, in percent of the first."""
        found = [s.uncertainty for s in (self.before, self.after) if s is not None]
        return 100 * math.hypot(*found) / self.before.median

    def is_regression(self, limit: float) -> bool:
        return self.percent > max(limit, self.spread)

    def is_gain(self, limit: float) -> bool:
        return -self.percent > max(limit, self.spread)


def find_changes(before: Report, after: Report) -> Iterator[Change]:
    """The rows that the first result measured and the second has."""
    for row in before.rows:
        ratio = before.ratio(row, ADAMW_BASELINE)
        new = after.row(*row.key)
        if ratio is None or new is None or row.contestant == ADAMW_BASELINE:
            continue
        new_ratio = after.ratio(new, ADAMW_BASELINE)
        if new_ratio is not None or new.reason is not None:
            yield Change(new, ratio, new_ratio, new.reason)


def run(args: argparse.Namespace) -> int:
    """Compares two files.

    Returns:
        0, or 1 where something became slower; 2 where nothing can be compared.
    """
    try:
        before, after = Report.read(args.before), Report.read(args.after)
    except (OSError, ValueError) as error:
        args.parser.error(str(error))
    changes = sorted(find_changes(before, after), key=lambda change: -change.percent)
    if not changes:
        print("The two have no row in common.", file=sys.stderr)
        return 2
    for key in ("device", "torch", "adamem_fused"):
        pair = before.environment.get(key), after.environment.get(key)
        if pair[0] != pair[1]:
            print(f"note: {key} was {pair[0]} and is {pair[1]}")
    regressions = [change for change in changes if change.is_regression(args.limit)]
    gains = [change for change in changes if change.is_gain(args.limit)]
    shown = changes if args.all else [*regressions, *gains]
    if shown:
        print(format_changes(shown, args.limit))
    print(
        f"{len(changes)} rows compared: {len(regressions)} slower and {len(gains)} faster by more "
        f"than {args.limit:g}% and their spread."
    )
    return int(bool(regressions))


def format_changes(changes: list[Change], limit: float) -> str:
    return tabulate(
        [_cells(change, limit) for change in changes],
        headers=[
            "contestant",
            "parameters",
            "dtype",
            "cache",
            "before",
            "after",
            "change",
            "spread",
            "of spread",
            "",
        ],
        colalign=["left"] * 4 + ["right"] * 5 + ["left"],
        disable_numparse=True,
    )


def _cells(change: Change, limit: float) -> list[str]:
    row, after = change.row, change.after
    verdict = "slower" if change.is_regression(limit) else ""
    verdict = "faster" if change.is_gain(limit) else verdict
    return [
        row.contestant,
        row.parameters,
        row.dtype,
        row.cache,
        f"{change.before.median:.3f}",
        f"{after.median:.3f}" if after else "failed",
        f"{change.percent:+.1f}%" if after else "-",
        f"{change.spread:.1f}%",
        f"{abs(change.percent) / change.spread:.1f}" if after and change.spread else "-",
        verdict if after else str(change.reason),
    ]

"""How numbers and tables look in a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from bench.experiments.verdicts import Interval


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table: text in the first column, numbers in the others."""
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def ratio(value: Interval) -> str:
    """A log ratio as a ratio: its mean and interval."""
    if not np.isfinite([value.low, value.high]).all():
        return f"{np.exp(value.mean):.3f}"
    mean, low, high = np.exp([value.mean, value.low, value.high])
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"

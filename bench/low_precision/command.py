"""The command line of `python -m bench.experiments low-precision`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.arguments import COUNT, output_folder
from bench.low_precision.results import RESULTS

QUICK_RESULTS = Path("build/low-precision-quick")


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench.experiments`."""
    parser = commands.add_parser(
        "low-precision",
        help="state and parameters in few bits, beside float32: minutes",
        description="Trains a small GPT and a small ViT with AdamW, AMAdamW and AMAdamW by row, "
        "with each format of state and parameters, and with the installed packages' AdamW of 8 "
        "bits. Writes runs.json, report.md, with a verdict for each and the distributions of "
        "beta, and two pictures.",
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, and a few steps")
    parser.add_argument(
        "--workers", type=COUNT, default=os.cpu_count(), help="processes (default: every core)"
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        help=f"folder (default: {RESULTS}, of --quick {QUICK_RESULTS})",
    )

"""Trains small models with Adaptive Memory and with what it would replace, and reports.

    python -m bench.experiments run            # the runs behind the committed report: hours
    python -m bench.experiments run --quick    # as many tables and pictures, in minutes
    python -m bench.experiments run --row      # betas by row, beside what they would replace: hours
    python -m bench.experiments run --larger   # larger models, with ablations: many hours
    python -m bench.experiments reach          # how much of a gradient reaches the weights: minutes
    python -m bench.experiments prepare        # the text as tokens, which the next one reads
    python -m bench.experiments run --gpt2     # GPT-2 small; needs a GPU
    python -m bench.experiments report         # the report again, from the results on disk
    python -m bench.experiments report --larger
    python -m bench.experiments low-precision  # state and parameters in few bits: minutes

A run that was interrupted goes on where it stopped. Data, initial weights and order are the
same for all contestants, and the same every time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# What needs other packages than torch and numpy is imported where it is needed: `run --gpt2` is to
# work without them.
from bench.arguments import COUNT, POSITIVE, output_folder
from bench.experiments import gpt2
from bench.experiments.data import fashion_mnist_folder
from bench.experiments.larger.results import Results as LargerResults
from bench.experiments.larger.studies import STUDIES
from bench.experiments.larger.tasks import TASKS as LARGER_TASKS
from bench.experiments.larger.training import run_studies
from bench.low_precision import command

if TYPE_CHECKING:
    from bench.experiments.grid import Grid
    from bench.experiments.results import Results

RESULTS = Path("bench/results/experiments")
ROW_RESULTS = Path("bench/results/experiments-row")
LARGER_RESULTS = Path("bench/results/experiments-larger")
GPT2_RESULTS = Path("bench/results/experiments-gpt2")
TINY_RESULTS = Path("build/experiments-gpt2-tiny")
QUICK_RESULTS = Path("build/experiments-quick")
REFUSED = 2
INTERRUPTED = 130  # exit status: 128 + SIGINT, as a shell has it


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments",
        description="Trains small models with Adaptive Memory optimizers and with others, and "
        "writes a report with a verdict for each claim.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not in the results yet, then report")
    which = run.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", action="store_true", help="fewer steps, learning rates and seeds: minutes"
    )
    which.add_argument(
        "--row", action="store_true", help="betas by row, beside what they would replace"
    )
    which.add_argument(
        "--larger",
        action="store_true",
        help="larger models, with ablations: many hours",
    )
    which.add_argument(
        "--gpt2", action="store_true", help="GPT-2 small, on a GPU (not yet run on one)"
    )
    run.add_argument(
        "--tiny",
        action="store_true",
        help="of --gpt2: a model and runs so small that they go through in seconds, on the CPU too",
    )
    run.add_argument(
        "--seconds",
        type=POSITIVE,
        help="of --gpt2: begins no run that would not be done by then, the last one's time says",
    )
    run.add_argument(
        "--workers", type=COUNT, default=os.cpu_count(), help="processes (default: every core)"
    )
    run.add_argument(
        "--out",
        type=output_folder,
        help=f"folder (default: {RESULTS}, of --row {ROW_RESULTS}, of --larger {LARGER_RESULTS}, "
        f"of --quick {QUICK_RESULTS}, of --gpt2 {GPT2_RESULTS}, with --tiny {TINY_RESULTS})",
    )
    commands.add_parser("prepare", help="make what run --gpt2 reads: the text as tokens")
    reach = commands.add_parser(
        "reach", help="how much of a gradient reaches the weights, by row; then report --larger"
    )
    reach.add_argument(
        "--out",
        type=output_folder,
        default=str(LARGER_RESULTS),
        help=f"folder (default: {LARGER_RESULTS})",
    )
    report = commands.add_parser("report", help="write the report of results that are there")
    report.add_argument("--larger", action="store_true", help="that of `run --larger`")
    report.add_argument(
        "--out",
        type=output_folder,
        help=f"folder (default: {RESULTS}, of --larger {LARGER_RESULTS})",
    )
    command.add_parser(commands)
    args = parser.parse_args(argv)
    if args.command == "run" and not args.gpt2 and (args.tiny or args.seconds is not None):
        parser.error("--tiny and --seconds are of --gpt2")
    if args.command in ("run", "report") and args.out is None:
        by_flag = {
            "tiny": TINY_RESULTS,
            "quick": QUICK_RESULTS,
            "row": ROW_RESULTS,
            "larger": LARGER_RESULTS,
            "gpt2": GPT2_RESULTS,
        }
        given = (folder for flag, folder in by_flag.items() if getattr(args, flag, False))
        args.out = output_folder(str(next(given, RESULTS)))
    return args


def prepare(args: argparse.Namespace) -> tuple[Grid, Results]:
    """The grid, and the folder ready for its runs.

    Raises:
        ValueError: the folder holds other runs.
    """
    from bench.experiments.grid import FULL, ROW, quick_grid
    from bench.experiments.results import Results

    grid = quick_grid() if args.quick else ROW if args.row else FULL
    results = Results(args.out)
    results.open_for(grid)
    return grid, results


def run(grid: Grid, results: Results, workers: int) -> int:
    """Runs what is missing. Interrupted, it leaves the finished runs and a report of them."""
    from tqdm import tqdm

    from bench.experiments.report import write_report
    from bench.experiments.runner import run_cells

    cells = grid.cells()
    done = {run.cell for run in results}
    missing = [cell for cell in cells if cell not in done]
    status = 0
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="run") as bar:
        try:
            for finished in run_cells(grid, missing, workers):
                results.add(finished)
                bar.set_postfix_str(finished.cell.task, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            status = INTERRUPTED
    write_report(results)
    return status


def run_larger(results: LargerResults, environment: int, workers: int) -> int:
    """Runs what is missing of the larger trainings.

    Interrupted, or where a run fails, it leaves the finished ones and a report of them.
    """
    from tqdm import tqdm

    from bench.experiments.larger.report import write_report

    runs = {run.cell: run for run in results}
    status = 0
    with tqdm(initial=len(runs), unit="run") as bar:  # a search's length is not known
        try:
            for run in run_studies(runs, STUDIES, environment, workers):
                results.add(run)
                bar.set_postfix_str(f"{run.cell.task}, {run.cell.contestant}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            write_report(results)
    return status


def reach(results: LargerResults) -> int:
    """Measures how much of a gradient arrives, and adds it to the report of the runs there are."""
    from bench.experiments.larger import reach as measured
    from bench.experiments.larger.report import write_report

    found = [reach for task in measured.PARTS for reach in measured.measure(task)]
    measured.write(found, results.folder)
    write_report(results)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 where the runs asked for cannot be made here; 130 where it was interrupted.
    """
    args = parse_args(argv)
    if args.command == "report":
        from bench.experiments.larger.report import write_report as write_larger_report
        from bench.experiments.report import write_report
        from bench.experiments.results import SETTINGS, Results

        if not (args.out / SETTINGS).exists():
            print(f"bench.experiments: {args.out} holds no results", file=sys.stderr)
            return REFUSED
        if args.larger:
            write_larger_report(LargerResults(args.out))
        else:
            write_report(Results(args.out))
        return 0
    if args.command == "low-precision":
        from bench.low_precision import training

        return training.run(args.quick, args.workers, args.out)
    if args.command == "prepare":
        gpt2.prepare()
        return 0
    try:
        if args.command == "reach" or args.larger:
            fashion_mnist_folder()  # asked for now, not when it is its turn
            larger = LargerResults(args.out)
            environment = larger.open_for(LARGER_TASKS)
        elif args.gpt2:
            runs = gpt2.Runs(args.out, args.tiny)
        else:
            grid, results = prepare(args)
    except (RuntimeError, ValueError) as error:
        print(f"bench.experiments: {error}", file=sys.stderr)
        return REFUSED
    if args.command == "reach":
        return reach(larger)
    if args.larger:
        return run_larger(larger, environment, args.workers)
    if not args.gpt2:
        return run(grid, results, args.workers)
    try:
        runs.make(args.seconds)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

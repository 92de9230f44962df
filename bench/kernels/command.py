"""python -m bench kernels: the command."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from typing import Any

import torch
from tqdm import tqdm

from bench.arguments import COUNT, POSITIVE, SEED, output_folder
from bench.environment import environment, folder_name
from bench.kernels.contestants import (
    ADAMW_BASELINE,
    SGD_BASELINE,
    Contestant,
    find_contestants,
    peer_versions,
)
from bench.kernels.correctness import WrongResult
from bench.kernels.devices import Device, find_device
from bench.kernels.parameter_lists import fit, model_list, parameter_lists
from bench.kernels.plots import write_plots
from bench.kernels.results import Report
from bench.kernels.suite import Plan, Suite, cell_bytes
from bench.kernels.tables import format_report

BUSY = 0.3  # other processes' load a core, from which on results suffer
INTERRUPTED = 130  # exit status: 128 + SIGINT, as a shell has it
# What --quick changes, unless an option is given.
QUICK = {
    "dtype": ["float32"],
    "cache": ["warm"],
    "rounds": 3,
    "seconds": 0.02,
    "max_parameters": 2**20,
}
# Of the free memory, for a whole cell: steps of the core contestants take little beside.
MEMORY_SHARE = 0.8

DTYPES = ("float32", "bfloat16", "float16", "float64")
OPTIMIZERS = ("adamw", "sgd")
CACHES = ("warm", "cold")


DESCRIPTION = """\
Times a step of AMAdamW and AMSGD, on every backend that is there, against torch's AdamW and
SGD, their compiled steps, and the optimizers of other packages that are installed. Checks each
against its reference first. Prints tables, and writes kernels.json and pictures.

AMAdamW updates with its cap for beta and repairs the tensors whose beta is another, so that what a
step costs depends on the gradients. On the fused backends it takes part with nothing missed, with
20% of the elements (whole tensors where there are such, else each tensor cut into fifths), with all
of them, and with memory_plane="anchored", which does not guess. The shares are looked up in beta
before and after each sample; another one stops the benchmark. "row" is beta_scope="row", on either
plane: a row stays in cache until its beta is known, and nothing is guessed."""


def describe_lists() -> str:
    """The parameter lists' names and what they are, a line for each."""
    lists = parameter_lists(1, 1).values()
    return "\n".join(["parameter lists:", *(f"  {p.name:<12} {p.source}" for p in lists)])


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "kernels",
        help="step times against torch's optimizers and the installed peers",
        description=DESCRIPTION,
        epilog=describe_lists(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    has_gpu = torch.cuda.is_available()
    add(
        "--device",
        "where the tensors are (%(default)s)",
        choices=("cpu", "cuda"),
        default="cuda" if has_gpu else "cpu",
    )
    add(
        "--dtype",
        "of parameters and gradients (float32 bfloat16)",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
    )
    add(
        "--optimizer",
        "kinds of optimizers (both)",
        nargs="+",
        choices=OPTIMIZERS,
        default=list(OPTIMIZERS),
    )
    add(
        "--lists",
        "parameter lists, with every contestant on each (the whole suite, where on most lists "
        "only the fused optimizers take part)",
        nargs="+",
        metavar="LIST",
        choices=list(parameter_lists(1, 1)),
    )
    add(
        "--model",
        "the parameters of your own model, in place of --lists",
        metavar="MODULE:FACTORY",
    )
    add(
        "--contestants",
        "only these, beside torch's fused optimizers (all)",
        nargs="+",
        metavar="NAME",
    )
    add(
        "--cache",
        "warm: steps one after the other; cold: caches flushed before each, on lists that would "
        "fit in them (both)",
        nargs="+",
        choices=CACHES,
        default=list(CACHES),
    )
    threads = torch.get_num_threads()
    add("--threads", "threads of torch (%(default)s)", type=COUNT, default=threads)
    add("--passes", "times that all is built and measured (%(default)s)", type=COUNT, default=2)
    add("--rounds", "samples a pass, at most (%(default)s)", type=COUNT, default=5)
    add(
        "--seconds",
        "of a contestant, list and pass, about (%(default)s)",
        type=POSITIVE,
        default=0.25,
    )
    add(
        "--max-parameters",
        "models are scaled down to so many and other lists left out (what fits in memory)",
        type=COUNT,
        default=sys.maxsize,
    )
    add("--seed", "of the order (%(default)s)", type=SEED, default=0)
    quick = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in QUICK.items())
    add("--quick", f"a look in under a minute, with other defaults: {quick}", action="store_true")
    add("--out", "folder (bench/results/DEVICE)", type=output_folder)
    parser.set_defaults(run=run, parser=parser, quick_defaults=QUICK)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 where a contestant's result is wrong; 130 where it was interrupted. What was
        measured by then is written.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error(f"--device cuda: torch {torch.__version__} sees no GPU")
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    folder = args.out or output_folder(f"bench/results/{folder_name(device.name)}")
    contestants, missing = find_contestants(device.device)
    plan, left_out = make_plan(args, device, choose(args, contestants))
    for name, reason in (missing | left_out).items():
        print(f"without {name}: {reason}")
    clocks, load = device.clocks(), os.getloadavg()[0]
    if load > BUSY * (os.cpu_count() or 1):
        print(
            f"The machine is busy (load {load:.1f}): expect noise. Steps of several threads wait "
            "for the slowest."
        )

    interrupted = False
    with device.limited_memory(), tqdm(unit="part", smoothing=0) as bar:

        def progress(doing: str, parts: int) -> None:
            bar.set_description_str(doing)
            bar.update(parts)

        suite = Suite(plan, device, progress)
        bar.total = suite.parts
        try:
            suite.check()
            suite.run()
        except WrongResult as error:
            bar.close()
            print(f"Stopped: a wrong result. {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            interrupted = True

    report = Report(
        settings={
            "device": args.device,
            "threads": args.threads,
            "lists": args.lists,
            "model": args.model,
            "passes": plan.passes,
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "seed": plan.seed,
            "quick": args.quick,
            "interrupted": interrupted,
            "last_level_cache_bytes": device.last_level,
        },
        environment={
            **environment(),
            "device": device.name,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "peers": peer_versions(),
            "load_before": load,
            "clocks_before": clocks,
            "clocks_after": device.clocks(),
        },
        missing=missing,
        rows=[row for row in suite.rows if row.seconds is not None or row.reason is not None],
    )
    print(format_report(report))
    report.write(folder / "kernels.json")
    pictures = write_plots(report, folder)
    print("Wrote " + ", ".join(str(path) for path in (folder / "kernels.json", *pictures)))
    return INTERRUPTED if interrupted else 0


def choose(args: argparse.Namespace, contestants: list[Contestant]) -> list[Contestant]:
    """The contestants that were asked for, and what they are compared with."""
    names = [c.name for c in contestants]
    unknown = [name for name in args.contestants or () if name not in names]
    if unknown:
        args.parser.error(f"--contestants: {unknown[0]!r} is not one of {', '.join(names)}")
    compared = {ADAMW_BASELINE, *([SGD_BASELINE] if "sgd" in args.optimizer else [])}
    return [
        c
        for c in contestants
        if c.name in compared
        or (c.optimizer in args.optimizer and (not args.contestants or c.name in args.contestants))
    ]


def make_plan(
    args: argparse.Namespace, device: Device, contestants: list[Contestant]
) -> tuple[Plan, dict[str, str]]:
    """The plan, and the lists that do not fit in memory with why."""
    try:
        asked = (
            [model_list(args.model)]
            if args.model
            else list(parameter_lists(device.l2, device.last_level).values())
        )
    except (ImportError, AttributeError, ValueError) as error:
        args.parser.error(f"--model: {error}")
    if args.lists:
        asked = [parameters for parameters in asked if parameters.name in args.lists]
    dtypes = [getattr(torch, name) for name in args.dtype]
    whole_suite = not args.lists and not args.model
    memory = int(MEMORY_SHARE * device.free_bytes())
    lists = []
    left_out = {}
    for parameters in asked:
        # A model is scaled down until all fit at once; a tensor of a given size is not.
        everyone = parameters.everyone or not whole_suite
        sides = sum(everyone or c.core for c in contestants) if parameters.scalable else 1
        in_memory = memory // max(cell_bytes(1, dtype, sides) for dtype in dtypes)
        fitting = fit(parameters, min(args.max_parameters, in_memory))
        if fitting is None:
            left_out[parameters.name] = (
                f"{parameters.numel:,} parameters are more than the limit of "
                f"{min(args.max_parameters, in_memory):,}"
            )
        else:
            lists.append(fitting)
    plan = Plan(
        lists=lists,
        dtypes=dtypes,
        caches=args.cache,
        contestants=contestants,
        whole_suite=whole_suite,
        memory=memory,
        passes=args.passes,
        rounds=args.rounds,
        seconds=args.seconds,
        seed=args.seed,
    )
    return plan, left_out

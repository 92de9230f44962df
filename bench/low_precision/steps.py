"""python -m bench low-precision: what state and parameters in few bits cost, and what they save."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from adamem_fused import AMAdamW
from bench.arguments import COUNT, SEED, add_device, output_folder
from bench.environment import environment, folder_name
from bench.kernels.contestants import (
    ADAMW_BASELINE,
    ADAMW_OPTIONS,
    LR,
    PEERS,
    Contestant,
    find_contestants,
    first_line,
    peer_versions,
)
from bench.kernels.correctness import FirstStep, WrongResult
from bench.kernels.devices import Device, find_device
from bench.kernels.parameter_lists import ParameterList, fit, parameter_lists
from bench.kernels.results import Spread
from bench.kernels.sides import Side, WrongShare, random_tensors
from bench.kernels.suite import cell_bytes
from bench.kernels.traffic import bytes_to_move
from bench.low_precision.contestants import BASELINE, FORMATS, new_optimizer
from bench.low_precision.results import OWN, RESULTS, Trainings
from bench.phase import format_cell, take_turns

NAME = "low-precision.json"
LIST = "gpt2-small"
# Those that nobody would pick are left out: rounded to nearest.
STORED = [
    BASELINE,
    "bfloat16 state",
    "int8 state",
    "bfloat16 parameters and state",
    "bfloat16 parameters, remainders, int8 state",
]
TORCH_BFLOAT16 = "bfloat16 parameters and state, to nearest"
# Of the time of torch's fused AdamW in float32, where aimed at.
AT_MOST = {
    "cpu": {"bfloat16 state": 1.3, "int8 state": 1.6},
    "cuda": {"bfloat16 parameters and state": 0.8},
}
PACKAGES = ("torchao", "bitsandbytes", "flashoptim")
LOSS_TASK = "gpt-python"
MEMORY_SHARE = 0.8  # of what is free
QUICK = {"passes": 1, "rounds": 2, "seconds": 0.01, "max_parameters": 2**23}


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "low-precision",
        help="state and parameters in few bits: step time, bytes, and other packages beside it",
        description="Times a step of AMAdamW on GPT-2 small's tensors, with one beta a tensor and "
        "one a row, with state and parameters in float32, bfloat16 and int8, and that of the "
        "installed packages' AdamW of 8 bits, each in turns with torch's fused AdamW in float32. "
        "Checks each first step before it. Prints a table, with bytes of state, memory at its peak "
        "and the losses that `python -m bench.experiments low-precision` has found, and writes "
        f"{NAME}. Not yet run on a GPU.",
    )
    add_device(parser)
    threads = torch.get_num_threads()
    parser.add_argument(
        "--threads", type=COUNT, default=threads, help="threads of torch (%(default)s)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the order (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a look in seconds, at a model that is scaled down"
    )
    parser.add_argument("--out", type=output_folder, help="folder (bench/results/DEVICE)")
    parser.set_defaults(
        run=run,
        parser=parser,
        quick_defaults=QUICK,
        # Times that all is built and measured; samples a pass, at most; seconds of a side in a
        # pass, about.
        passes=2,
        rounds=10,
        seconds=4.0,
        max_parameters=sys.maxsize,
    )


# ---- what is timed --------------------------------------------------------------------


def find_sides(device: torch.device) -> dict[tuple[str, str], tuple[Contestant, torch.dtype]]:
    """By optimizer and what it stores: the contestants, and the dtype of their parameters."""
    there = {contestant.name: contestant for contestant in find_contestants(device)[0]}
    adamw = there[ADAMW_BASELINE]
    found = {
        (ADAMW_BASELINE, BASELINE): (adamw, torch.float32),
        (ADAMW_BASELINE, TORCH_BFLOAT16): (adamw, torch.bfloat16),
    }
    for optimizer in ("AMAdamW", "AMAdamW, row"):
        for stored in STORED:
            found[optimizer, stored] = ours(optimizer, stored), FORMATS[stored].params
    for peer in PEERS:
        if peer.package in PACKAGES and peer.name in there:
            found[peer.name, OWN] = there[peer.name], torch.float32
    return found


def ours(optimizer: str, stored: str) -> Contestant:
    by_row = optimizer.endswith("row")
    is_low = stored != BASELINE

    def make(params: Sequence[Tensor]) -> Optimizer:
        return new_optimizer(optimizer, stored, params, LR, seed=0)

    reference = partial(
        AMAdamW, lr=LR, backend="reference", beta_scope="row" if by_row else "tensor"
    )
    return Contestant(
        f"{optimizer}, {stored}",
        "adamw",
        make,
        reference,
        adaptive=True,
        by_row=by_row,
        missed=None if by_row else 0.0,
        quantized=is_low,
        low=is_low,
        low_guesses=is_low and FORMATS[stored].guesses,
    )


def measure_pass(
    device: Device,
    parameters: ParameterList,
    rows: dict[tuple[str, str], dict[str, Any]],
    args: argparse.Namespace,
    order: random.Random,
    bar: tqdm[Any],
) -> None:
    """Times each contestant in turns with torch's fused AdamW in float32, and adds to its row.

    Raises:
        WrongResult, WrongShare: a first step differs, or another share of betas is at the cap.
    """
    sides = find_sides(device.device)
    made = {
        dtype: [random_tensors(parameters.shapes, dtype, device.device, i) for i in range(3)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    start, *gradient_sets = made[torch.float32]
    baseline = Side(sides[ADAMW_BASELINE, BASELINE][0], start, gradient_sets)
    for key in order.sample(list(sides), len(sides)):
        bar.set_description_str(", ".join(key))
        contestant, dtype = sides[key]
        try:
            found = measure_side(device, contestant, made[dtype], baseline, args, order)
        except (WrongResult, WrongShare):
            raise
        except Exception as error:
            rows[key]["reason"] = first_line(error)
        else:
            for name in ("own", "baseline"):
                rows[key].setdefault(name, []).append(found.pop(name))
            rows[key] |= found
        gc.collect()
        bar.update()


def measure_side(
    device: Device,
    contestant: Contestant,
    tensors: Sequence[list[Tensor]],
    baseline: Side,
    args: argparse.Namespace,
    order: random.Random,
) -> dict[str, Any]:
    """Seconds of a contestant's rounds and of the baseline's beside them, and bytes.

    Args:
        tensors: parameters to start from, and two sets of gradients.
    """
    start, *gradient_sets = tensors
    side = Side(contestant, start, gradient_sets)
    side.next_gradients()
    first_step = FirstStep(side)
    side.step()
    first_step.check(contestant)
    device.measure(side, 1, cold=False)  # some compile this one too
    taken = device.measure(side, 1, cold=False).step
    facts = look_at(device, contestant, side)
    rounds = min(max(int(args.seconds / (4 * taken)), 2), args.rounds)
    sides = {"own": side, "baseline": baseline}
    seconds = take_turns(device, sides, rounds, args.seconds / 8, order)
    side.missed()
    return {**seconds, **facts}


def look_at(device: Device, contestant: Contestant, side: Side) -> dict[str, Any]:
    """What does not vary from step to step, in bytes."""
    state, last_level = side.state_bytes(), device.last_level
    shapes = [tuple(param.shape) for param in side.params]
    dtype, params = side.params[0].dtype, sum(param.nbytes for param in side.params)
    temporary = device.temporary_bytes(side)
    return {
        "state_bytes": state,
        "bytes_to_move": bytes_to_move(contestant, shapes, dtype, state, last_level),
        "peak_bytes": None if temporary is None else 2 * params + state + temporary,
    }


# ---- the command ----------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes the results.

    Returns:
        0; 1 where a result is wrong.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error(f"--device cuda: torch {torch.__version__} sees no GPU")
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    folder = args.out or output_folder(f"bench/results/{folder_name(device.name)}")
    # Beside each other: torch's, another, and what both start from, in either dtype.
    limit = int(MEMORY_SHARE * device.free_bytes() / (2 * cell_bytes(1, torch.float32, 2)))
    full = parameter_lists(device.l2, device.last_level)[LIST]
    parameters = fit(full, min(limit, args.max_parameters))
    assert parameters is not None  # a model is scaled down
    sides = find_sides(device.device)
    rows: dict[tuple[str, str], dict[str, Any]] = {
        key: {"optimizer": key[0], "stored": key[1], "dtype": str(dtype).removeprefix("torch.")}
        for key, (_, dtype) in sides.items()
    }
    order = random.Random(args.seed)
    try:
        with tqdm(total=args.passes * len(sides), unit="part") as bar, device.limited_memory():
            for _ in range(args.passes):
                measure_pass(device, parameters, rows, args, order, bar)
    except (WrongResult, WrongShare) as error:
        print(f"Stopped: a wrong result. {error}", file=sys.stderr)
        return 1
    result = {
        "environment": {
            **environment(),
            "device": device.name,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "peers": peer_versions(),
        },
        "settings": {
            "device": args.device,
            "threads": args.threads,
            "passes": args.passes,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "seed": args.seed,
            "options": ADAMW_OPTIONS,
        },
        "parameters": parameters.label,
        "numel": parameters.numel,
        "tensors": len(parameters.shapes),
        "rows": list(rows.values()),
        "missing": {
            name: reason
            for name, reason in find_contestants(device.device)[1].items()
            if any(peer.name == name and peer.package in PACKAGES for peer in PEERS)
        },
    }
    cells = table_cells(result, Trainings.read(RESULTS))
    print(tabulate(cells, headers=HEADERS, disable_numparse=True))
    for reason in reasons(result):
        print(reason)
    path = folder / NAME
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"Wrote {path}")
    return 0


# ---- the table ------------------------------------------------------------------------

HEADERS = ["optimizer", "stored", "ms", f"/ {ADAMW_BASELINE}", "state", "with the parameter"]
HEADERS += ["moved", "peak MB", "held-out loss"]


def table_cells(result: dict[str, Any], trainings: Trainings | None) -> list[list[str]]:
    """A row for each that was measured. Bytes are those of a parameter."""
    return list(_table_cells(result, trainings))


def _table_cells(result: dict[str, Any], trainings: Trainings | None) -> Iterator[list[str]]:
    numel, at_most = result["numel"], AT_MOST[result["settings"]["device"]]
    for row in result["rows"]:
        if "own" not in row:
            continue
        state = row["state_bytes"] / numel
        param = 4 if row["dtype"] == "float32" else 2
        peak = row["peak_bytes"]
        aimed_at = at_most.get(row["stored"]) if row["optimizer"].startswith("AMAdamW") else None
        yield [
            row["optimizer"],
            row["stored"],
            f"{1e3 * statistics.median([s for rounds in row['own'] for s in rounds]):.1f}",
            format_cell(ratio(row), at_most=aimed_at),
            f"{state:.2f}",
            f"{state + param:.2f}",
            f"{row['bytes_to_move'] / numel:.1f}",
            "-" if peak is None else f"{peak / 1e6:,.0f}",
            _loss(row, trainings),
        ]


def ratio(row: dict[str, Any]) -> Spread | None:
    """Of its time to that of torch's fused AdamW in float32, in the same rounds."""
    passes = zip(row["own"], row["baseline"], strict=True)
    return Spread.of([[a / b for a, b in zip(own, base, strict=True)] for own, base in passes])


def _loss(row: dict[str, Any], trainings: Trainings | None) -> str:
    """The mean of the seeds, and the difference to float32's, in its training."""
    if trainings is None or LOSS_TASK not in trainings.tasks:
        return "-"
    optimizer = row["optimizer"].removesuffix(" fused")
    losses = trainings.losses(LOSS_TASK, optimizer, row["stored"])
    if not losses:
        return "-"
    verdict = trainings.verdict(LOSS_TASK, optimizer, row["stored"])
    if verdict is None:
        return f"{statistics.fmean(losses):.3f}"
    return f"{statistics.fmean(losses):.3f} ({verdict.difference:+.3f}: {verdict.outcome})"


def reasons(result: dict[str, Any]) -> list[str]:
    """A line for each that was not measured."""
    failed = {row["optimizer"]: row["reason"] for row in result["rows"] if "reason" in row}
    return [f"{name}: {reason}" for name, reason in {**result["missing"], **failed}.items()]

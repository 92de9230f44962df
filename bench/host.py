"""python -m bench host: what a step of a GPU backend takes on the host, its launches left out."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

from adamem_fused import AMSGD, AMAdamW, triton
from bench.arguments import COUNT, output_folder
from bench.environment import environment

CHANGES = ("nothing", "gradients", "everything", "state replaced")


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "host",
        help="a GPU step's time on the host: needs no GPU",
        description="Times a step of the triton backend on CPU tensors with its launches left "
        "out: collecting the tensors, looking whether an address has changed, and making the "
        'tables anew where one has. "state replaced": everything, and the state is of new '
        "tensors, as after loading a checkpoint, whose predecessors are freed within the step. "
        "The table's columns are the quartiles in microseconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tensors", type=COUNT, default=1000, help="parameters")
    parser.add_argument("--steps", type=COUNT, default=300, help="that are timed")
    parser.add_argument("--out", type=output_folder, help="folder for host.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    samples = {
        (cls.__name__, change): step_times(cls, change, args.tensors, args.steps)
        for cls in (AMAdamW, AMSGD)
        for change in CHANGES
    }
    rows = [
        [*key, *(f"{1e6 * value:.0f}" for value in statistics.quantiles(times, n=4))]
        for key, times in samples.items()
    ]
    headers = ["optimizer", "new addresses", "25%", "median", "75%"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] * 2 + ["right"] * 3))
    if args.out is not None:
        results = {
            "environment": environment(),
            "tensors": args.tensors,
            "seconds": {f"{name}, {change}": times for (name, change), times in samples.items()},
        }
        Path(args.out, "host.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


def step_times(
    cls: type[AMAdamW] | type[AMSGD], change: str, tensors: int, steps: int
) -> list[float]:
    """Seconds of each step, after some to warm up.

    change: of which tensors the addresses are new at every step, one of CHANGES.
    """
    params = [torch.randn(4, 8).requires_grad_() for _ in range(tensors)]
    grads = [[torch.randn_like(param) for param in params] for _ in range(2)]
    times = []
    with (
        mock.patch.object(triton, "unavailable", lambda device: None),
        mock.patch.object(triton, "_launch", lambda *args, **options: None),
    ):
        optimizer = cls(params, backend="triton")
        set_gradients(params, grads[0])
        optimizer.step()  # makes the state
        memories = [[t.detach().clone() for t in tensors_of(optimizer)] for _ in range(2)]
        for step in range(steps + 5):
            if change == "everything":
                for tensor, memory in zip(tensors_of(optimizer), memories[step % 2], strict=True):
                    tensor.data = memory
            elif change == "state replaced":
                replace_state(optimizer)
            set_gradients(params, grads[0 if change == "nothing" else step % 2])
            settle()
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
    return times[5:]


def set_gradients(params: list[Tensor], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def tensors_of(optimizer: AMAdamW | AMSGD) -> list[Tensor]:
    """Every parameter and its state."""
    return [t for param, state in optimizer.state.items() for t in (param, *state.values())]


def replace_state(optimizer: AMAdamW | AMSGD) -> None:
    """Gives every parameter other memory and other tensors for its state."""
    for param, state in optimizer.state.items():
        param.data = param.data.clone()
        state.update({name: tensor.clone() for name, tensor in state.items()})


def settle() -> None:
    """Does what making tensors has left for later, so that the step is not to pay for it."""
    gc.collect(0)
    torch.empty(1 << 16)  # glibc's malloc sorts what was freed at the next large block

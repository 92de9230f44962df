"""python -m bench host: what a step of a GPU backend takes on the host, its launches left out."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import triton
from bench.arguments import COUNT, output_folder
from bench.environment import environment, folder_name
from bench.kernels.devices import find_device

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
        'All with one beta a tensor, and with one a "row", of which a tensor has four. '
        "Prints medians and quartiles, and writes host.json.",
    )
    parser.add_argument("--tensors", type=COUNT, default=1000, help="parameters (%(default)s)")
    parser.add_argument("--steps", type=COUNT, default=300, help="that are timed (%(default)s)")
    parser.add_argument("--out", type=output_folder, help="folder (bench/results/DEVICE)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes host.json."""
    if find_spec("triton") is None:
        raise SystemExit("bench host needs triton: pip install triton")
    device = find_device("cpu")
    folder = args.out or output_folder(f"bench/results/{folder_name(device.name)}")
    result = {
        "environment": {**environment(), "device": device.name},
        "tensors": args.tensors,
        "seconds": {
            f"{cls.__name__}{', row' if scope == 'row' else ''}": {
                change: step_times(cls, change, args.tensors, args.steps, scope)
                for change in CHANGES
            }
            for cls in (AMAdamW, AMSGD)
            for scope in ("tensor", "row")
        },
    }
    print(tabulate(table_cells(result), headers=HEADERS, disable_numparse=True))
    path = folder / "host.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {path}")
    return 0


HEADERS = ["optimizer", "new addresses", "us a step"]


def table_cells(result: dict[str, Any]) -> list[list[str]]:
    """A row for each optimizer and change: the median and the quartiles."""
    cells = []
    for name, changes in result["seconds"].items():
        for change, times in changes.items():
            low, median, high = (f"{1e6 * t:.0f}" for t in statistics.quantiles(times, n=4))
            cells.append([name, change, f"{median} ({low} to {high})"])
    return cells


def step_times(
    cls: type[AMAdamW] | type[AMSGD], change: str, tensors: int, steps: int, scope: str
) -> list[float]:
    """Seconds of each step, after some to warm up.

    change: of which tensors the addresses are new at every step, one of CHANGES.
    scope: the beta_scope.
    """
    params = [torch.randn(4, 16).requires_grad_() for _ in range(tensors)]
    grads = [[torch.randn_like(param) for param in params] for _ in range(2)]
    times = []
    with (
        mock.patch.object(triton, "unavailable", lambda device: None),
        mock.patch.object(triton, "_launch", lambda *args, **options: None),
    ):
        optimizer = cls(params, backend="triton", beta_scope=scope)
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

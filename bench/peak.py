"""What gradient release saves of a training's memory, and what it takes of its time.

`python -m bench.peak DEVICE ordinary` and `... released` print the whole peak in bytes: a process
each, as memory that is freed stays the process's own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamem_fused import AMAdamW, release_gradients
from bench.demo_model import GPT, VOCABULARY

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 24, 256, 4, 32, 4
KINDS = {"ordinary": False, "released": True}  # whether gradients are released
STEPS = 3  # of which the whole peak is taken
TIMED = 11  # pairs of steps


def new_model() -> GPT:
    model = GPT(CONTEXT, WIDTH, HEADS, LAYERS)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


class Training:
    """A training of random bytes, with gradients released or not."""

    def __init__(self, releases: bool, device: torch.device) -> None:
        self.device = device
        self.model = new_model().to(device)
        self.optimizer = AMAdamW(self.model.parameters())
        if releases:
            release_gradients(self.model, self.optimizer)
        bytes_ = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1), dtype=torch.uint8)
        self.batch = bytes_.to(device)

    def step(self) -> float:
        """A training step. Returns the seconds of its backward pass and optimizer."""
        loss = self.model(self.batch)
        synchronize(self.device)
        start = time.perf_counter()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(releases: bool, device: torch.device) -> int:
    """The largest number of bytes of parameters' gradients that are there at once."""
    model = new_model().to(device)
    params = list(model.parameters())
    peak = 0

    def look(param: Tensor) -> None:
        nonlocal peak
        alive = [p.grad for p in params if p.grad is not None]
        peak = max(peak, sum(grad.numel() * grad.element_size() for grad in alive))

    # Before the hooks of a release, and so called while the gradient is there.
    for param in params:
        param.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    optimizer = AMAdamW(params)
    if releases:
        release_gradients(model, optimizer)
    batch = torch.zeros(1, CONTEXT + 1, dtype=torch.uint8, device=device)
    model(batch).backward()
    return peak


def whole(releases: bool, device: torch.device) -> int:
    """By how many bytes memory grows in a process's first training steps, state included."""
    training = Training(releases, device)
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else resident("VmRSS")
    for _ in range(STEPS):
        training.step()
    return (torch.cuda.max_memory_allocated(device) if gpu else resident("VmHWM")) - before


def resident(field: str) -> int:
    """The process's resident memory in bytes: VmRSS now, VmHWM at most."""
    # Not getrusage: its maximum is that of the process before exec too.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def seconds(device: torch.device) -> dict[str, list[float]]:
    """Of backward pass and optimizer, in turns."""
    trainings = {kind: Training(releases, device) for kind, releases in KINDS.items()}
    for training in trainings.values():
        training.step()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = list(KINDS)
    for _ in range(TIMED):
        for kind in order:
            times[kind].append(trainings[kind].step())
        order.reverse()
    return times


def measure(device: torch.device) -> dict[str, Any]:
    """Bytes of gradients, of the whole peak, and seconds, each for the KINDS."""
    params = list(new_model().parameters())
    return {
        "parameters": sum(param.numel() for param in params),
        "tensors": len(params),
        "gradients": {kind: gradients(releases, device) for kind, releases in KINDS.items()},
        "whole": {kind: in_own_process(kind, device) for kind in KINDS},
        "seconds": seconds(device),
    }


def in_own_process(kind: str, device: torch.device) -> int:
    command = [sys.executable, "-m", "bench.peak", str(device), kind]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


HEADERS = [f"GPT of {LAYERS} blocks", *KINDS, "ratio"]


def table_cells(result: dict[str, Any]) -> list[list[str]]:
    """A row for each of gradients, whole peak and time, with the released over the ordinary."""
    cells = []
    for name, key in (("gradients at once, MB", "gradients"), ("whole peak, MB", "whole")):
        ordinary, released = (result[key][kind] for kind in KINDS)
        sizes = [f"{size / 1e6:.1f}" for size in (ordinary, released)]
        cells.append([name, *sizes, f"{released / ordinary:.3f}"])
    times = [result["seconds"][kind] for kind in KINDS]
    medians = [f"{1e3 * statistics.median(own):.1f}" for own in times]
    cells.append(["backward and step, ms", *medians, format_ratio(*times)])
    return cells


def format_ratio(ordinary: Sequence[float], released: Sequence[float]) -> str:
    """The median of the pairs' ratios; in brackets the quartiles."""
    ratios = [own / base for base, own in zip(ordinary, released, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    print(whole(KINDS[sys.argv[2]], torch.device(sys.argv[1])))

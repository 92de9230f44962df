"""python -m bench train: what the optimizer is of a training step, in a small GPT.

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from adamem_fused import AMAdamW
from bench.arguments import COUNT, SEED, output_folder
from bench.demo_model import GPT, VOCABULARY
from bench.environment import environment, folder_name
from bench.kernels.devices import find_device

CONTESTANTS: dict[str, Callable[..., Optimizer]] = {
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "AMAdamW fused": partial(AMAdamW, lr=1e-3, fused=True),
}
QUICK = {"width": 32, "layers": 2, "batch_size": 2, "steps": 2, "rounds": 2}
WARM_UP_STEPS = 2


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "train",
        help="tokens a second and the optimizer's share, in training a small GPT",
        description="Trains a small byte-level GPT on random bytes with torch's fused AdamW and "
        "with AMAdamW, in turns, and writes train.json: tokens a second, and the share of a "
        "training step that is the optimizer's.",
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if has_gpu else "cpu",
        help="where (%(default)s)",
    )
    for name, default, text in (
        ("--width", 256, "of the model"),
        ("--layers", 4, "of the model"),
        ("--batch-size", 8, "windows a step"),
        ("--context", 128, "bytes of a window"),
        ("--steps", 8, "training steps of a round"),
        ("--rounds", 9, "rounds; in each, the two take turns"),
        ("--threads", torch.get_num_threads(), "threads of torch"),
    ):
        parser.add_argument(name, type=COUNT, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights and data (%(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a look in seconds, with other defaults: "
        + ", ".join(f"{key.replace('_', '-')} {value}" for key, value in QUICK.items()),
    )
    parser.add_argument("--out", type=output_folder, help="folder (bench/results/DEVICE)")
    parser.set_defaults(run=run, parser=parser, quick_defaults=QUICK)


def _nothing() -> None:
    """There is nothing to wait for."""


class Training:
    """A model, its optimizer, and the times of its steps."""

    def __init__(self, make: Callable[..., Optimizer], args: argparse.Namespace) -> None:
        self.model = GPT(args.context, args.width, heads=4, layers=args.layers)
        self.model.init_weights(torch.Generator().manual_seed(args.seed))
        self.model.to(args.device)
        self.optimizer = make(self.model.parameters())
        self.synchronize: Callable[[], None] = (
            torch.cuda.synchronize if args.device == "cuda" else _nothing
        )

    def step(self, batch: Tensor) -> tuple[float, float]:
        """Seconds of a training step, and of its optimizer's."""
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(batch).backward()
        self.synchronize()
        before = time.perf_counter()
        self.optimizer.step()
        self.synchronize()
        end = time.perf_counter()
        return end - start, end - before

    def round(self, batches: list[Tensor]) -> tuple[float, float]:
        """Medians of some steps."""
        times = [self.step(batch) for batch in batches]
        whole, optimizer = zip(*times, strict=True)
        return statistics.median(whole), statistics.median(optimizer)


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes train.json."""
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    folder = args.out or output_folder(f"bench/results/{folder_name(device.name)}")
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, args.context + 1)
    batches = [
        torch.randint(VOCABULARY, shape, generator=generator).to(device.device)
        for _ in range(args.steps)
    ]
    trainings = {name: Training(make, args) for name, make in CONTESTANTS.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
    for training in trainings.values():
        training.round(batches[:WARM_UP_STEPS])
    for number in tqdm(range(args.rounds), unit="round"):
        order = list(trainings) if number % 2 == 0 else list(trainings)[::-1]
        for name in order:
            rounds[name].append(trainings[name].round(batches))

    model = next(iter(trainings.values())).model
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("run", "parser", "quick_defaults", "out")
    }
    result = {
        "settings": settings,
        "environment": {
            **environment(),
            "device": device.name,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        },
        "parameters": sum(param.numel() for param in model.parameters()),
        "tensors": len(list(model.parameters())),
        "tokens": args.batch_size * args.context,
        "step_seconds": {name: [whole for whole, _ in r] for name, r in rounds.items()},
        "optimizer_seconds": {name: [own for _, own in r] for name, r in rounds.items()},
    }
    print(tabulate(table_cells(result), headers=HEADERS, disable_numparse=True))
    write_json(result, folder / "train.json")
    print(f"Wrote {folder / 'train.json'}")
    return 0


HEADERS = ["optimizer", "tokens a second", "ms a training step", "ms of the optimizer", "share"]


def table_cells(result: dict[str, Any]) -> list[list[str]]:
    """A row for each contestant, its figures medians over rounds."""
    cells = []
    for name, steps in result["step_seconds"].items():
        own = result["optimizer_seconds"][name]
        step = statistics.median(steps)
        share = statistics.median(a / b for a, b in zip(own, steps, strict=True))
        cells.append(
            [
                name,
                f"{result['tokens'] / step:,.0f}",
                f"{1e3 * step:.2f}",
                f"{1e3 * statistics.median(own):.2f}",
                f"{share:.1%}",
            ]
        )
    return cells


def write_json(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

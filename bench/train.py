"""python -m bench train: the optimizer's time over whole trainings of two small GPTs.

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from adamem_fused import AMAdamW, param_groups
from bench import demo
from bench.arguments import COUNT, SEED, add_device, output_folder
from bench.demo_text import TRAINING_FILES, read_text, standard_library
from bench.environment import environment, folder_name
from bench.kernels.devices import find_device
from bench.kernels.results import Spread

BASELINE = "AdamW fused"
CONTESTANTS: dict[str, Callable[..., Optimizer]] = {
    BASELINE: partial(torch.optim.AdamW, fused=True),
    "AMAdamW fused": partial(AMAdamW, fused=True),
    "AMAdamW fused, row": partial(AMAdamW, beta_scope="row", fused=True),
}
AT_MOST = {"AMAdamW fused": 1.05}  # of the baseline's time, over a whole training, where aimed at
PARTS = 10  # of a training, whose means are kept

# Steps, threads and seed come from the command line.
DEMO = demo.Config(
    steps=1, batch_size=32, lr=3e-3, weight_decay=0.1, seed=0, threads=1, eval_every=1,
    eval_windows=1,
)  # fmt: skip
MODELS = {
    "the demo's": DEMO,
    "2 M": replace(DEMO, batch_size=8, lr=1e-3, context=128, width=192, layers=4),
}
QUICK = {"steps": 3}


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "train",
        help="the optimizer's time over a training, against torch's fused AdamW's",
        description="Trains two small byte-level GPTs, the demo's and one of 2 M parameters, on "
        "Python's own source with torch's fused AdamW and with AMAdamW, one beta a tensor and one "
        "a row, which take turns from step to step, and writes train.json: tokens a second, the "
        "optimizer's share of a training step, its time over the whole training to AdamW's, and "
        "the share of the parameters whose beta was at its cap.",
    )
    add_device(parser)
    for name, default, text in (
        ("--steps", 600, "training steps"),
        ("--threads", torch.get_num_threads(), "threads of torch"),
    ):
        parser.add_argument(name, type=COUNT, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights and data (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a look in seconds, of 3 steps")
    parser.add_argument("--out", type=output_folder, help="folder (bench/results/DEVICE)")
    parser.set_defaults(run=run, parser=parser, quick_defaults=QUICK)


def _nothing() -> None:
    """There is nothing to wait for."""


class Training:
    """A model, its optimizer, and what was measured of each of its steps."""

    def __init__(
        self, make: Callable[..., Optimizer], config: demo.Config, device: torch.device
    ) -> None:
        self.model = demo.new_model(config).to(device)
        groups = param_groups(self.model, config.weight_decay)
        self.optimizer = make(groups, lr=config.lr)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=config.steps)
        self.synchronize: Callable[[], None] = (
            torch.cuda.synchronize if device.type == "cuda" else _nothing
        )
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.at_cap: list[float] = []

    def step(self, batch: Tensor) -> None:
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(batch).backward()
        self.synchronize()
        before = time.perf_counter()
        self.optimizer.step()
        self.synchronize()
        end = time.perf_counter()
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - before)
        self.scheduler.step()
        if isinstance(self.optimizer, AMAdamW):
            self.at_cap.append(self.optimizer.metrics()["at_cap"].item())

    def measured(self) -> dict[str, list[float]]:
        return {
            "step_seconds": means(self.step_seconds),
            "optimizer_seconds": means(self.optimizer_seconds),
            "at_cap": means(self.at_cap),
        }


def means(values: Sequence[float]) -> list[float]:
    """Of at most PARTS parts of nearly equal length, in order."""
    count = min(PARTS, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)] if values else []
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(bounds)]


def train(config: demo.Config, content: bytes, device: torch.device) -> dict[str, Any]:
    """A whole training of each contestant, in turns from step to step."""
    trainings = {name: Training(make, config, device) for name, make in CONTESTANTS.items()}
    order = list(trainings.values())
    batches = demo.training_batches(content, config)
    for batch in tqdm(batches, total=config.steps, unit="step"):
        for training in order:
            training.step(batch.to(device))
        order.reverse()
    params = list(order[0].model.parameters())
    return {
        "parameters": sum(param.numel() for param in params),
        "tensors": len(params),
        "tokens": config.batch_size * config.context,
        "config": asdict(config),
        "contestants": {name: training.measured() for name, training in trainings.items()},
    }


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes train.json."""
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    folder = args.out or output_folder(f"bench/results/{folder_name(device.name)}")
    content = read_text(TRAINING_FILES, standard_library()).content
    given = {"steps": args.steps, "threads": args.threads, "seed": args.seed}
    result = {
        "environment": {
            **environment(),
            "device": device.name,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        },
        "models": {
            name: train(replace(config, **given), content, device.device)
            for name, config in MODELS.items()
        },
    }
    print(tabulate(table_cells(result), headers=HEADERS, disable_numparse=True))
    write_json(result, folder / "train.json")
    print(f"Wrote {folder / 'train.json'}")
    return 0


HEADERS = [
    *("GPT", "parameters", "steps", "optimizer", "tokens a second", "ms a training step"),
    *("ms of the optimizer", "share", "at the cap", f"to {BASELINE}'s"),
]


def table_cells(result: dict[str, Any]) -> list[list[str]]:
    """A row for each model and contestant, its figures means over the training."""
    cells = []
    for model, found in result["models"].items():
        base = found["contestants"][BASELINE]["optimizer_seconds"]
        for name, measured in found["contestants"].items():
            own = measured["optimizer_seconds"]
            step, optimizer = statistics.fmean(measured["step_seconds"]), statistics.fmean(own)
            cells.append(
                [
                    model,
                    f"{found['parameters'] / 1e6:.2f} M",
                    f"{found['config']['steps']:,}",
                    name,
                    f"{found['tokens'] / step:,.0f}",
                    f"{1e3 * step:.2f}",
                    f"{1e3 * optimizer:.3f}",
                    f"{optimizer / step:.1%}",
                    f"{statistics.fmean(measured['at_cap']):.0%}" if measured["at_cap"] else "-",
                    "-" if name == BASELINE else format_ratio(own, base, AT_MOST.get(name)),
                ]
            )
    return cells


def format_ratio(own: Sequence[float], base: Sequence[float], at_most: float | None) -> str:
    """Of the times over the whole training; in brackets the quartiles of its parts'."""
    ratio = sum(own) / sum(base)
    parts = Spread.of([[a / b for a, b in zip(own, base, strict=True)]])
    assert parts is not None
    cell = f"{ratio:.2f} ({parts.low:.2f} to {parts.high:.2f})"
    if at_most is None:
        return cell
    return f"{cell} of {at_most:.2f}{'' if ratio <= at_most else ', not met'}"


def write_json(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

"""Trains a small GPT on Python's own source with AdamW and with AMAdamW, and compares.

    python -m bench.demo

The contestants start from the same weights and see the same bytes in the same order, with
the same learning rate (cosine to zero, no warm-up) and weight decay; only the optimizer
differs. Prints a table, and writes demo.json and demo.png.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from adamem_fused import AMAdamW, param_groups
from adamem_fused.backends import cpu
from bench.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, output_folder
from bench.demo_model import GPT, tensor_label
from bench.demo_report import ROWS_OF, Comparison, Run, format_table, plot, write_json
from bench.demo_text import HELD_OUT_FILES, TRAINING_FILES, read_text, standard_library

BASELINE = "AdamW"
# The cap that the paper pairs with memory_lambda = 0.1, against AdamW's customary 0.9.
BETA_CAP = 0.89
CONTESTANTS: dict[str, Callable[..., Optimizer]] = {
    BASELINE: partial(torch.optim.AdamW, betas=(0.9, 0.999), fused=True),
    "AMAdamW level": partial(AMAdamW, betas=(BETA_CAP, 0.999), memory_plane="level", fused=True),
    "AMAdamW anchored": partial(
        AMAdamW, betas=(BETA_CAP, 0.999), memory_plane="anchored", fused=True
    ),
    "AMAdamW level, row": partial(
        AMAdamW, betas=(BETA_CAP, 0.999), memory_plane="level", beta_scope="row", fused=True
    ),
}

EVAL_BATCH_SIZE = 128
SMOOTHING = 0.95  # of the loss that the progress bar shows
QUICK = {"steps": 20, "batch_size": 4, "eval_every": 10, "eval_windows": 32, "threads": 1}
INTERRUPTED = 130  # exit status: 128 + SIGINT, as a shell has it


@dataclass(frozen=True)
class Config:
    """What every contestant has in common.

    Attributes:
        steps: optimizer steps.
        batch_size: windows a step, each of `context` bytes to predict.
        lr: learning rate of the first step; it falls to zero as a cosine.
        weight_decay: of the matrices, embeddings included; the norms' vectors have none.
        seed: of the initial weights and of the order of the data.
        threads: torch's threads.
        eval_every: steps from one held-out loss to the next.
        eval_windows: windows that every held-out loss is measured on.
        context, width, heads, layers: the model's shape.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    threads: int
    eval_every: int
    eval_windows: int
    context: int = 64
    width: int = 96
    heads: int = 4
    layers: int = 3


# ---- data and model -------------------------------------------------------------------


def all_windows(content: bytes, context: int) -> Tensor:
    """Every run of context + 1 bytes in the text, [windows, context + 1] uint8, a view."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).unfold(0, context + 1, 1)


def held_out_windows(content: bytes, config: Config) -> Tensor:
    """The windows that every held-out loss is measured on, spread evenly over the text."""
    windows = all_windows(content, config.context)
    places = torch.linspace(0, len(windows) - 1, config.eval_windows, dtype=torch.float64)
    return windows[places.long()]


def training_batches(content: bytes, config: Config) -> Iterator[Tensor]:
    """A batch a step, [batch_size, context + 1] uint8: the same ones for the same seed."""
    windows = all_windows(content, config.context)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        yield windows[torch.randint(len(windows), (config.batch_size,), generator=generator)]


def new_model(config: Config) -> GPT:
    """The model with its initial weights, from the seed alone."""
    model = GPT(config.context, config.width, config.heads, config.layers)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


# ---- training -------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: GPT, windows: Tensor) -> float:
    """Mean loss of [windows, context + 1] windows, in nats a byte."""
    total = 0.0
    for batch in torch.split(windows, EVAL_BATCH_SIZE):
        total += model(batch).item() * len(batch)
    return total / len(windows)


def last_betas(optimizer: Optimizer, model: nn.Module) -> list[float]:
    """Each tensor's beta1 of the last step; the mean over its rows where they have their own."""
    if isinstance(optimizer, AMAdamW):
        return torch.stack(list(optimizer.betas_by_name(model).values())).tolist()
    beta: float = optimizer.param_groups[0]["betas"][0]
    return [beta for _ in model.parameters()]


def train(name: str, config: Config, training: bytes, held_out: bytes) -> Run:
    """One contestant's run, to its end or to its first loss that is not finite."""
    start = time.perf_counter()
    model = new_model(config)
    optimizer = CONTESTANTS[name](param_groups(model, config.weight_decay), lr=config.lr)
    scheduler = CosineAnnealingLR(optimizer, T_max=config.steps)
    windows = held_out_windows(held_out, config)
    run = Run(name, tensors=[tensor_label(name) for name, _ in model.named_parameters()])

    def evaluate(step: int) -> bool:
        """Records the held-out loss after `step` steps; False if it is not finite."""
        loss = held_out_loss(model, windows)
        if not math.isfinite(loss):
            return False
        run.eval_steps.append(step)
        run.held_out_losses.append(loss)
        return True

    looked_at = list(model.parameters())[run.tensors.index(ROWS_OF)]
    batches = training_batches(training, config)
    smoothed = math.nan
    evaluate(0)
    with tqdm(batches, desc=f"{name:18}", total=config.steps, unit="step") as bar:
        for step, batch in enumerate(bar, start=1):
            loss = model(batch)
            value = loss.item()
            if not math.isfinite(value):
                run.diverged_at = step
                break
            loss.backward()

            step_start = time.perf_counter()
            optimizer.step()
            run.optimizer_ms.append(1e3 * (time.perf_counter() - step_start))

            optimizer.zero_grad()
            scheduler.step()
            betas = last_betas(optimizer, model)
            run.train_losses.append(value)
            run.betas.append(betas)
            if isinstance(optimizer, AMAdamW):
                run.at_cap.append(optimizer.metrics()["at_cap"].item())
                beta = optimizer.state[looked_at]["beta"]
                if beta.dim() > 0:
                    run.row_betas.append(beta.clone())

            smoothed = value if step == 1 else SMOOTHING * smoothed + (1 - SMOOTHING) * value
            bar.set_postfix_str(
                f"loss {smoothed:.3f}, mean beta {sum(betas) / len(betas):.2f}", refresh=False
            )
            if (step % config.eval_every == 0 or step == config.steps) and not evaluate(step):
                run.diverged_at = step
                break
    run.seconds = time.perf_counter() - start
    return run


# ---- command line ---------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options' values; --quick changes defaults, and yields to an option that is given."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Trains a small byte-level GPT on source files of the Python standard "
        "library with torch.optim.AdamW and with AMAdamW (memory_plane level and anchored, and "
        "level with a beta for each row), all else equal, and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)

    add("--steps", COUNT, 1000, "optimizer steps")
    add("--batch-size", COUNT, 32, "windows of text a step")
    add("--lr", POSITIVE, 3e-3, "first learning rate; cosine to zero")
    add("--weight-decay", NOT_NEGATIVE, 0.1, "of the matrices")
    add("--seed", SEED, 0, "of the weights and the order of the data")
    add("--threads", COUNT, 2, "threads of torch")
    add("--eval-every", COUNT, 25, "steps between two held-out losses")
    add("--eval-windows", COUNT, 256, "windows of text that a held-out loss is measured on")
    add("--out", output_folder, "bench/results/demo", "folder for demo.json and demo.png")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a run of seconds that goes through everything and shows nothing: "
        + ", ".join(f"{key.replace('_', '-')} {value}" for key, value in QUICK.items()),
    )
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        0, or 130 where it was interrupted; what was finished by then is written all the same.
    """
    args = parse_args(argv)
    reason = cpu.unavailable(torch.device("cpu"))
    if reason is not None:
        raise SystemExit(f"the demo needs the cpu backend: {reason}")
    given = vars(args)
    config = Config(**{f.name: given[f.name] for f in fields(Config) if f.name in given})
    torch.set_num_threads(config.threads)
    training = read_text(TRAINING_FILES, standard_library())
    held_out = read_text(HELD_OUT_FILES, standard_library())

    sizes = [param.numel() for param in new_model(config).parameters()]
    comparison = Comparison(asdict(config), sizes, BASELINE, BETA_CAP, training, held_out)
    start = time.perf_counter()
    try:
        for name in CONTESTANTS:
            comparison.runs.append(train(name, config, training.content, held_out.content))
    except KeyboardInterrupt:
        comparison.unfinished = list(CONTESTANTS)[len(comparison.runs) :]
    comparison.seconds = time.perf_counter() - start

    print(format_table(comparison))
    if comparison.runs:
        write_json(comparison, args.out / "demo.json")
        plot(comparison, args.out / "demo.png")
        print(f"Wrote {args.out / 'demo.json'} and {args.out / 'demo.png'}")
    return INTERRUPTED if comparison.unfinished else 0


if __name__ == "__main__":
    raise SystemExit(main())

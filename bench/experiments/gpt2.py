"""GPT-2 small on a GPU, by AdamW and by AM-AdamW. Not yet run on a GPU.

The text is the corpus of the larger trainings, as tokens that are made beforehand: the machine with
the GPU needs torch and numpy alone, and no network.

    python -m bench.experiments prepare                     # here, with tokenizers
    python -m bench.experiments run --gpt2 --seconds 500    # there, with what that wrote

`--out` names the folder that the results are written to, for one that is brought back.
What is to be brought there, beside a checkout, is the folder build/gpt2, of 23.4 MiB. The
optimizers' kernels are compiled there at their first use, or brought along as CONTRIBUTING.md has
it. `--tiny` goes the same way with a model of 0.8 million parameters and 20 steps.

A finished run is a row of runs.jsonl, in the form of the larger trainings' results, with losses in
nats a token; settings.json has the bytes a token. As a run goes on, progress.jsonl gets a line at
each twentieth of it, so that one that was cut off leaves its curves. It begins anew when the same
command is given again, and its lines are replaced then; finished ones are not run again.

As expected, not measured: a run reads 49 million tokens, in 2 minutes if they are 400,000 a second.
In memory, parameters, gradients and two states in float32 take 2 GB; what the layers keep for the
backward pass, 38 bytes a token, layer and unit of width, 11.5 GB. The logits of 32 x 1,024 tokens
are 3.3 GB in bfloat16 and 6.6 GB in float32; a step that is not compiled would hold three of the
latter at once. That is under 40 GB, so that neither batch nor loss is split.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.demo_model import GPT
from bench.experiments.cell import Cell
from bench.experiments.larger.contestants import Contestant, adamw, am_adamw, gated_rows
from bench.experiments.larger.results import Results
from bench.experiments.larger.tasks import LargerTask, Loss, Problem, spread
from bench.experiments.larger.training import Progress, train
from bench.experiments.tasks import batch_indices
from bench.experiments.tokens import Tokens, tokenised
from bench.gpu_check import gpu

VOCABULARY = 50_304  # GPT-2's 50,257, up to a multiple of 128, which matrix products are fast with
TOKENS = Path("build/gpt2/tokens.pt.gz")
PROGRESS = "progress.jsonl"

BETA2 = 0.95  # of all: they differ by their memory
LR = 6e-4
ADAMW = adamw(0.9, BETA2)
# The head is tied, so that it has one beta with the embedding.
ROW = am_adamw("level", "row", beta2=BETA2, cap=0.95, embeddings="tensor")
TENSOR = am_adamw("level", "tensor", beta2=BETA2)
GATED = gated_rows(BETA2)
# Contestant, learning rate and warm-up, the first first. Rows want higher learning rates.
PLAN = (
    (ADAMW, LR, True),
    (ROW, 2 * LR, True),
    (TENSOR, LR, True),
    (GATED, 2 * LR, True),
    (ADAMW, 2 * LR, True),
    (ROW, LR, True),
    (ROW, 4 * LR, True),
    (ADAMW, LR, False),
    (ROW, 2 * LR, False),
    (TENSOR, LR, False),
)


@dataclass(frozen=True)
class Size:
    """How large the model is, and how long a run.

    Attributes:
        name: the task's.
        batch: windows a step.
        held_out: windows of each held-out part; a point of a curve is measured on a quarter.
    """

    name: str
    context: int
    width: int
    heads: int
    layers: int
    batch: int
    steps: int
    held_out: int

    def task(self) -> LargerTask:
        about = (
            f"GPT of {self.layers} layers, width {self.width}, head tied, "
            f"{self.batch} x {self.context} tokens a step, bfloat16 autocast"
        )
        make = partial(problem, self)
        return LargerTask(
            self.name, about, self.steps, LR, 0.1, make, inner="blocks.", classes=VOCABULARY
        )


SMALL = Size("gpt2", 1024, 768, 12, 12, batch=32, steps=1500, held_out=256)
TINY = Size("gpt2-tiny", 16, 16, 2, 2, batch=2, steps=20, held_out=8)


def prepare() -> None:
    """Writes the tokens where `run` reads them."""
    content = io.BytesIO()
    torch.save(vars(tokenised(VOCABULARY)), content)
    TOKENS.parent.mkdir(parents=True, exist_ok=True)
    TOKENS.write_bytes(gzip.compress(content.getvalue(), mtime=0))
    print(f"{TOKENS}: {TOKENS.stat().st_size / 2**20:.1f} MiB")


def read_tokens() -> Tokens:
    """What `prepare` has written.

    Raises:
        RuntimeError: it has not.
    """
    if not TOKENS.exists():
        raise RuntimeError(
            f"{TOKENS} is not there: python -m bench.experiments prepare makes it, on a machine "
            "with tokenizers"
        )
    content = io.BytesIO(gzip.decompress(TOKENS.read_bytes()))
    return Tokens(**torch.load(content, weights_only=True))


def problem(size: Size, steps: int, seed: int) -> Problem:
    """Predicts each next token of the corpus. All of it is on the GPU where there is one."""
    device = gpu.device if gpu.is_available() else torch.device("cpu")
    tokens = read_tokens()
    training, choosing, comparing = (
        part.int().to(device).unfold(0, size.context + 1, 1)
        for part in (tokens.training, tokens.choosing, tokens.comparing)
    )
    batches = batch_indices(len(training), size.batch, steps, seed).to(device)
    model = GPT(size.context, size.width, size.heads, size.layers, tokens.vocabulary, tied=True)
    model.init_weights(torch.Generator().manual_seed(seed))

    def loss(model: nn.Module, windows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value: Tensor = model(windows)
        return value

    def held_out(windows: Tensor) -> Loss:
        @torch.no_grad()
        def measure(model: nn.Module) -> float:
            parts = (windows[i : i + size.batch] for i in range(0, len(windows), size.batch))
            return torch.stack([loss(model, part) for part in parts]).mean().item()

        return measure

    # Compiled once: contestants' models are copies, which the compiled code is the same for.
    training_loss = torch.compile(loss) if gpu.is_available() else loss
    windows = spread(comparing, size.held_out)
    return Problem(
        model.to(device),
        lambda model, step: training_loss(model, training[batches[step]]),
        held_out(spread(choosing, size.held_out)),
        held_out(windows),
        held_out(windows[::4]),
    )


def plan(task: LargerTask) -> Iterator[tuple[Contestant, Cell]]:
    """All runs, the first first."""
    for contestant, lr, warmup in PLAN:
        yield contestant, Cell(task.name, contestant.name, lr, warmup, seed=0)


class Runs:
    """The runs in a folder, and those that are missing.

    Raises:
        RuntimeError: there is no GPU, or there are no tokens.
        ValueError: the folder holds runs of another model, or on other tokens.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        if not tiny and not gpu.is_available():
            raise RuntimeError(
                "gpt2 needs a GPU, and torch finds none: on the CPU a run of it would take days"
            )
        tokens = read_tokens()
        self.size = TINY if tiny else SMALL
        self.task = self.size.task()
        self.bytes_per_token = tokens.bytes_per_token
        self.results = Results(folder)
        self.environment = self.results.open_for(
            {self.task.name: self.task},
            {
                "corpus": tokens.corpus,
                "tokens": tokens.digest,
                "vocabulary": tokens.vocabulary,
                "bytes_per_token": tokens.bytes_per_token,
            },
        )

    def make(self, seconds: float | None) -> None:
        """Makes those that are missing; with `seconds`, those that the last one's time lets end."""
        began = time.perf_counter()
        done = {run.cell for run in self.results}
        last = 0.0
        for contestant, cell in plan(self.task):
            start = time.perf_counter()
            if cell in done:
                continue
            if seconds is not None and start - began + last > seconds:
                print("the rest would take longer than there is time")
                return
            lines = Lines(self.results.folder / PROGRESS, cell)
            try:
                run = train(self.task, contestant, cell, self.environment, report=lines.add)
            except Exception:  # the others are to be made all the same
                print(f"{cell.contestant}, lr {cell.lr:g} failed:")
                traceback.print_exc()
                continue
            self.results.add(run)
            last = time.perf_counter() - start
            tokens = self.size.batch * self.size.context
            print(
                f"{cell.contestant}, lr {cell.lr:g}, {'with' if cell.warmup else 'without'} "
                f"warm-up: {run.comparing:.4f} a token, "
                f"{run.comparing / self.bytes_per_token:.4f} a byte, "
                f"{1e6 * tokens / run.step_us:,.0f} tokens a second, {last:.0f} s in all",
                flush=True,
            )


class Lines:
    """A run's lines in the file of all runs' progress; those of an earlier try are removed."""

    def __init__(self, path: Path, cell: Cell) -> None:
        self.path = path
        self.cell = asdict(cell)
        if path.exists():
            # Where it was killed, the last line may be half of one.
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
            others = [line for line in lines if not self.cell.items() <= json.loads(line).items()]
            path.write_text("".join(others))

    def add(self, progress: Progress) -> None:
        numbers = {
            name: None if value is None or not math.isfinite(value) else value
            for name, value in asdict(progress).items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(self.cell | numbers) + "\n")

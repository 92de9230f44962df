"""GPT-2 small's layers on a GPU: as many bytes of Python source as this machine has.

Not yet run on a GPU. The vocabulary is the 256 bytes, as no tokenizer comes with Python: of
GPT-2's 124 M parameters the 38 M of its embedding are not there.
"""

from __future__ import annotations

import hashlib
import statistics
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.demo_model import GPT
from bench.experiments.contestants import CONTESTANTS
from bench.experiments.grid import Grid
from bench.experiments.tasks import Problem, Task, batch_indices

CONTEXT, WIDTH, HEADS, LAYERS = 1024, 768, 12, 12
BATCH_SIZE = 32
HELD_OUT_WINDOWS = 256
HELD_OUT_EVERY = 50  # one file in so many, by its digest


def gpu() -> torch.device:
    """The GPU.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "gpt2 needs a GPU, and torch finds none: on the CPU a run of it would take days"
        )
    return torch.device("cuda")


@cache
def corpus() -> tuple[bytes, bytes]:
    """Training and held-out text: every Python file of the standard library and site-packages.

    No text is in both: a file that occurs twice counts once.
    """
    folders = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")}
    paths = sorted({path for folder in folders for path in folder.rglob("*.py")})
    files = {hashlib.sha256(content).digest(): content for content in map(Path.read_bytes, paths)}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for digest, content in files.items():
        parts[digest[0] % HELD_OUT_EVERY == 0].append(content)
    training, held_out = map(b"\n".join, parts)
    return training, held_out


def corpus_digest() -> dict[str, str]:
    return {"corpus": hashlib.sha256(b"".join(corpus())).hexdigest()}


def language_model(model: GPT, device: torch.device, steps: int, seed: int) -> Problem:
    """Predicts each next byte of the corpus, under bfloat16 autocast."""
    context = model.positions.num_embeddings
    training, held_out = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, context + 1, 1)
        for text in corpus()
    )
    places = torch.linspace(0, len(held_out) - 1, HELD_OUT_WINDOWS, dtype=torch.float64)
    held_out = held_out[places.long()]
    batches = batch_indices(len(training), BATCH_SIZE, steps, seed)
    model.init_weights(torch.Generator().manual_seed(seed))

    def loss(model: nn.Module, windows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value: Tensor = model(windows.to(device))
        return value

    @torch.no_grad()
    def measure(model: nn.Module, _: Sequence[float] = ()) -> float:
        return statistics.fmean(
            loss(model, batch).item() for batch in torch.split(held_out, BATCH_SIZE)
        )

    model.to(device)
    return Problem(
        model, lambda model, step: loss(model, training[batches[step]]), measure, measure(model)
    )


def make(steps: int, seed: int) -> Problem:
    return language_model(GPT(CONTEXT, WIDTH, HEADS, LAYERS), gpu(), steps, seed)


TASK = Task(
    "gpt2",
    "text",
    "held-out loss",
    steps=2000,
    lrs={"adam": (1e-4, 3e-4, 1e-3, 3e-3)},
    weight_decay=0.1,
    cosine=True,
    make=make,
)
NAMES = (
    "AdamW 0.9",
    "AM-AdamW level tensor lambda 0.1",
    "AM-AdamW anchored tensor lambda 0.1",
)
GRID = Grid(
    {TASK.name: TASK},
    {name: CONTESTANTS[name] for name in NAMES},
    seeds=1,
    texts=corpus_digest,
)

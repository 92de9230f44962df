"""The larger tasks: each is a model, an order of data and two held-out parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.demo_model import GPT
from bench.experiments import data
from bench.experiments.corpus import corpus
from bench.experiments.models import ViT
from bench.experiments.tasks import batch_indices, seeded

HELD_OUT = 512  # examples of each held-out part: windows of text, or images
CURVE_HELD_OUT = 128  # those of the comparing part that a curve's points are measured on
EVALUATION_BATCH = 128

Loss: TypeAlias = Callable[[nn.Module], float]


@dataclass
class Problem:
    """A task at one seed: what all contestants have in common.

    Attributes:
        model: with its initial weights; contestants train copies.
        training_loss: of a model, on the batch of a step.
        choosing: the held-out loss that learning rates are chosen by.
        comparing: that of other held-out data, which contestants are compared by.
        curve: the same as `comparing`, of fewer examples.
    """

    model: nn.Module
    training_loss: Callable[[nn.Module, int], Tensor]
    choosing: Loss
    comparing: Loss
    curve: Loss


@dataclass(frozen=True)
class LargerTask:
    """A task.

    Attributes:
        name: as the results have it.
        about: what it is, in a few words.
        steps: optimizer steps.
        lr: where the search for AdamW's learning rate starts.
        weight_decay: of tensors of two dimensions and more.
        make: the problem of a number of steps and a seed.
        inner: how the names of the layers begin whose matrices Muon takes.
    """

    name: str
    about: str
    steps: int
    lr: float
    weight_decay: float
    make: Callable[[int, int], Problem]
    inner: str


@torch.no_grad()
def _mean_loss(loss: Callable[[nn.Module, Tensor], Tensor], examples: Tensor, model: nn.Module):
    """Mean loss of the examples, each part of them weighted by its size."""
    total = 0.0
    for part in torch.split(examples, EVALUATION_BATCH):
        total += loss(model, part).item() * len(part)
    return total / len(examples)


def _held_out(
    loss: Callable[[nn.Module, Tensor], Tensor], choosing: Tensor, comparing: Tensor
) -> tuple[Loss, Loss, Loss]:
    """Of examples of each part: `Problem.choosing`, `comparing` and `curve`."""
    every = len(comparing) // CURVE_HELD_OUT
    parts = (choosing, comparing, comparing[::every])
    return tuple(partial(_mean_loss, loss, part) for part in parts)  # type: ignore[return-value]


# ---- text -----------------------------------------------------------------------------


def windows(content: bytes, context: int) -> Tensor:
    """Every run of context + 1 bytes of the text, [windows, context + 1] uint8, a view."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).unfold(0, context + 1, 1)


def spread(examples: Tensor, count: int) -> Tensor:
    """So many of the examples, evenly spread."""
    return examples[torch.linspace(0, len(examples) - 1, count, dtype=torch.float64).long()]


def language_model(
    model: GPT,
    texts: Callable[[], Sequence[bytes]],
    context: int,
    batch_size: int,
    steps: int,
    seed: int,
) -> Problem:
    """Predicts each next byte of a text; `texts` gives its three parts."""
    training, choosing, comparing = (windows(text, context) for text in texts())
    batches = batch_indices(len(training), batch_size, steps, seed)

    def loss(model: nn.Module, examples: Tensor) -> Tensor:
        value: Tensor = model(examples)
        return value

    return Problem(
        model,
        lambda model, step: loss(model, training[batches[step]]),
        *_held_out(loss, spread(choosing, HELD_OUT), spread(comparing, HELD_OUT)),
    )


def source_texts() -> tuple[bytes, bytes, bytes]:
    text = corpus()
    return text.training, text.choosing, text.comparing


def pretraining(
    width: int, heads: int, layers: int, context: int, batch_size: int, steps: int, seed: int
) -> Problem:
    """A GPT on the corpus, from initial weights of the seed."""
    model = GPT(context, width, heads, layers)
    model.init_weights(torch.Generator().manual_seed(seed))
    return language_model(model, source_texts, context, batch_size, steps, seed)


# ---- images ---------------------------------------------------------------------------


def images(new_model: Callable[[], nn.Module], batch_size: int, steps: int, seed: int) -> Problem:
    """Classifies Fashion-MNIST; its test images are the held-out ones, half of them each part."""
    (training, labels), (tests, test_labels) = data.fashion_mnist()
    batches = batch_indices(len(training), batch_size, steps, seed)

    def training_loss(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(training[batches[step]]), labels[batches[step]])

    def loss(model: nn.Module, examples: Tensor) -> Tensor:
        return F.cross_entropy(model(tests[examples]), test_labels[examples])

    halves = torch.arange(len(tests)).split(len(tests) // 2)
    return Problem(
        seeded(new_model, seed),
        training_loss,
        *_held_out(loss, *(spread(half, 4 * HELD_OUT) for half in halves)),
    )


# ---- the list -------------------------------------------------------------------------

SMALL = (96, 4, 3)  # width, heads, layers: 0.39 M parameters
LARGE = (128, 4, 5)  # 1.06 M


def _tasks() -> list[LargerTask]:
    return [
        LargerTask(
            "gpt-400k",
            "byte-level GPT of 0.39 M parameters, 16 x 64 bytes a step",
            steps=1000,
            lr=3e-3,
            weight_decay=0.1,
            make=partial(pretraining, *SMALL, 64, 16),
            inner="blocks.",
        ),
        LargerTask(
            "gpt-1m",
            "byte-level GPT of 1.06 M parameters, 16 x 64 bytes a step",
            steps=2000,
            lr=3e-3,
            weight_decay=0.1,
            make=partial(pretraining, *LARGE, 64, 16),
            inner="blocks.",
        ),
        LargerTask(
            "vit-fashion",
            "ViT of 0.54 M parameters on Fashion-MNIST, 16 images a step",
            steps=2000,
            lr=1.5e-3,
            weight_decay=0.1,
            make=partial(images, partial(ViT, 128, 4, 4, patch=4, patches=49), 16),
            inner="layers.",
        ),
    ]


TASKS = {task.name: task for task in _tasks()}

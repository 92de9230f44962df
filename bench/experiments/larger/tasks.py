"""The larger tasks: each is a model, an order of data and two held-out parts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.demo_model import GPT, VOCABULARY
from bench.experiments import data
from bench.experiments.cell import lr_factor
from bench.experiments.corpus import corpus
from bench.experiments.larger.lora import add_adapters
from bench.experiments.models import CLASSES, ViT
from bench.experiments.tasks import batch_indices, seeded
from bench.experiments.tokens import tokenised

PRETRAINED = Path("build/experiments-larger")
HELD_OUT = 512  # examples of each held-out part: windows of text, or images
CURVE_HELD_OUT = 128  # those of the comparing part that a curve's points are measured on
EVALUATION_BATCH = 128

Loss: TypeAlias = Callable[[nn.Module], float]
BatchLoss: TypeAlias = Callable[[nn.Module, Tensor], Tensor]


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
        classes: what is guessed from: the loss of a model that has learned nothing is its log.
        convex: whether the training loss is convex: no network, then.
    """

    name: str
    about: str
    steps: int
    lr: float
    weight_decay: float
    make: Callable[[int, int], Problem]
    inner: str
    classes: int = VOCABULARY
    convex: bool = False


@torch.no_grad()
def _mean_loss(loss: BatchLoss, examples: Tensor, model: nn.Module) -> float:
    """Mean loss of the examples, each part of them weighted by its size."""
    total = 0.0
    for start in range(0, len(examples), EVALUATION_BATCH):
        part = examples[start : start + EVALUATION_BATCH]
        total += loss(model, part).item() * len(part)
    return total / len(examples)


def _held_out(loss: BatchLoss, choosing: Tensor, comparing: Tensor) -> tuple[Loss, Loss, Loss]:
    """Of examples of each part: `Problem.choosing`, `comparing` and `curve`."""
    few = comparing[:: len(comparing) // CURVE_HELD_OUT]
    return (
        partial(_mean_loss, loss, choosing),
        partial(_mean_loss, loss, comparing),
        partial(_mean_loss, loss, few),
    )


# ---- text -----------------------------------------------------------------------------


def as_bytes(*texts: bytes) -> tuple[Tensor, ...]:
    """Texts as tokens that are their bytes, [bytes] uint8."""
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)


def source_bytes() -> tuple[Tensor, ...]:
    text = corpus()
    return as_bytes(text.training, text.choosing, text.comparing)


def source_tokens(vocabulary: int) -> tuple[Tensor, ...]:
    tokens = tokenised(vocabulary)
    return tokens.training, tokens.choosing, tokens.comparing


def spread(examples: Tensor, count: int) -> Tensor:
    """So many of the examples, evenly spread."""
    return examples[torch.linspace(0, len(examples) - 1, count, dtype=torch.float64).long()]


def language_model(
    model: nn.Module,
    text: Sequence[Tensor],
    context: int,
    batch_size: int,
    steps: int,
    seed: int,
) -> Problem:
    """Predicts each next token of a text, whose three parts are given, [tokens] each."""
    training, choosing, comparing = (part.unfold(0, context + 1, 1) for part in text)
    batches = batch_indices(len(training), batch_size, steps, seed)

    def loss(model: nn.Module, examples: Tensor) -> Tensor:
        value: Tensor = model(examples)
        return value

    return Problem(
        model,
        lambda model, step: loss(model, training[batches[step]]),
        *_held_out(loss, spread(choosing, HELD_OUT), spread(comparing, HELD_OUT)),
    )


def pretraining(
    width: int,
    heads: int,
    layers: int,
    context: int,
    batch_size: int,
    steps: int,
    seed: int,
    vocabulary: int = VOCABULARY,
) -> Problem:
    """A GPT on the corpus, from initial weights of the seed; by bytes, or in other tokens."""
    model = GPT(context, width, heads, layers, vocabulary)
    model.init_weights(torch.Generator().manual_seed(seed))
    text = source_bytes() if vocabulary == VOCABULARY else source_tokens(vocabulary)
    return language_model(model, text, context, batch_size, steps, seed)


# ---- fine-tuning ----------------------------------------------------------------------

PRETRAINING_STEPS, PRETRAINING_LR = 2000, 3e-3


@cache
def pretrained() -> GPT:
    """The GPT of 1.06 M parameters, trained on the corpus by AdamW as the task "gpt-1m" is.

    It is kept on disk, by the corpus and what else it depends on.
    """
    path = PRETRAINED / f"gpt-{corpus().digest()[:16]}-{PRETRAINING_STEPS}.pt"
    problem = pretraining(*LARGE, 64, 16, PRETRAINING_STEPS, seed=0)
    model = problem.model
    assert isinstance(model, GPT)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, PRETRAINING_STEPS, warmup=True, cosine=True)
    )
    for step in range(PRETRAINING_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(problem.training_loss(model, step))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")  # another process may be at it too
    torch.save(model.state_dict(), unfinished)
    unfinished.rename(path)
    return model


def documentation() -> tuple[Tensor, ...]:
    training, held_out = data.documentation()
    half = len(held_out) // 2
    return as_bytes(training, held_out[:half], held_out[half:])


def lora(steps: int, seed: int) -> Problem:
    """Adapters of the pretrained GPT go on with documentation."""
    model = add_adapters(copy.deepcopy(pretrained()), "blocks.", seed)
    return language_model(model, documentation(), 64, 16, steps, seed)


# ---- images ---------------------------------------------------------------------------


def images(new_model: Callable[[], nn.Module], batch_size: int, steps: int, seed: int) -> Problem:
    """Classifies Fashion-MNIST; its test images are the held-out ones, half of them each part."""
    (training, labels), (tests, test_labels) = data.fashion_mnist()
    batches = batch_indices(len(training), batch_size, steps, seed)

    def training_loss(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(training[batches[step]]), labels[batches[step]])

    def loss(model: nn.Module, examples: Tensor) -> Tensor:
        return F.cross_entropy(model(tests[examples]), test_labels[examples])

    halves = torch.arange(len(tests)).view(2, -1)
    return Problem(
        seeded(new_model, seed),
        training_loss,
        *_held_out(loss, *(spread(half, 4 * HELD_OUT) for half in halves)),
    )


def logistic_regression() -> nn.Module:
    linear = nn.Linear(28 * 28, CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear)


# ---- the list -------------------------------------------------------------------------

SMALL = (96, 4, 3)  # width, heads, layers: 0.39 M parameters
LARGE = (128, 4, 5)  # 1.06 M
BPE = 2048  # tokens: most of them are rare, so that most rows of an embedding are


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
            "gpt-bpe",
            f"GPT of 0.72 M parameters, {BPE} tokens by BPE, 16 x 64 tokens a step",
            steps=1000,
            lr=3e-3,
            weight_decay=0.1,
            make=partial(pretraining, *SMALL, 64, 16, vocabulary=BPE),
            inner="blocks.",
            classes=BPE,
        ),
        LargerTask(
            "gpt-400k-batch128",
            "the GPT of 0.39 M parameters, 128 x 32 bytes a step",
            steps=500,
            lr=3e-3,
            weight_decay=0.1,
            make=partial(pretraining, *SMALL, 32, 128),
            inner="blocks.",
        ),
        LargerTask(
            "gpt-400k-no-decay",
            "as gpt-400k, without weight decay",
            steps=1000,
            lr=3e-3,
            weight_decay=0.0,
            make=partial(pretraining, *SMALL, 64, 16),
            inner="blocks.",
        ),
        LargerTask(
            "lora-documentation",
            "LoRA of rank 8 on a GPT of 1.06 M parameters, trained as gpt-1m, on Python's "
            "documentation, 16 x 64 bytes a step",
            steps=500,
            lr=6e-3,
            weight_decay=0.0,
            make=lora,
            inner="blocks.",
        ),
        LargerTask(
            "vit-fashion",
            "ViT of 0.54 M parameters on Fashion-MNIST, 16 images a step",
            steps=2000,
            lr=3.75e-4,
            weight_decay=0.1,
            make=partial(images, partial(ViT, 128, 4, 4, patch=4, patches=49), 16),
            inner="layers.",
            classes=CLASSES,
        ),
        LargerTask(
            "logistic-fashion",
            "logistic regression on Fashion-MNIST, 16 images a step: convex",
            steps=2000,
            lr=1.5e-3,
            weight_decay=0.0,
            make=partial(images, logistic_regression, 16),
            inner="layers.",
            classes=CLASSES,
            convex=True,
        ),
    ]


TASKS = {task.name: task for task in _tasks()}

"""The tasks: each is a model, an order of data and a measure, all three from a seed alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.demo_model import GPT
from bench.experiments import data
from bench.experiments.models import ResNet, ViT

CONVEX_GROUPS = ("least squares", "logistic regression")


@dataclass
class Problem:
    """A task at one seed: what all contestants have in common.

    Attributes:
        model: with its initial weights; contestants train copies.
        training_loss: of a model, on the batch of a step.
        measure: the number that contestants are compared by: the held-out loss, or what the
            task's title says. It is given the model at the end and each step's training loss.
        untrained_loss: that measure of the model as it is.
    """

    model: nn.Module
    training_loss: Callable[[nn.Module, int], Tensor]
    measure: Callable[[nn.Module, Sequence[float]], float]
    untrained_loss: float


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as the results have it.
        group: tasks of one kind.
        measured: what `Problem.measure` gives.
        steps: optimizer steps.
        lrs: the learning rates of each family of optimizers ("sgd", "adam").
        weight_decay: of tensors of two dimensions and more, for the family "adam". The
            family "sgd" has none.
        cosine: whether the learning rate falls to zero as a cosine; it is constant otherwise.
        make: the problem of a number of steps and a seed.
    """

    name: str
    group: str
    measured: str
    steps: int
    lrs: Mapping[str, tuple[float, ...]]
    weight_decay: float
    cosine: bool
    make: Callable[[int, int], Problem]

    @property
    def convex(self) -> bool:
        return self.group in CONVEX_GROUPS


# ---- data order and initial weights ---------------------------------------------------


def batch_indices(examples: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """A batch of indices a step, [steps, batch_size]: the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(examples, (steps, batch_size), generator=generator)


def seeded(new_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_model()


# ---- convex ---------------------------------------------------------------------------

DIMENSIONS = 50
ROWS = 100


def least_squares(condition: float, steps: int, seed: int) -> Problem:
    """|A x - b|^2 / 2, whose Hessian has largest eigenvalue 1 and that condition number.

    The measure is the objective divided by its value at the start, x = 0. A solution with
    objective 0 exists.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    left, _ = torch.linalg.qr(normal(ROWS, DIMENSIONS))
    right, _ = torch.linalg.qr(normal(DIMENSIONS, DIMENSIONS))
    exponents = torch.linspace(0.0, -0.5, DIMENSIONS, dtype=torch.float64)
    matrix = left * condition**exponents @ right.T
    model = nn.Linear(DIMENSIONS, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    targets = matrix @ normal(DIMENSIONS, 1)

    def objective(model: nn.Module, _: int = 0) -> Tensor:
        loss: Tensor = 0.5 * (model(matrix) - targets).square().sum()
        return loss

    start = objective(model).item()
    return Problem(model, objective, lambda model, _: objective(model).item() / start, 1.0)


def logistic_regression(
    load: Callable[[], tuple[Tensor, Tensor]], classes: int, steps: int, seed: int
) -> Problem:
    """Mini-batches of 64; the measure is the cross-entropy of all the training examples."""
    features, labels = load()
    features = features.flatten(1)
    batches = batch_indices(len(features), 64, steps, seed)
    model = nn.Linear(features.shape[1], classes, dtype=features.dtype)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def training_loss(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(features[batches[step]]), labels[batches[step]])

    @torch.no_grad()
    def objective(model: nn.Module, _: Sequence[float] = ()) -> float:
        return F.cross_entropy(model(features), labels).item()

    return Problem(model, training_loss, objective, objective(model))


# ---- images ---------------------------------------------------------------------------


def digit_images(new_model: Callable[[], nn.Module], steps: int, seed: int) -> Problem:
    """Mini-batches of 16 of four fifths of the digits; the rest is held out."""
    images, labels = data.digits()
    training, held_out = data.split(len(images))
    batches = training[batch_indices(len(training), 16, steps, seed)]

    def training_loss(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(images[batches[step]]), labels[batches[step]])

    @torch.no_grad()
    def measure(model: nn.Module, _: Sequence[float] = ()) -> float:
        return F.cross_entropy(model(images[held_out]), labels[held_out]).item()

    model = seeded(new_model, seed)
    return Problem(model, training_loss, measure, measure(model))


# ---- text -----------------------------------------------------------------------------

CONTEXT = 32
BATCH_SIZE = 8
HELD_OUT_WINDOWS = 256


def windows(content: bytes) -> Tensor:
    """Every run of CONTEXT + 1 bytes of the text, [windows, CONTEXT + 1] uint8, a view."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).unfold(0, CONTEXT + 1, 1)


def new_gpt(width: int, heads: int, layers: int, seed: int) -> GPT:
    model = GPT(CONTEXT, width, heads, layers)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def text(
    load: Callable[[], tuple[bytes, bytes]],
    new_model: Callable[[int], nn.Module],
    steps: int,
    seed: int,
) -> Problem:
    """Predicts each next byte; the held-out loss is of windows spread evenly over their text."""
    training, held_out = map(windows, load())
    places = torch.linspace(0, len(held_out) - 1, HELD_OUT_WINDOWS, dtype=torch.float64).long()
    held_out = held_out[places]
    batches = batch_indices(len(training), BATCH_SIZE, steps, seed)

    def training_loss(model: nn.Module, step: int) -> Tensor:
        loss: Tensor = model(training[batches[step]])
        return loss

    @torch.no_grad()
    def measure(model: nn.Module, _: Sequence[float] = ()) -> float:
        return statistics.fmean(model(batch).item() for batch in torch.split(held_out, 64))

    model = new_model(seed)
    return Problem(model, training_loss, measure, measure(model))


PRETRAINING_STEPS = 500


@cache
def pretrained_gpt() -> GPT:
    """The medium GPT, trained on Python source by AdamW: where fine-tuning starts from."""
    problem = text(data.python_source, partial(new_gpt, *SHAPES["medium"]), PRETRAINING_STEPS, 0)
    model = problem.model
    assert isinstance(model, GPT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for step in range(PRETRAINING_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(problem.training_loss(model, step))
        optimizer.step()
        schedule.step()
    return model


def fine_tuning(steps: int, seed: int) -> Problem:
    """The pretrained GPT goes on with documentation."""
    return text(data.documentation, lambda _: pretrained_gpt(), steps, seed)


# ---- shifting targets -----------------------------------------------------------------

INPUTS, HIDDEN = 16, 64
TURN = 150  # steps in which one teacher has become the other


def shifting_targets(steps: int, seed: int) -> Problem:
    """Regression onto a teacher whose weights turn from one draw to another and back.

    No batch is seen twice, and each is predicted before it is trained on: the mean of the
    training losses is a held-out loss, over the whole run.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    inputs = normal(steps, 32, INPUTS)
    first, second = (
        (normal(INPUTS, HIDDEN) / INPUTS**0.5, normal(HIDDEN, 1) / HIDDEN**0.5) for _ in range(2)
    )
    angles = torch.arange(steps).view(-1, 1, 1) * (torch.pi / 2 / TURN)
    hidden, out = (angles.cos() * a + angles.sin() * b for a, b in zip(first, second, strict=True))
    targets = torch.tanh(2 * inputs @ hidden) @ out

    def training_loss(model: nn.Module, step: int) -> Tensor:
        return F.mse_loss(model(inputs[step]), targets[step])

    def new_model() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    model = seeded(new_model, seed)
    with torch.no_grad():
        untrained = F.mse_loss(model(inputs), targets).item()
    return Problem(model, training_loss, lambda _, losses: statistics.fmean(losses), untrained)


# ---- the list -------------------------------------------------------------------------

SHAPES = {"small": (24, 2, 1), "medium": (32, 2, 2), "large": (48, 4, 3)}  # width, heads, layers
CONDITIONS = (1e2, 1e3, 1e4, 1e5, 1e6)
TEXTS = {"python": data.python_source, "documentation": data.documentation}
# 1, 3, 10, 30...: half a decade apart, near enough.
HALF_DECADES = tuple(float(f"{m}e{exponent}") for exponent in range(-5, 4) for m in (1, 3))


def _lrs(sgd: float, adam: float, count: int = 6) -> dict[str, tuple[float, ...]]:
    """So many half decades from each family's lowest learning rate."""
    starts = {"sgd": HALF_DECADES.index(sgd), "adam": HALF_DECADES.index(adam)}
    return {family: HALF_DECADES[i : i + count] for family, i in starts.items()}


def _gpts(size: str) -> list[Task]:
    return [
        Task(
            f"gpt-{size}-{name}",
            "text",
            "held-out loss",
            steps=100,
            lrs=_lrs(0.03, 3e-4),
            weight_decay=0.1,
            cosine=True,
            make=partial(text, load, partial(new_gpt, *SHAPES[size])),
        )
        for name, load in TEXTS.items()
    ]


def _digits(name: str, new_model: Callable[[], nn.Module]) -> Task:
    return Task(
        name,
        "images",
        "held-out loss",
        steps=160,
        lrs=_lrs(0.01, 3e-4),
        weight_decay=0.05,
        cosine=True,
        make=partial(digit_images, new_model),
    )


def _tasks() -> list[Task]:
    """All tasks, the quick ones first: a cut-off then leaves more of them."""
    convex = partial(Task, steps=200, weight_decay=0.0, cosine=True)
    return [
        *(
            convex(
                f"least-squares-{condition:.0e}".replace("+0", ""),
                "least squares",
                "objective, of its value at the start",
                lrs=_lrs(0.3, 1e-2),
                make=partial(least_squares, condition),
            )
            for condition in CONDITIONS
        ),
        convex(
            "logistic-breast-cancer",
            "logistic regression",
            "training objective",
            lrs=_lrs(0.03, 3e-3, 7),
            make=partial(logistic_regression, data.breast_cancer, 2),
        ),
        convex(
            "logistic-digits",
            "logistic regression",
            "training objective",
            lrs=_lrs(0.3, 3e-3, 7),
            make=partial(logistic_regression, data.digits, 10),
        ),
        Task(
            "shifting-targets",
            "shifting targets",
            "loss on each batch before it is trained on, over the run",
            steps=200,
            lrs=_lrs(0.01, 1e-3),
            weight_decay=0.0,
            cosine=False,
            make=shifting_targets,
        ),
        *_gpts("small"),
        Task(
            "gpt-fine-tuning",
            "fine-tuning",
            "held-out loss",
            steps=80,
            lrs=_lrs(0.01, 1e-4),
            weight_decay=0.1,
            cosine=True,
            make=fine_tuning,
        ),
        _digits("resnet-digits", partial(ResNet, 16, 2)),
        *_gpts("medium"),
        _digits("vit-digits", partial(ViT, 32, 4, 2)),
        *_gpts("large"),
    ]


TASKS = {task.name: task for task in _tasks()}

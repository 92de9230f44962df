"""Times two optimizers side by side, in one process, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

Shape = tuple[int, ...]
MakeOptimizer = Callable[[list[Tensor]], Optimizer]

# Gradients that take turns: with one and the same at every step, the memory would become
# equal to it, and the work would not be that of training.
GRADIENT_SETS = 2
# Untimed steps before the timed ones. The data is then in cache, as far as it fits.
WARM_UP_STEPS = GRADIENT_SETS
MIN_STEPS, MAX_STEPS = 3, 500


def random_tensors(shapes: Sequence[Shape], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


class Side:
    """An optimizer at work on parameters of its own.

    Args:
        make: the optimizer, from its parameters.
        shapes, dtype: of the parameters.
        gradient_sets: gradients of those shapes, for one step after the other.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        gradient_sets: Sequence[Sequence[Tensor]],
    ) -> None:
        self.params = random_tensors(shapes, dtype, seed=0)
        self.optimizer = make(self.params)
        self.gradient_sets = gradient_sets
        self.steps = MIN_STEPS

    def run(self, steps: int) -> list[float]:
        """The seconds of each of some steps; setting the gradients is not among them."""
        times = []
        for step in range(steps):
            grads = self.gradient_sets[step % len(self.gradient_sets)]
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            start = time.perf_counter()
            self.optimizer.step()
            times.append(time.perf_counter() - start)
        return times

    def fit_steps(self, seconds: float) -> None:
        """Sets `steps` so that a block lasts about some seconds."""
        self.run(WARM_UP_STEPS)
        start = time.perf_counter()
        self.run(MIN_STEPS)
        step = (time.perf_counter() - start) / MIN_STEPS
        self.steps = min(max(round(seconds / step), MIN_STEPS), MAX_STEPS)

    def block(self) -> float:
        """A sample: the median seconds of `steps` steps, after a warm-up."""
        self.run(WARM_UP_STEPS)
        return statistics.median(self.run(self.steps))


def alternate(
    first: MakeOptimizer,
    second: MakeOptimizer,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    pairs: int,
    seconds: float,
) -> Iterator[tuple[float, float]]:
    """Pairs of samples of two optimizers, in seconds a step.

    The side that begins changes from pair to pair. `seconds` is about the time of all pairs.
    """
    gradient_sets = [random_tensors(shapes, dtype, seed) for seed in range(1, GRADIENT_SETS + 1)]
    a, b = (Side(make, shapes, dtype, gradient_sets) for make in (first, second))
    for side in (a, b):
        side.fit_steps(seconds / (2 * pairs))
    for pair in range(pairs):
        if pair % 2 == 0:
            sample_a = a.block()
            sample_b = b.block()
        else:
            sample_b = b.block()
            sample_a = a.block()
        yield sample_a, sample_b


def copy_bandwidth(total: int) -> float:
    """Bytes a second, read and written, of copies between two halves of `total` bytes."""
    source = torch.ones(max(total // 8, 1))
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)

"""Each contestant against its own reference, before anything is timed.

Twice. On small tensors, where whole steps are compared, several of them, so that the memory
and its sums have their say. And on the very tensors that are timed, where the first step is
compared at some elements of each: it is elementwise for all optimizers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.kernels.contestants import Contestant
from bench.kernels.sides import Side, random_tensors

PROBE_SHAPES = ((300, 70), (513,))
# Of a step in bfloat16 or float16, relative to the largest change: some optimizers compute in it.
LOW_PRECISION_TOLERANCE = 4e-2
ELEMENTS = 8  # of each tensor that is timed


class WrongResult(Exception):
    """A contestant does not do what its reference does. Stops the benchmark."""


def check_steps(contestant: Contestant, dtype: torch.dtype, device: torch.device) -> None:
    """Steps on small tensors.

    Raises:
        WrongResult: a parameter is not what the reference has.
    """
    start = random_tensors(PROBE_SHAPES, dtype, device, seed=1)
    first, second = (random_tensors(PROBE_SHAPES, dtype, device, seed) for seed in (2, 3))
    # At the last ones beta is below its cap.
    gradient_sets = [first, second, [-gradient for gradient in second]]
    side = Side(replace(contestant, missed=None), start, gradient_sets)
    expected = Reference(contestant, start)
    low_precision = dtype.itemsize < 4
    # State in a low precision drifts from a float64 one after a first step.
    first_alone = contestant.quantized or (low_precision and not contestant.adaptive)
    for step in range(1 if first_alone else len(gradient_sets)):
        side.next_gradients()
        side.step()
        expected.step(gradient_sets[step])
        compare(contestant, expected, side.params, f"step {step + 1} on {dtype}")


@dataclass
class Reference:
    """A contestant's reference at work on float64 copies of some tensors."""

    params: list[Tensor]
    start: list[Tensor]
    optimizer: Optimizer

    def __init__(self, contestant: Contestant, start: Sequence[Tensor]) -> None:
        self.start = [tensor.detach().double() for tensor in start]
        self.params = [tensor.clone().requires_grad_() for tensor in self.start]
        self.optimizer = contestant.reference(self.params)

    def step(self, grads: Sequence[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.double()
        self.optimizer.step()


def compare(
    contestant: Contestant, expected: Reference, actual: Sequence[Tensor], where: str
) -> None:
    """Raises WrongResult where parameters are further from the reference's than rounding."""
    for index, (ours, theirs, start) in enumerate(
        zip(actual, expected.params, expected.start, strict=True)
    ):
        ours, theirs = ours.detach(), theirs.detach()
        low_precision = ours.dtype.itemsize < 4
        tolerance = LOW_PRECISION_TOLERANCE if low_precision else contestant.tolerance
        change = (theirs - start).abs().max()
        ulps = 4 * torch.finfo(ours.dtype).eps * torch.maximum(theirs.abs(), start.abs())
        difference = (ours.double() - theirs).abs()
        # Not `any(difference > ...)`: what is not a number is wrong as well.
        if not (difference <= tolerance * change + ulps).all():
            raise WrongResult(
                f"{contestant.name}, {where}: tensor {index} differs from its reference by "
                f"{(difference / change).max().item():.2g} of its largest change"
            )


class FirstStep:
    """Some elements of each tensor that is timed, before its first step: it has gradients."""

    def __init__(self, side: Side) -> None:
        self.side = side
        generator = torch.Generator().manual_seed(0)
        self.places = []
        for tensor in side.params:
            last = tensor.numel() - 1
            inside = torch.randint(last + 1, (ELEMENTS - 2,), generator=generator)
            places = torch.cat([torch.tensor([0, last]), inside])
            self.places.append(places.to(tensor.device))
        self.start = self._pick(side.params)
        self.grads = self._pick(self._given())

    def _given(self) -> list[Tensor]:
        return [param.grad for param in self.side.params if param.grad is not None]

    def _pick(self, tensors: Sequence[Tensor]) -> Tensor:
        picked = [t.detach().flatten()[p] for t, p in zip(tensors, self.places, strict=True)]
        return torch.cat(picked)

    def check(self, contestant: Contestant) -> None:
        """After the first step.

        Raises:
            WrongResult: a parameter is not what the reference has.
            RuntimeError: the step wrote to the gradients, which the others need too.
        """
        if not torch.equal(self._pick(self._given()), self.grads):
            raise RuntimeError("its step writes to the gradients")
        expected = Reference(contestant, [self.start])
        expected.step([self.grads])
        compare(contestant, expected, [self._pick(self.side.params)], "first step")

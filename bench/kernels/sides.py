"""A contestant at work on parameters of its own, and the tensors that all of them start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adamem_fused import AMSGD, AMAdamW
from bench.kernels.contestants import Contestant
from bench.kernels.parameter_lists import Shape, some_of

TOLERANCE = 0.03  # of a share of the elements
FALL = 1.3  # of the learning rate, from the step before
POOL = 2**20 + 3  # random numbers that large tensors repeat; odd, so that rows differ


def random_tensors(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Standard normal tensors, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator).to(dtype).to(device)
    tensors = []
    offset = 0
    for shape in shapes:
        flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        filled = 0
        while filled < flat.numel():
            count = min(POOL - offset, flat.numel() - filled)
            flat[filled : filled + count] = pool[offset : offset + count]
            filled += count
            offset = (offset + count) % POOL
        tensors.append(flat.view(shape))
    return tensors


class WrongShare(Exception):
    """Of a contestant's guesses another share was missed than its name says."""


class Side:
    """A contestant, its parameters and the gradients that it takes in turns.

    With one and the same gradient at every step the memory would become equal to it, and
    the work would not be that of training. Random gradients that alternate keep beta at its cap.
    It stays below, near 0.5, on gradients that turn around from step to step while the learning
    rate falls: that of the step before is raised in the state, so that it may fall for ever, and
    nothing but that scalar is touched. `contestant.missed` of the elements get these. Where no
    tensors of a list have that share of its elements, each tensor is cut into fifths.

    Args:
        start, gradient_sets: shared with the other sides.
        turned: the first set with the signs turned around.
    """

    def __init__(
        self,
        contestant: Contestant,
        start: Sequence[Tensor],
        gradient_sets: Sequence[Sequence[Tensor]],
        turned: Sequence[Tensor] = (),
    ) -> None:
        self._missed = contestant.missed
        missing: list[int] = []
        if self._missed:
            missing, off = _missing(start, self._missed)
            if off > TOLERANCE:
                start, turned = in_fifths(start), in_fifths(turned)
                gradient_sets = [in_fifths(gradients) for gradients in gradient_sets]
                missing, _ = _missing(start, self._missed)
            first, second = map(list, gradient_sets)
            for place in missing:
                second[place] = turned[place]
            gradient_sets = [first, second]
        self.params = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        self._missing = [self.params[i] for i in missing]
        self.optimizer = contestant.make(self.params)
        step: Any = self.optimizer.step
        self.step = torch.compile(step) if contestant.compiled else step
        self.replays: list[Callable[[], None]] = []  # of a step captured as a CUDA graph
        self._gradient_sets: Iterator[Sequence[Tensor]] = cycle(gradient_sets)

    def next_gradients(self) -> None:
        """Gives the parameters the next set of gradients."""
        for param, grad in zip(self.params, next(self._gradient_sets), strict=True):
            param.grad = grad
        if self._missing and self.optimizer.state:
            torch._foreach_mul_([self.optimizer.state[p]["prev_lr"] for p in self._missing], FALL)

    def missed(self) -> float | None:
        """Of the elements, those whose last beta was below its cap; None where nobody looks.

        Raises:
            WrongShare: they are not as many as they are to be.
        """
        if self._missed is None:
            return None
        assert isinstance(self.optimizer, (AMAdamW, AMSGD))
        found = 1.0 - self.optimizer.metrics()["at_cap"].item()
        if abs(found - self._missed) > TOLERANCE:
            raise WrongShare(f"{found:.1%} of the elements had a beta below its cap")
        return found

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, the tensors inside of other objects included."""
        sizes: dict[int, int] = {}
        for state in self.optimizer.state.values():
            for tensor in _tensors_in(state, set()):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        for param in self.params:
            sizes.pop(param.untyped_storage().data_ptr(), None)
        return sum(sizes.values())


def _missing(tensors: Sequence[Tensor], share: float) -> tuple[list[int], float]:
    """Places of tensors with about that share of the elements, and by how much it is another."""
    sizes = [tensor.numel() for tensor in tensors]
    chosen = some_of(sizes, share)
    return chosen, abs(sum(sizes[i] for i in chosen) / sum(sizes) - share)


def in_fifths(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each in five parts, of whole cache lines where it is large, and what is left over."""
    parts: list[Tensor] = []
    for tensor in tensors:
        fifth = tensor.numel() // 5
        parts += torch.split(tensor.flatten(), max(fifth // 64 * 64 or fifth, 1))
    return parts


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The plain tensors that a value holds: in containers, tensor subclasses, attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        parts: Iterable[Any] = [getattr(value, name) for name in names]
    elif isinstance(value, Tensor):
        yield value
        return
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors_in(part, seen)

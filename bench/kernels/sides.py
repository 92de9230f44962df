"""A contestant at work on parameters of its own, and the tensors that all of them start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.kernels.contestants import Contestant
from bench.kernels.parameter_lists import Shape

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


class Side:
    """A contestant, its parameters and the gradients that it takes in turns.

    With one and the same gradient at every step the memory would become equal to it, and
    the work would not be that of training. The gradients are shared with the other sides.
    """

    def __init__(
        self,
        contestant: Contestant,
        start: Sequence[Tensor],
        gradient_sets: Sequence[Sequence[Tensor]],
    ) -> None:
        self.params = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        self.optimizer = contestant.make(self.params)
        step: Any = self.optimizer.step
        self.step = torch.compile(step) if contestant.compiled else step
        self.replays: list[Callable[[], None]] = []  # of a step captured as a CUDA graph
        self._gradient_sets: Iterator[Sequence[Tensor]] = cycle(gradient_sets)

    def next_gradients(self) -> None:
        """Gives the parameters the next set of gradients."""
        for param, grad in zip(self.params, next(self._gradient_sets), strict=True):
            param.grad = grad

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, the tensors inside of other objects included."""
        sizes: dict[int, int] = {}
        for state in self.optimizer.state.values():
            for tensor in _tensors_in(state, set()):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        for param in self.params:
            sizes.pop(param.untyped_storage().data_ptr(), None)
        return sum(sizes.values())


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

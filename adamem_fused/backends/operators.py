"""The operators of ops.py as functions over a backend's, for a step that torch has traced.

torch.compile and torch.export record operators, which are given lists, and keep nothing from call
to call: every call makes its tables anew. The cuda backend's upload them, and so cannot be captured
in a CUDA graph. CPU tensors come here where the compiled extension, which has operators of its own,
is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adamem_fused.backends import cpu_library, cuda, ops
from adamem_fused.backends.batch import (
    AdamWBatch,
    AdamWHyper,
    Packed,
    SGDBatch,
    SGDHyper,
)

# Tensors of each list, and the options, as the schemas of ops.py have them.
Arguments = tuple[Any, ...]


class _Backend(Protocol):
    """The functions of a backend, as backends/__init__.py says, that the operators call."""

    def adamw_begin(
        self, batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor: ...

    def adamw_finish(
        self,
        batch: AdamWBatch,
        rows: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...

    def sgd_begin(
        self, batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor: ...

    def sgd_finish(
        self,
        batch: SGDBatch,
        rows: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...


def _rows(lrs: Tensor, hypers: Sequence[float]) -> Iterator[tuple[Tensor | float, ...]]:
    """Each group's lr and other hyperparameters, `shared` the last, in the order of ops.py."""
    columns = len(hypers) // max(1, lrs.numel())
    for i in range(lrs.numel()):
        yield (lrs[i], *hypers[i * columns : (i + 1) * columns])


def _packed(packed: list[Tensor], rounding: Tensor | None, tensors: int) -> Packed | None:
    """From one flat list: the scales of each memory, and the remainders."""
    if rounding is None:
        return None
    *scales, remainders = (packed[i : i + tensors] for i in range(0, len(packed), tensors))
    return Packed(tuple(scales), remainders, rounding)


def _open(batch_type: Any, hyper_type: Any, args: Arguments) -> tuple[Any, Any, Any]:
    """The arguments of `*_begin` as a batch, grad_scale and found_inf."""
    *lists, lrs, group_sizes, hypers, grad_scale, found_inf, packed, rounding = args
    rows = list(_rows(lrs, hypers))
    batch = batch_type(
        *lists,
        # The last three but one are booleans: anchored, loss_gap and maximize.
        [hyper_type(*row[:-4], *map(bool, row[-4:-1])) for row in rows],
        list(group_sizes),
        [bool(row[-1]) for row in rows],
        packed=_packed(packed, rounding, len(lists[0])),
    )
    return batch, grad_scale, found_inf


def over(
    backend: _Backend, squared_norms: Callable[[list[Tensor]], Tensor]
) -> dict[str, Callable[..., Any]]:
    """The operators by name."""

    def adamw_begin_(*args: Any) -> Tensor:
        return backend.adamw_begin(*_open(AdamWBatch, AdamWHyper, args))

    def adamw_finish_(*args: Any) -> None:
        *args_of_begin, rows = args
        batch, *scaling = _open(AdamWBatch, AdamWHyper, tuple(args_of_begin))
        backend.adamw_finish(batch, rows, *scaling)

    def sgd_begin(*args: Any) -> Tensor:
        return backend.sgd_begin(*_open(SGDBatch, SGDHyper, args))

    def sgd_finish_(*args: Any) -> None:
        *args_of_begin, rows = args
        batch, *scaling = _open(SGDBatch, SGDHyper, tuple(args_of_begin))
        backend.sgd_finish(batch, rows, *scaling)

    own = (adamw_begin_, adamw_finish_, sgd_begin, sgd_finish_)
    return {**{f.__name__: f for f in own}, "squared_norms": squared_norms}


def _cuda_squared_norms(grads: list[Tensor]) -> Tensor:
    # Without the tables of a step, which take more than gradients.
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    return torch.stack(norms).square()


CPU = over(cpu_library, cpu_library.squared_norms)
CUDA = over(cuda, _cuda_squared_norms)


def register() -> None:
    """Gives the operators the kernels that they do not have yet."""
    if cpu_library.unavailable is None:
        ops.register(CPU, "CPU")
    if torch.version.hip is None:
        ops.register(CUDA, "CUDA")

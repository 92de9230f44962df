"""Parameters that are sharded over ranks: DTensors, as FSDP2 and tensor parallelism make them.

A backend is given the shards that this rank holds, as plain tensors. The sums over its shards
are then added up over the ranks, so that all of them take the beta of the whole tensor. Where each
row has a beta and whole rows are on a rank, nothing is to be added up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

# By process group and device: what is to be taken together over its ranks, in place.
Terms: TypeAlias = "dict[tuple[ProcessGroup, torch.device], list[Tensor]]"


def _dtensor_class() -> type[DTensor] | None:
    # Importing torch does not import this module, which takes long; making a DTensor does.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def _is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    dtensor = _dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor)


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    dtensor = _dtensor_class()
    return dtensor is not None and any(issubclass(c, dtensor) for c in set(map(type, tensors)))


def whole(tensor: Tensor) -> Tensor:
    """A DTensor as a plain tensor of all its elements, for which the ranks meet."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a plain tensor; a plain one as it is."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def local_rows(param: Tensor) -> int:
    """How many indices of the first dimension this rank has."""
    return local(param).shape[0]


def as_rows(param: Tensor, values: Tensor) -> Tensor:
    """A value for each of this rank's rows of a parameter, [local rows], sharded as these are."""
    if not _is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    placements = [p if _is_of_rows(p) else Replicate() for p in param.placements]
    shape = param.shape[:1]
    return DTensor.from_local(values, param.device_mesh, placements, shape=shape, stride=(1,))


def check_param(param: Tensor) -> None:
    """Raises ValueError on a parameter of which each rank holds a term (Partial)."""
    if _is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(f"Invalid placements: {param.placements} (Shard or Replicate)")


def check_like(param: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless both are plain tensors, or both DTensors of one mesh."""
    if _is_dtensor(param) and _is_dtensor(tensor):
        alike = param.device_mesh == tensor.device_mesh
    else:
        alike = _is_dtensor(param) == _is_dtensor(tensor)
    if not alike:
        raise ValueError(
            f"{name} and its parameter have to be plain tensors, or DTensors of one device mesh: "
            f"they are {_describe(tensor)} and {_describe(param)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"a DTensor of {tensor.device_mesh}" if _is_dtensor(tensor) else "a plain tensor"


def local_shards(
    params: list[Tensor], grads: list[Tensor], *others: list[Tensor]
) -> tuple[list[Tensor], ...]:
    """The lists with this rank's shard in place of each DTensor.

    A gradient takes its parameter's placements first: that of a replicated parameter may
    come as a term from each rank (Partial).
    """
    placed = []
    for param, grad in zip(params, grads, strict=True):
        check_like(param, "grad", grad)
        if _is_dtensor(param) and _is_dtensor(grad) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        placed.append(grad)
    return tuple(list(map(local, tensors)) for tensors in (params, placed, *others))


def _is_of_rows(placement: Placement) -> bool:
    """Whether ranks have different indices of the first dimension."""
    # Not is_shard(): FSDP2 over tensor parallelism has a placement of its own kind.
    return not placement.is_replicate() and getattr(placement, "dim", None) == 0


def _process_groups(param: Tensor, of_rows: bool) -> Iterator[ProcessGroup]:
    """Those whose ranks hold different rows, or different parts of the same, and not copies."""
    if not _is_dtensor(param):
        return
    for dim, placement in enumerate(param.placements):
        sharded = not placement.is_replicate() and param.device_mesh.size(dim) > 1
        if sharded and _is_of_rows(placement) == of_rows:
            yield param.device_mesh.get_group(dim)


def splits_rows(param: Tensor) -> bool:
    """Whether several ranks have elements of one row."""
    return any(True for _ in _process_groups(param, of_rows=False))


def splits(param: Tensor) -> bool:
    """Whether several ranks have elements of the tensor."""
    return splits_rows(param) or any(True for _ in _process_groups(param, of_rows=True))


def add_term(terms: Terms, param: Tensor, values: Tensor, of_rows: bool) -> None:
    """Notes values, a view, for the ranks that have other rows, or other parts of the same."""
    for group in _process_groups(param, of_rows):
        terms.setdefault((group, values.device), []).append(values)


def over_ranks(terms: Terms, operation: Literal["sum", "max"]) -> None:
    """Replaces the terms by their sum or maximum: one all-reduce for each process group.

    In the order in which they were noted, which is that of the parameters. So all ranks of a group
    have to have gradients for the same tensors, as FSDP2 sees to; a rank whose shard is empty takes
    part with zeros. What is sharded over two dimensions of a mesh is taken together over one of
    them, and the results then over the other.
    """
    reduce = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
    for (group, _), values in terms.items():
        total = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(total, op=reduce, group=group)
        parts = total.split_with_sizes([value.numel() for value in values])
        torch._foreach_copy_(values, [own.view_as(v) for own, v in zip(parts, values, strict=True)])

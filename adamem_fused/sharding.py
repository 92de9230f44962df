"""Parameters that are sharded over ranks: DTensors, as FSDP2 and tensor parallelism make them.

A backend is given the shards that this rank holds, as plain tensors. The sums over its shards
are then added up over the ranks, so that all of them take the beta of the whole tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# By process group and device: the tensors, (batch, index in it), sharded over its ranks.
Shards: TypeAlias = "dict[tuple[ProcessGroup, torch.device], list[tuple[int, int]]]"


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
    params: list[Tensor], grads: list[Tensor], *memories: list[Tensor]
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
    return tuple(
        [tensor.to_local() if _is_dtensor(tensor) else tensor for tensor in tensors]
        for tensors in (params, placed, *memories)
    )


def _process_groups(param: DTensor) -> Iterator[ProcessGroup]:
    """Those whose ranks hold different shards of the parameter, not copies of one."""
    for dim, placement in enumerate(param.placements):
        # Not is_shard(): FSDP2 over tensor parallelism has a placement of its own kind.
        if not placement.is_replicate() and param.device_mesh.size(dim) > 1:
            yield param.device_mesh.get_group(dim)


def find_shards(batches: Iterable[list[Tensor]]) -> Shards:
    """Where in the batches, each a list of parameters, the sharded ones are."""
    shards: Shards = {}
    for batch, params in enumerate(batches):
        for index, param in enumerate(params):
            if _is_dtensor(param):
                for group in _process_groups(param):
                    key = group, param.to_local().device
                    shards.setdefault(key, []).append((batch, index))
    return shards


def add_over_ranks(shards: Shards, rows: list[Tensor]) -> None:
    """Makes the rows of sharded tensors, [tensors, 2] for each batch, those of the whole ones.

    One all-reduce for each process group, of rows in the order of the parameters. So all its
    ranks have to have gradients for the same tensors, as FSDP2 sees to; a rank whose shard is
    empty takes part with zeros. Of a tensor that is sharded over two dimensions of a mesh the
    second all-reduce adds up the sums of the first.
    """
    for (group, _), places in shards.items():
        shard_rows = [rows[batch][index] for batch, index in places]
        total = torch.stack(shard_rows)
        dist.all_reduce(total, group=group)
        torch._foreach_copy_(shard_rows, list(total.unbind()))

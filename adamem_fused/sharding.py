"""Parameters that are sharded over ranks: DTensors, as FSDP2 and tensor parallelism make them.

A backend is given the shards that this rank holds, as plain tensors. The sums over its shards
are then added up over the ranks, so that all of them take the beta of the whole tensor. Where each
row has a beta and whole rows are on a rank, nothing is to be added up: a step of matrices that
FSDP2 has sharded needs no collective, but for one of step counts where lr is 0, or a tensor on a
GPU, which is not looked at (optimizer.agree_on_first_steps). A vector is one segment, whose two
sums take one all-reduce for all vectors of a process group; rows that are split over ranks take one
over these alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Size, Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs


def dtensor_class() -> type[DTensor] | None:
    """DTensor, or None where nothing has imported it, and so there are none."""
    # Importing torch does not import this module, which takes long; making a DTensor does.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    dtensor = dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor)


def dtensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list(filter(is_dtensor, tensors))


def spec_of(tensor: Tensor) -> DTensorSpec | None:
    """How a DTensor is sharded; None for a plain tensor."""
    return tensor._spec if is_dtensor(tensor) else None


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    dtensor = dtensor_class()
    return dtensor is not None and any(issubclass(c, dtensor) for c in set(map(type, tensors)))


def whole(tensor: Tensor) -> Tensor:
    """A DTensor as a plain tensor of all its elements, for which the ranks meet."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a plain tensor; a plain one as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_rows(param: Tensor) -> int:
    """How many indices of the first dimension this rank has."""
    return local(param).shape[0]


def as_rows(param: Tensor, values: Tensor) -> Tensor:
    """A value for each of this rank's rows of a parameter, [local rows], sharded as these are."""
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor

    placements, shape = _row_placements(param), param.shape[:1]
    return DTensor.from_local(values, param.device_mesh, placements, shape=shape, stride=(1,))


def of_all_rows(param: Tensor, values: Tensor) -> Tensor:
    """A value for each row of a parameter, [rows], sharded as these are.

    Those of a plain tensor are on every rank; so a full_state_dict gives them where the optimizer
    has another scope.
    """
    if not is_dtensor(param) or is_dtensor(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, param.device_mesh, _row_placements(param), src_data_rank=None)


def _row_placements(param: DTensor) -> list[Placement]:
    from torch.distributed.tensor import Replicate

    return [p if _is_of_rows(p) else Replicate() for p in param.placements]


def like(param: Tensor, values: Tensor, shape: Size) -> Tensor:
    """This rank's values of something of this shape, of a parameter or of its blocks, sharded as
    the parameter is."""
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        values, param.device_mesh, _placements(param, shape), shape=shape, stride=stride
    )


def local_like(param: Tensor, values: Tensor) -> Tensor:
    """This rank's part of something as `like` has it, which may be sharded otherwise."""
    if is_dtensor(param) and is_dtensor(values):
        values = values.redistribute(placements=_placements(param, values.shape))
    return local(values)


def of_whole(param: Tensor, values: Tensor) -> Tensor:
    """Values of a parameter that are whole on every rank, sharded as it is."""
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, param.device_mesh, param.placements, src_data_rank=None)


def _placements(param: DTensor, shape: Size) -> list[Placement]:
    """The parameter's, without what splits none of these dimensions, as over a single rank."""
    from torch.distributed.tensor import Replicate

    return [p if getattr(p, "dim", 0) < len(shape) else Replicate() for p in param.placements]


def has_whole_blocks(param: Tensor, block: int) -> bool:
    """Whether every rank has whole blocks of a row, of so many elements.

    Where parameters are sharded by rows they have, on any number of ranks. Where rows are split
    they have if all parts are equal, and whole blocks. Of a vector, whose parts are what its
    length and the number of ranks make of them, they have not, as if it were on none.
    """
    if not is_dtensor(param):
        return True
    if param.dim() < 2:
        return False
    parts = 1
    for placement, size in zip(param.placements, param.device_mesh.shape, strict=True):
        if placement.is_replicate() or size == 1 or _is_of_rows(placement):
            continue
        if not placement.is_shard(1):
            return False
        parts *= size
    row = param.shape[1:].numel()
    return param.shape[1] % parts == 0 and row // parts % block == 0


def place_of(param: Tensor) -> tuple[int, int, int]:
    """Where this rank's elements lie in the whole parameter, row by row: `formats.places`.

    Raises:
        ValueError: it is split along two dimensions or more behind the first.
    """
    if not is_dtensor(param):
        return 0, 0, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = param.shape
    own, offsets = compute_local_shape_and_global_offset(shape, param.device_mesh, param.placements)
    split = [dim for dim in range(1, len(shape)) if own[dim] != shape[dim]]
    if len(split) > 1:
        raise ValueError(
            f"a parameter of shape {list(shape)} is split along dimensions {split}: its state or "
            "itself cannot be rounded stochastically, which takes an element's place in the whole"
        )
    offset = sum(o * shape[dim + 1 :].numel() for dim, o in enumerate(offsets))
    if not split or 0 in own:
        return (0 if 0 in own else offset), 0, 0
    inner = shape[split[0] + 1 :].numel()
    stretch = own[split[0]] * inner
    return offset, stretch, shape[split[0]] * inner - stretch


def check_param(param: Tensor) -> None:
    """Raises ValueError on a parameter of which each rank holds a term (Partial)."""
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(f"Invalid placements: {param.placements} (Shard or Replicate)")


def check_like(param: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless both are plain tensors, or both DTensors of one mesh."""
    if is_dtensor(param) and is_dtensor(tensor):
        alike = param.device_mesh == tensor.device_mesh
    else:
        alike = is_dtensor(param) == is_dtensor(tensor)
    if not alike:
        raise ValueError(
            f"{name} and its parameter have to be plain tensors, or DTensors of one device mesh: "
            f"they are {_describe(tensor)} and {_describe(param)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"a DTensor of {tensor.device_mesh}" if is_dtensor(tensor) else "a plain tensor"


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
        if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        placed.append(grad)
    return tuple(list(map(local, tensors)) for tensors in (params, placed, *others))


def _is_of_rows(placement: Placement) -> bool:
    """Whether ranks have different indices of the first dimension."""
    # Not is_shard(): FSDP2 over tensor parallelism has a placement of its own kind.
    return not placement.is_replicate() and getattr(placement, "dim", None) == 0


def _mesh_dims(spec: DTensorSpec, of_rows: bool) -> Iterator[int]:
    """Over which ranks hold different rows, or different parts of the same, and not copies."""
    for dim, placement in enumerate(spec.placements):
        sharded = not placement.is_replicate() and spec.mesh.size(dim) > 1
        if sharded and _is_of_rows(placement) == of_rows:
            yield dim


def splits_rows(spec: DTensorSpec) -> bool:
    """Whether several ranks have elements of one row."""
    return any(True for _ in _mesh_dims(spec, of_rows=False))


def splits(spec: DTensorSpec) -> bool:
    """Whether several ranks have elements of the tensor."""
    return splits_rows(spec) or any(True for _ in _mesh_dims(spec, of_rows=True))


class Parts(NamedTuple):
    """What several ranks have parts of, by process group, in the order of the parameters."""

    # Lines of `rows` of which each of its ranks has a term.
    lines: list[tuple[ProcessGroup, slice | Tensor]]
    # Tensors of which each of its ranks has other rows with betas of their own.
    tensors: list[tuple[ProcessGroup, list[int]]]
    # Tensors by all the groups over whose ranks they are sharded: none, for a whole one.
    shards: list[tuple[tuple[ProcessGroup, ...], slice | Tensor]]


def parts(specs: list[DTensorSpec | None], betas: list[Tensor]) -> Parts:
    ranges: dict[ProcessGroup, list[range]] = {}
    tensors: dict[ProcessGroup, list[int]] = {}
    shards: dict[tuple[ProcessGroup, ...], list[range]] = {}
    stop = 0
    for i, (spec, beta) in enumerate(zip(specs, betas, strict=True)):
        start, stop = stop, stop + beta.numel()
        shards.setdefault(_groups(spec), []).append(range(i, i + 1))
        if spec is None:
            continue
        for dim in _mesh_dims(spec, of_rows=False):
            ranges.setdefault(spec.mesh.get_group(dim), []).append(range(start, stop))
        for dim in _mesh_dims(spec, of_rows=True):
            group = spec.mesh.get_group(dim)
            if beta.dim() == 0:
                ranges.setdefault(group, []).append(range(start, stop))
            else:
                tensors.setdefault(group, []).append(i)
    device = betas[0].device
    return Parts(
        [(g, _index(r, device)) for g, r in ranges.items()],
        list(tensors.items()),
        [(groups, _index(r, device)) for groups, r in shards.items()],
    )


def _groups(spec: DTensorSpec | None) -> tuple[ProcessGroup, ...]:
    """Those over whose ranks a tensor is sharded."""
    if spec is None:
        return ()
    dims = {*_mesh_dims(spec, of_rows=False), *_mesh_dims(spec, of_rows=True)}
    return tuple(spec.mesh.get_group(dim) for dim in sorted(dims))


def _index(ranges: list[range], device: torch.device) -> slice | Tensor:
    if all(a.stop == b.start for a, b in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return torch.tensor(list(chain(*ranges)), device=device)


def add_lines(rows: Tensor, parts: Parts) -> None:
    """Replaces lines of rows by their sums over ranks: one all-reduce for each process group.

    So all ranks of a group have to have gradients for the same tensors, as FSDP2 sees to; a rank
    whose shard is empty takes part with zeros. What is sharded over two dimensions of a mesh is
    added up over one of them, and the sums then over the other.
    """
    for group, lines in parts.lines:
        total = rows[lines].contiguous()
        dist.all_reduce(total, group=group)
        rows[lines] = total


def take_largest(values: list[Tensor], group: ProcessGroup) -> None:
    """Replaces 0-dim tensors by the largest of all ranks of a group."""
    largest = torch.stack(values)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    torch._foreach_copy_(values, list(largest.unbind()))

"""Flat buffers whose tensors are known: each of these takes its own betas, as a parameter would.

DeepSpeed's ZeRO, for one, lays a group's tensors one after the other into a buffer, splits it into
equal parts, one a rank, and puts this rank's part in the place of the parameters. Such a part is
one parameter with one state, which the scheme saves and moves as it is used to. A step takes it
as views: tensors of the units that are whole on this rank, and of the pieces of those that are cut.

A unit is what shares a beta: a tensor or, with beta_scope="row", a row of one. Ranks that hold
pieces of a unit add up its sums, as those of a DTensor do. There are fewer such units than ranks,
and they take one small all-reduce for a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Size, Tensor

from adamem_fused import storage
from adamem_fused.sharding import is_dtensor
from adamem_fused.state import beta_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Piece(NamedTuple):
    """Elements of this rank's part that are stepped as one tensor."""

    start: int
    stop: int
    tensor: int  # which of the buffer's tensors they are of
    rows: int  # that have a beta each; 0 where all of them have one
    cut: int | None  # the place of their unit among those that are cut, on whatever ranks


class Pieces(NamedTuple):
    """This rank's part, in the order of the buffer."""

    pieces: list[Piece]
    n_cut: int  # units that are cut, on whatever ranks

    @property
    def units(self) -> list[int]:
        """How many each piece has betas for."""
        return [piece.rows or 1 for piece in self.pieces]

    @property
    def numels(self) -> list[int]:
        """This rank's elements of each unit."""
        return [
            (piece.stop - piece.start) // n
            for piece, n in zip(self.pieces, self.units, strict=True)
            for _ in range(n)
        ]

    def scalar_shape(self, by_row: bool) -> Size:
        """Of state: by_row, one a unit (beta, beta_prod); else one a piece (step, prev_lr)."""
        return Size([sum(self.units) if by_row else len(self.pieces)])


def find_pieces(
    units: Sequence[tuple[int, int]], offsets: Sequence[int], size: int, rank: int, world_size: int
) -> Pieces:
    """What a rank has of a buffer that is split into `world_size` parts of `size` elements.

    units: of each tensor how many rows have a beta each, or 0, and the elements of a unit.
    offsets: where in the buffer each tensor begins. What is between tensors is in no piece.
    """
    if size == 0:
        return Pieces([], 0)
    stops = [
        offset + max(rows, 1) * numel for offset, (rows, numel) in zip(offsets, units, strict=True)
    ]
    cut: dict[tuple[int, int], int] = {}
    for t, (offset, stop, (_, numel)) in enumerate(zip(offsets, stops, units, strict=True)):
        for bound in range((offset // size + 1) * size, min(stop, size * world_size), size):
            if (bound - offset) % numel != 0:
                cut.setdefault((t, (bound - offset) // numel), len(cut))
    pieces = []
    begin, end = rank * size, (rank + 1) * size
    for t, (offset, stop, (rows, numel)) in enumerate(zip(offsets, stops, units, strict=True)):
        at, stop = max(offset, begin), min(stop, end)
        while at < stop:
            row, done = divmod(at - offset, numel)
            place = cut.get((t, row))
            # A piece of what is cut, or whole units up to what is cut by this rank's end.
            whole = 0 if place is not None else (stop - at) // numel
            upto = at + whole * numel if whole else min(stop, at - done + numel)
            pieces.append(Piece(at - begin, upto - begin, t, whole if rows else 0, place))
            at = upto
    return Pieces(pieces, len(cut))


@dataclass(eq=False)
class Flat:
    """Which tensors a flat parameter is this rank's part of: `register_flat_parameter`."""

    shapes: list[Size]
    offsets: list[int]
    size: int  # of this rank's part
    process_group: ProcessGroup | None
    # That the group has a backend for.
    devices: list[torch.device]
    _pieces: dict[str, Pieces] = field(default_factory=dict)
    _tensors: dict[torch.device, Tensor] = field(default_factory=dict)

    def pieces(self, beta_scope: str) -> Pieces:
        """By the scope of betas, "tensor" or "row"."""
        if beta_scope not in self._pieces:
            units = [
                (shape[0], shape[1:].numel())
                if shape.numel() > 0 and beta_shape(shape, beta_scope)
                else (0, shape.numel())
                for shape in self.shapes
            ]
            rank = 0 if self.process_group is None else dist.get_rank(self.process_group)
            self._pieces[beta_scope] = find_pieces(
                units, self.offsets, self.size, rank, _world_size(self.process_group)
            )
        return self._pieces[beta_scope]

    def is_like(self, other: Flat) -> bool:
        """Whether state of the one is state of the other."""
        return (self.shapes, self.offsets, self.size, self.process_group) == (
            *(other.shapes, other.offsets, other.size),
            other.process_group,
        )

    def tensors(self, device: torch.device) -> Tensor:
        """Of each piece by row which of the tensors it is of: int64."""
        if device not in self._tensors:
            own = [piece.tensor for piece in self.pieces("row").pieces]
            self._tensors[device] = torch.tensor(own, dtype=torch.int64, device=device)
        return self._tensors[device]


def _world_size(process_group: ProcessGroup | None) -> int:
    return 1 if process_group is None else dist.get_world_size(process_group)


def make(
    param: Tensor,
    shapes: Iterable[Sequence[int]],
    offsets: Iterable[int] | None,
    process_group: ProcessGroup | None,
) -> Flat:
    """Raises ValueError on what `register_flat_parameter` raises it on."""
    sizes = [Size(map(int, shape)) for shape in shapes]
    numels = [size.numel() for size in sizes]
    if offsets is None:
        starts = list(accumulate(numels, initial=0))[:-1]
    else:
        starts = list(map(int, offsets))
    if param.dim() != 1 or param.is_complex() or is_dtensor(param):
        raise ValueError(
            "a flat parameter is a plain real tensor of one dimension, not a "
            f"{type(param).__name__} of {param.dtype} and shape {list(param.shape)}"
        )
    if len(starts) != len(sizes):
        raise ValueError(f"there are {len(starts)} offsets for {len(sizes)} shapes")
    if any(n < 0 for size in sizes for n in size):
        raise ValueError(f"shapes have to be of whole numbers from 0 on, not {sizes}")
    world_size = _world_size(process_group)
    if world_size < 1:
        raise ValueError("this rank is not in process_group")
    room = param.numel() * world_size
    stops = [start + numel for start, numel in zip(starts, numels, strict=True)]
    if any(stop > start for stop, start in zip([0, *stops], [*starts, room], strict=True)):
        raise ValueError(
            f"tensors of {numels} elements at offsets {starts} overlap, or do not fit into the "
            f"{room} elements of the ranks' parts"
        )
    devices = [] if process_group is None else process_group._device_types
    return Flat(sizes, starts, param.numel(), process_group, devices)


def check_parts(flat: Flat, device: torch.device) -> None:
    """Raises ValueError on all ranks unless they have equal parts."""
    size = torch.tensor([flat.size, -flat.size], device=device)
    largest, smallest = _all_reduce(size, dist.ReduceOp.MAX, flat).tolist()
    if largest != -smallest:
        raise ValueError(
            f"ranks have parts of {-smallest} to {largest} elements of a buffer; they have to be "
            "equal, the last one filled up"
        )


def check_group(group: dict[str, Any], takes_norm: bool) -> None:
    """Raises RuntimeError on options that take more than a flat parameter knows."""
    if group["beta_scope"] == "global":
        reason = (
            'beta_scope="global" is of the whole model, and a flat parameter is a part of it: take '
            'beta_scope="tensor" or "row"'
        )
    elif takes_norm:
        reason = (
            "max_grad_norm and skip_nonfinite go by the norm of the whole model, and a flat "
            "parameter is a part of it: clip before the step, as by DeepSpeed's gradient_clipping"
        )
    elif storage.is_packed(group):
        reason = (
            "state or parameters in few bits are laid out by tensor, and a flat parameter holds "
            "several: leave state_dtype, stochastic_rounding and store_param_remainders out"
        )
    else:
        return
    raise RuntimeError(f"{reason}, or use FSDP2 (torch.distributed.fsdp.fully_shard)")


class Cut(NamedTuple):
    """A tensor of a batch that takes part in the sums of a buffer's cut units."""

    flat: Flat
    n_cut: int
    place: int | None  # None: it has no elements, and its rank none of any cut unit


def split(
    flat: Flat, beta_scope: str, tensors: Sequence[Tensor], scalars: Sequence[tuple[Tensor, bool]]
) -> tuple[list[list[Tensor]], list[Cut | None]]:
    """Views of a flat parameter and what goes with it, a list for each of tensors and scalars.

    scalars: with whether there is one a unit.
    """
    own = flat.pieces(beta_scope)
    cuts = [None if p.cut is None else Cut(flat, own.n_cut, p.cut) for p in own.pieces]
    for tensor in tensors:
        if tensor.shape != (flat.size,):
            raise ValueError(
                f"a flat parameter was registered with {flat.size} elements; it, its gradient or "
                f"its state has shape {list(tensor.shape)}"
            )
    lists = [_of_pieces(tensor, own) for tensor in tensors]
    for scalar, by_unit in scalars:
        lists.append(_of_units(scalar, own) if by_unit else list(scalar.unbind()))
    if own.n_cut > 0 and not any(cuts):
        # All ranks have to be there where the sums are added up.
        cuts.append(Cut(flat, own.n_cut, None))
        nothing = [tensor.detach()[:0] for tensor in tensors]
        nothing += [scalar.new_zeros(()) for scalar, _ in scalars]
        lists = [[*views, empty] for views, empty in zip(lists, nothing, strict=True)]
    return lists, cuts


def _of_pieces(tensor: Tensor, own: Pieces) -> list[Tensor]:
    """The elements of each piece, [elements], or [rows, elements of a row]."""
    # Lengths of pieces and of what is between them, in turns.
    bounds = [0, *chain.from_iterable((p.start, p.stop) for p in own.pieces), len(tensor)]
    lengths = [stop - start for start, stop in pairwise(bounds)]
    views = tensor.detach().split_with_sizes(lengths)[1::2]
    return [
        view.view(piece.rows, -1) if piece.rows else view
        for piece, view in zip(own.pieces, views, strict=True)
    ]


def _of_units(scalar: Tensor, own: Pieces) -> list[Tensor]:
    """Of one value a unit those of each piece, 0-dim or [rows]."""
    if not any(piece.rows for piece in own.pieces):
        return list(scalar.unbind())
    views = scalar.split_with_sizes(own.units)
    return [
        view if piece.rows else view.view(()) for piece, view in zip(own.pieces, views, strict=True)
    ]


def add_cut(rows: Tensor, lines: Iterable[tuple[int, Cut]]) -> None:
    """Replaces the lines of rows of cut units by their sums over ranks, buffer by buffer."""
    buffers: dict[Flat, list[tuple[int, Cut]]] = {}
    for line, cut in lines:
        buffers.setdefault(cut.flat, []).append((line, cut))
    for flat, own in buffers.items():
        total = rows.new_zeros(own[0][1].n_cut, 2)
        for line, cut in own:
            if cut.place is not None:
                total[cut.place] = rows[line]
        total = _all_reduce(total, dist.ReduceOp.SUM, flat)
        for line, cut in own:
            if cut.place is not None:
                rows[line] = total[cut.place]


def agree_on_first_steps(flat: Flat, steps: Tensor) -> None:
    """With beta_scope="row": gives pieces of a tensor the most steps that one of them has.

    As seam.agree_on_first_steps.
    """
    index = flat.tensors(steps.device)
    largest = steps.new_zeros(len(flat.shapes)).scatter_reduce_(0, index, steps, "amax")
    steps.copy_(_all_reduce(largest, dist.ReduceOp.MAX, flat)[index])


def _all_reduce(values: Tensor, op: Any, flat: Flat) -> Tensor:
    """On a device that the group has a backend for: ZeRO-Offload steps on the CPU beside NCCL."""
    if flat.process_group is None:
        return values
    is_there = values.device.type in [device.type for device in flat.devices]
    there = values if is_there else values.to(flat.devices[0])
    dist.all_reduce(there, op=op, group=flat.process_group)
    return there.to(values.device)

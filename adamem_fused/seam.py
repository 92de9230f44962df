"""What a step is made of, batches, and the seam between the two halves that a backend does of one.

There sums go from tensor to tensor (beta_scope="global") and from rank to rank (sharding.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from adamem_fused import flat, sharding
from adamem_fused.backends import Backend, ops
from adamem_fused.backends.batch import Batch, Lr, group_slices, segment_slices
from adamem_fused.state import beta_shape

if TYPE_CHECKING:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec


@dataclass(eq=False)
class Work:
    """A batch, the backend that is to do it, and the parameters that it came from.

    A tensor of the batch is its parameter's shard on this rank where that is a DTensor, and
    else the parameter itself; either way, pairs of reals of a complex one.
    """

    backend: Backend
    batch: Any
    params: list[Tensor] = field(default_factory=list)
    # Those, of parameters and state, of which shards are written to.
    dtensors: list[Tensor] = field(default_factory=list)
    # Those of its tensors, by their place, that are pieces of what is cut in a flat buffer.
    cuts: list[tuple[int, flat.Cut]] = field(default_factory=list)
    # Of parameters that are not contiguous and have to be: with the copy that stands in for it.
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # Whether each of its tensors has sums that take those of other ranks.
    crosses: bool = False
    # Whether the extension has gathered it, and so that all its tensors are plain.
    ordinary: bool = False

    def here(self, tensor: Tensor | None) -> Tensor | None:
        """A scalar on this batch's device; GradScaler's may be on another."""
        if tensor is None or not self.batch.params:
            return tensor
        device = self.batch.params[0].device
        # A copy to the CPU is read at once, so it is waited for.
        return tensor.to(device, non_blocking=device.type != "cpu")

    def numels(self, place: slice) -> list[int]:
        """Elements of the whole tensors, complex ones as pairs of reals."""
        return [param.numel() * (1 + param.is_complex()) for param in self.params[place]]

    def shares(self, place: slice, rows: Tensor) -> Tensor:
        """The `numels` like the rows, copied to a GPU once: that waits for it."""
        numels, known = self.numels(place), self.batch.cache.setdefault("shares", {})
        if place.start not in known or known[place.start][0] != numels:
            known[place.start] = numels, torch.tensor(numels, dtype=rows.dtype, device=rows.device)
        return cast("Tensor", known[place.start][1])

    def parts(self) -> sharding.Parts:
        """What other ranks have parts of. Found anew where a DTensor or a scope is another one."""
        specs = list(map(sharding.spec_of, self.params))
        dims = list(map(Tensor.dim, self.batch.betas))
        known = self.batch.cache.get("parts")
        if known is None or known[1] != dims or not all(map(is_, known[0], specs)):
            known = specs, dims, sharding.parts(specs, self.batch.betas)
            self.batch.cache["parts"] = known
        return cast("sharding.Parts", known[2])

    def check(self) -> None:
        """As the backend's, which takes Python longer than a step: where all is as it was, not."""
        packed = self.batch.packed
        if ops.extension is None or not (self.ordinary or packed):
            self.backend.check(self.batch)
            return
        known, rounding = self.batch.cache.get("checked", (b"", None))
        _, structure = ops.extension.describe(self.batch.all_lists(), b"", known, False)
        own = packed and packed.rounding
        if structure is not known or rounding is not own:
            self.backend.check(self.batch)
            self.batch.cache["checked"] = structure, own

    def loss_numel(self) -> int:
        return sum(
            sum(self.numels(place))
            for hyper, place in zip(self.batch.hypers, group_slices(self.batch), strict=True)
            if hyper.loss_gap
        )


def sums_cross(spec: DTensorSpec, beta_scope: str) -> bool:
    """Whether the sums for a DTensor's betas take those of other ranks."""
    by_row = bool(beta_shape(spec.shape, beta_scope))
    return sharding.splits_rows(spec) if by_row else sharding.splits(spec)


def crossing(seen: list[Any]) -> bytes:
    """A byte of each spec that the extension's `gather` has seen, 1 where its sums cross ranks.

    Before those of a group it has whether the rows of its tensors have betas of their own.
    """
    scope, flags = "", []
    for item in seen:
        if isinstance(item, bool):
            scope = "row" if item else "tensor"
        flags.append(not isinstance(item, bool) and sums_cross(item, scope))
    return bytes(flags)


def may_be_zero(lr: Lr) -> bool:
    """Whether a learning rate is 0. A tensor on a GPU, which would be waited for, may be."""
    if not isinstance(lr, Tensor):
        return lr == 0
    return lr.device.type != "cpu" or torch.compiler.is_compiling() or lr.item() == 0


def group_rows(batch: Batch) -> list[slice]:
    """Each group's place in `rows`."""
    bounds = [0, *(place.stop for place in segment_slices(batch))]
    return [slice(bounds[place.start], bounds[place.stop]) for place in group_slices(batch)]


def share_sums(works: list[Work], rows: list[Tensor]) -> None:
    """Gives every tensor of a group with beta_scope="global" the sums over all such tensors.

    A first step needs no sums but to see whether it is one, which it can be at lr 0 alone: there
    it keeps the tensor's own.
    """
    places = [
        (work_rows, lines, hyper.lr, work.batch.steps[place])
        for work, work_rows in zip(works, rows, strict=True)
        if any(work.batch.shared)
        for shared, hyper, place, lines in zip(
            work.batch.shared,
            work.batch.hypers,
            group_slices(work.batch),
            group_rows(work.batch),
            strict=True,
        )
        if shared and place.stop > place.start
    ]
    if not places:
        return
    total = torch.cat([r[place].to(places[0][0]) for r, place, _, _ in places]).sum(0)
    for work_rows, place, lr, steps in places:
        shared_rows = total.to(work_rows)
        if isinstance(lr, Tensor) or lr == 0:
            first = torch.stack([step == 0 for step in steps])
            shared_rows = torch.where(first.unsqueeze(1), work_rows[place], shared_rows)
        work_rows[place] = shared_rows


def add_over_ranks(works: list[Work], rows: list[Tensor]) -> None:
    """Makes the rows of sharded tensors, and of pieces, those of the whole ones."""
    for work, work_rows in zip(works, rows, strict=True):
        if work.crosses:
            sharding.add_lines(work_rows, work.parts())
        if work.cuts:
            lines = [place.start for place in segment_slices(work.batch)]
            flat.add_cut(work_rows, [(lines[i], cut) for i, cut in work.cuts])


def agree_on_first_steps(works: list[Work]) -> None:
    """Lets a tensor's first step at lr 0 count on all ranks where it does on one.

    It does where a row has a gradient; the rows may be on different ranks.
    """
    for work in works:
        at_zero = [
            place
            for hyper, place in zip(work.batch.hypers, group_slices(work.batch), strict=True)
            if may_be_zero(hyper.lr)
        ]
        if not (work.dtensors and at_zero):
            continue
        for group, tensors in work.parts().tensors:
            firsts = [i for i in tensors if any(p.start <= i < p.stop for p in at_zero)]
            if firsts:
                sharding.take_largest([work.batch.steps[i] for i in firsts], group)


def find_waiting(works: list[Work]) -> list[Work]:
    """The works that take sums of other ranks, other works or outside of all of them."""
    sharing = [work for work in works if any(work.batch.shared)]
    return [
        work
        for work in works
        if work.crosses
        or any(hyper.loss_gap for hyper in work.batch.hypers)
        or (work in sharing and not (len(sharing) == 1 and work.backend.shares_sums))
    ]

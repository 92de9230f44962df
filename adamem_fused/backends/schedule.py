"""The order of a GPU step in one launch.

Every tensor is read twice, for its sums and, once these have given its beta, for its update. In
one launch the second reading can find in L2 what the first has left there. A bucket's step is
one sequence of items, each a chunk's sums or a chunk's update:

    sums     of all chunks, tensor by tensor, forwards;
    updates  of a tensor's chunks backwards, as its last ones are the freshest in L2, from where
             the sums are `ahead` chunks beyond the tensor's end. By then its sums are complete
             and its beta is there, so that hardly anyone has to wait.

What has to stay in L2 is a tensor and the chunks that the sums are ahead by. Of a tensor that is
larger, L2 still has the end, where its update begins; the rest is read twice.

How a kernel's blocks keep to the order is in csrc/cuda/schedule.h and triton_kernels/schedule.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adamem_fused.backends import tables
from adamem_fused.backends.batch import Batch
from adamem_fused.backends.tables import Bucket, Layout


class Plan(NamedTuple):
    """The items of a layout's buckets, and where a launch's blocks meet."""

    layout: Layout
    items: list[Tensor]  # of each bucket, see make_items
    control: Tensor  # int32, zero before the first launch: four words, and two for each tensor


def make_items(tensors: list[int], chunks: list[int], ahead: int) -> Tensor:
    """[items, 2] int32: a tensor, and a chunk for its sums, ~chunk for its update.

    Tensors have so many chunks each. One without elements has an item too, sums of nothing, so
    that its beta is taken.
    """
    # On the CPU whatever torch.set_default_device says.
    names = torch.tensor(tensors, dtype=torch.int32, device="cpu")
    updates = torch.tensor(chunks, dtype=torch.int64, device="cpu")
    sums = updates.clamp(min=1)
    ends = sums.cumsum(0)
    sum_places = torch.arange(int(sums.sum()), device="cpu")
    sum_chunks = sum_places - (ends - sums).repeat_interleave(sums)
    update_places = torch.arange(int(updates.sum()), device="cpu")
    update_chunks = updates.cumsum(0).repeat_interleave(updates) - 1 - update_places
    items = torch.stack(
        [
            torch.cat([names.repeat_interleave(sums), names.repeat_interleave(updates)]),
            torch.cat([sum_chunks, ~update_chunks]).to(torch.int32),
        ],
        dim=1,
    )
    # A tensor's updates stand before the sums at place end + ahead.
    order = torch.cat([2 * sum_places, (2 * (ends + ahead) - 1).repeat_interleave(updates)])
    return items[order.argsort(stable=True)]


def _chunk_counts(batch: Batch, layout: Layout, chunk: int) -> list[dict[int, int]]:
    """For each bucket its tensors' numbers of chunks.

    Tensors without elements belong to no bucket. They have a beta too: the first takes them.
    """
    places = {bucket.dtypes: i for i, bucket in enumerate(layout.buckets)}
    counts: list[dict[int, int]] = [{} for _ in layout.buckets]
    lists = (batch.params, batch.grads, *batch.memories.values())
    for i, tensors in enumerate(zip(*lists, strict=True)):
        numel = tensors[0].numel()
        bucket = places[tuple(tensor.dtype for tensor in tensors)] if numel else 0
        counts[bucket][i] = -(-numel // chunk)
    return counts


def _make_plan(batch: Batch, layout: Layout, chunk: int, ahead: Callable[[Bucket], int]) -> Plan:
    device = batch.params[0].device
    items = [
        tables.upload(make_items([*counts], [*counts.values()], ahead(bucket)), device)
        for bucket, counts in zip(layout.buckets, _chunk_counts(batch, layout, chunk), strict=True)
    ]
    control = torch.zeros(4 + 2 * len(batch.params), dtype=torch.int32, device=device)
    return Plan(layout, items, control)


def find_plan(
    batch: Batch, layout: Layout, chunk: int, ahead: Callable[[Bucket], int]
) -> Plan | None:
    """The layout's plan, made once; None where there is nothing to plan, or no time for it.

    ahead: by how many chunks a bucket's sums are to be ahead of its updates.
    """
    plan: Plan | None = batch.cache.get("plan")
    capturing = tables.is_capturing(batch.params[0].device)
    if plan is None or plan.layout is not layout:
        # Pinning memory is not allowed while a graph is captured.
        if not layout.buckets or capturing:
            return None
        plan = batch.cache["plan"] = _make_plan(batch, layout, chunk, ahead)
    if capturing:
        # The graph uses it whenever it is replayed, whatever later steps bring.
        batch.cache.setdefault("captured", []).append(plan)
    return plan

"""The sums of partial sums: an ordinary unit's, or those of all that share one beta."""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.tables import (
    FIRST_CHUNK,
    FIRST_SEGMENT,
    GROUP,
    chunks_of,
    column,
    shared_of,
)


@triton.jit
def sum_partials(partials, layout, chunks, units, i, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """num and den of unit i, in float64 and in an order that depends on num_warps alone."""
    first = column(layout, FIRST_CHUNK, units, i)
    count = chunks_of(layout, units, i, CHUNK)
    num = tl.zeros([PARTIALS], tl.float64)
    den = tl.zeros([PARTIALS], tl.float64)
    for k in range(0, count, PARTIALS):
        offsets = k + tl.arange(0, PARTIALS)
        mask = offsets < count
        # From L2: in the begin kernel other programs have just written them.
        at = partials + first + offsets
        num += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        den += tl.load(at + chunks, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(num), tl.sum(den)


@triton.jit
def store_partials(partials, chunks, chunk, num, den):
    tl.store(partials + chunk, num)
    tl.store(partials + chunks + chunk, den)


@triton.jit
def complete(
    layout, arrived, partials, units, chunks, i, chunk, count, num, den, CHUNK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Whether a chunk's sums are the last of its unit's `count`; num and den of the unit then.

    An atomic operation on a scalar is done by a program's first thread alone, as is the store of a
    scalar. The barriers order what its other threads do: before the release, and after the acquire.
    """
    is_last = count == 1
    if count > 1:
        store_partials(partials, chunks, chunk, num, den)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + i, 1, sem="acq_rel", scope="gpu") + 1 == count
        tl.debug_barrier()
        if is_last:
            tl.store(arrived + i, 0)
            num, den = sum_partials(partials, layout, chunks, units, i, CHUNK, PARTIALS)
    return is_last, num, den


@triton.jit
def num_den(
    rows, totals, hypers, partials, layout, chunks, units, i, step, ADAMW: tl.constexpr,
    CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Unit i's, or those of all that it shares a beta with. From the rows where there are any.

    A first step needs no sums but to see whether it is one: it keeps the unit's own.
    """
    group = column(layout, GROUP, units, i)
    if rows is not None:
        segment = column(layout, FIRST_SEGMENT, units, i)
        num = tl.load(rows + 2 * segment)
        den = tl.load(rows + 2 * segment + 1)
    elif (tl.load(shared_of(hypers, group, ADAMW)) != 0) & (step != 0):
        num = tl.load(totals)
        den = tl.load(totals + 1)
    else:
        num, den = sum_partials(partials, layout, chunks, units, i, CHUNK, PARTIALS)
    return num, den

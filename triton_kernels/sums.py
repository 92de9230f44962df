"""The sums of partial sums: a tensor's, or those of all tensors that share one beta."""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.tables import FIRST_CHUNK, GROUP, chunks_of, shared_of


@triton.jit
def sum_partials(partials, layout, chunks, n, i, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """num and den of tensor i, in float64 and in an order that depends on num_warps alone."""
    first = tl.load(layout + FIRST_CHUNK * n + i)
    count = chunks_of(layout, n, i, CHUNK)
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
    layout, arrived, partials, n, chunks, i, chunk, count, num, den, CHUNK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Whether a chunk's sums are the last of its tensor's `count`; num and den of the tensor then.

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
            num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    return is_last, num, den


@triton.jit
def num_den(
    rows, totals, hypers, partials, layout, chunks, n, i, step, ADAMW: tl.constexpr,
    CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Tensor i's, or those of all that it shares a beta with. From the rows where there are any.

    A first step needs no sums but to see whether it is one: it keeps the tensor's own.
    """
    group = tl.load(layout + GROUP * n + i)
    if rows is not None:
        num = tl.load(rows + 2 * i)
        den = tl.load(rows + 2 * i + 1)
    elif (tl.load(shared_of(hypers, group, ADAMW)) != 0) & (step != 0):
        num = tl.load(totals)
        den = tl.load(totals + 1)
    else:
        num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    return num, den

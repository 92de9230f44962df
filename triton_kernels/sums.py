"""The sums of partial sums: a tensor's, or those of all tensors that share one beta."""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.tables import ANY_LIST, FIRST_CHUNK, GROUP, chunks_of


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
        # From L2: in the kernel that does a whole step, other programs have just written them.
        at = partials + first + offsets
        num += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        den += tl.load(at + chunks, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(num), tl.sum(den)


@triton.jit(**ANY_LIST)
def sum_rows(layout, partials, rows, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """rows [n, 2]: every tensor's num and den. One program a tensor."""
    i = tl.program_id(0).to(tl.int64)
    num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    tl.store(rows + 2 * i, num)
    tl.store(rows + 2 * i + 1, den)


@triton.jit(**ANY_LIST)
def sum_shared(
    layout, hypers, chunk_tensors, partials, totals, n, chunks, COLUMNS: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """totals [2]: num and den over all tensors that share one beta. One program."""
    num = tl.zeros([PARTIALS], tl.float64)
    den = tl.zeros([PARTIALS], tl.float64)
    for k in range(0, chunks, PARTIALS):
        chunk = k + tl.arange(0, PARTIALS)
        mask = chunk < chunks
        i = tl.load(chunk_tensors + chunk, mask=mask, other=0)
        group = tl.load(layout + GROUP * n + i, mask=mask, other=0)
        # `shared` is the last column.
        shared = tl.load(hypers + group * COLUMNS + COLUMNS - 1, mask=mask, other=0.0)
        mask = mask & (shared != 0)
        num += tl.load(partials + chunk, mask=mask, other=0.0)
        den += tl.load(partials + chunks + chunk, mask=mask, other=0.0)
    tl.store(totals, tl.sum(num))
    tl.store(totals + 1, tl.sum(den))


@triton.jit
def num_den(
    rows, totals, hypers, partials, layout, chunks, n, i, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """From the rows where there are any, which is after something was done to them."""
    group = tl.load(layout + GROUP * n + i)
    if rows is not None:
        num = tl.load(rows + 2 * i)
        den = tl.load(rows + 2 * i + 1)
    elif tl.load(hypers + group * COLUMNS + COLUMNS - 1) != 0:
        num = tl.load(totals)
        den = tl.load(totals + 1)
    else:
        num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    return num, den

"""How the programs of one launch that does a whole step keep to its order.

The items and their order are those of adamem_fused/backends/schedule.py. Programs claim them one by
one, in order, from a counter. An update waits for items before its own alone, and these were
claimed before it, by programs that are running: so the walk comes to its end with any number of
programs, whether all of them are resident or not, and whatever else the GPU is doing.

Control words, int32, all zero before the first launch, and left as the next launch needs them.
A launch has a number of its own, so that nothing of a tensor's has to be reset:

    0       the first item that nobody has claimed
    1       programs that are through
    2       launches
    3       unused
    4 + 2i  of tensor i, chunks whose sums are there
    5 + 2i  the number of the launch whose beta is there

An atomic operation on a scalar is done by a program's first thread alone, as is the store of a
scalar. The barriers order what its other threads do: before a release, and after an acquire.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.tables import chunks_of

LEFT = tl.constexpr(1)
LAUNCHES = tl.constexpr(2)
SUMMED = tl.constexpr(4)
PUBLISHED = tl.constexpr(5)


@triton.jit
def launch_number(control):
    return tl.load(control + LAUNCHES) + 1


@triton.jit
def claim_item(control):
    return tl.atomic_add(control, 1, sem="relaxed", scope="gpu")


@triton.jit
def read_item(items, k):
    """A tensor and one of its chunks: its sums, or, where negative, the update of ~chunk."""
    item = items + 2 * k.to(tl.int64)
    return tl.load(item).to(tl.int64), tl.load(item + 1).to(tl.int64)


@triton.jit
def is_last_of_tensor(control, layout, n, i, CHUNK: tl.constexpr):
    """Counts a chunk whose sums were written. True for a tensor's last: all can be read then."""
    summed = control + SUMMED + 2 * i
    tl.debug_barrier()
    before = tl.atomic_add(summed, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    is_last = before + 1 >= chunks_of(layout, n, i, CHUNK)
    if is_last:
        tl.store(summed, 0)
    return is_last


@triton.jit
def publish(control, i, launch):
    """The tensor's beta and coefficients were written."""
    tl.debug_barrier()
    tl.atomic_xchg(control + PUBLISHED + 2 * i, launch, sem="release", scope="gpu")


@triton.jit
def wait(control, i, launch):
    """Until the tensor's beta and coefficients can be read."""
    # A read: Triton makes a load of it where it can.
    while tl.atomic_add(control + PUBLISHED + 2 * i, 0, sem="acquire", scope="gpu") != launch:
        pass
    tl.debug_barrier()


@triton.jit
def leave(control, launch):
    """The last program to leave makes all ready for the next launch."""
    before = tl.atomic_add(control + LEFT, 1, sem="acq_rel", scope="gpu")
    if before + 1 == tl.num_programs(0):
        tl.store(control, 0)
        tl.store(control + LEFT, 0)
        tl.store(control + LAUNCHES, launch)

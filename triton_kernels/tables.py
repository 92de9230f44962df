"""How the kernels find a step's tensors: tables in device memory, and what lies behind them.

The tables are laid out by adamem_fused/backends/tables.py, with one column a tensor (n of them):

    addresses  [rows, n] int64   data pointers: param, grad, the memories, the scalars
    layout     [5, n]    int64   number of elements, group, first chunk, which scalars are
                                 float64 (a bit each), whether parameter and memories are
                                 stored in the type of the arithmetic
    hypers     [groups, columns] float64, in the order of elements.AdamWHyper, SGDHyper;
                                 lrs [groups] int64: the address of a group's lr on the
                                 device, times 2, plus 1 for float64; 0: it is in hypers

A chunk is CHUNK elements of one tensor, or what is left of it: chunk_tensors [chunks] int32
names its tensor. Sums of a chunk go to partials [2, chunks] float64, and arrived [n] int32 counts
those of a tensor. What is worked out of a tensor's scalars is in coefficients [n, columns]
float64. Offsets are 64 bits wide throughout.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.elements import AdamWHyper, SGDHyper

# Rows of `layout`.
NUMEL = tl.constexpr(0)
GROUP = tl.constexpr(1)
FIRST_CHUNK = tl.constexpr(2)
DOUBLES = tl.constexpr(3)
EXACT = tl.constexpr(4)

# Columns of `hypers`.
ADAMW_HYPERS = tl.constexpr(len(AdamWHyper._fields))
SGD_HYPERS = tl.constexpr(len(SGDHyper._fields))

# Arguments that change with the list of tensors: one compiled kernel for all their values, and for
# tables wherever they begin.
ANY_LIST = {
    "do_not_specialize": ["n", "chunks", "first_chunk", "last_chunk"],
    "do_not_specialize_on_alignment": [
        *["addresses", "layout", "hypers", "lrs", "chunk_tensors", "arrived"],
        *["partials", "totals", "rows", "coefficients", "grad_scale", "found_inf"],
    ],
}


@triton.jit
def data_pointer(addresses, row: tl.constexpr, n, i, DTYPE: tl.constexpr):
    return tl.load(addresses + row * n + i).to(tl.pointer_type(DTYPE))


@triton.jit
def load_elements(pointer, offsets, numel, VECTOR: tl.constexpr, T: tl.constexpr):
    # 16-byte accesses need both: the hint, on the pointers that are loaded from, and no mask.
    if VECTOR:
        value = tl.load(tl.multiple_of(pointer + offsets, 16))
    else:
        value = tl.load(pointer + offsets, mask=offsets < numel, other=0.0)
    return value.to(T)


@triton.jit
def store_elements(pointer, offsets, value, numel, VECTOR: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if VECTOR:
        tl.store(tl.multiple_of(pointer + offsets, 16), value)
    else:
        tl.store(pointer + offsets, value, mask=offsets < numel)


@triton.jit
def is_skipped(found_inf):
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    return skipped


@triton.jit
def _load_scalar(address, is_double):
    if is_double != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def _store_scalar(address, value, is_double):
    if is_double != 0:
        tl.store(address.to(tl.pointer_type(tl.float64)), value)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32))


@triton.jit
def read_scalar(addresses, layout, first: tl.constexpr, k: tl.constexpr, n, i):
    """Scalar k of tensor i; the scalars' rows of `addresses` start at `first`."""
    address = tl.load(addresses + (first + k) * n + i)
    return _load_scalar(address, (tl.load(layout + DOUBLES * n + i) >> k) & 1)


@triton.jit
def write_scalar(addresses, layout, first: tl.constexpr, k: tl.constexpr, n, i, value):
    address = tl.load(addresses + (first + k) * n + i)
    _store_scalar(address, value, (tl.load(layout + DOUBLES * n + i) >> k) & 1)


@triton.jit
def _read_lr(hypers, lrs, group, COLUMNS: tl.constexpr):
    tagged = tl.load(lrs + group)
    if tagged == 0:
        lr = tl.load(hypers + group * COLUMNS)
    else:
        lr = _load_scalar(tagged >> 1, tagged & 1)
    return lr


@triton.jit
def adamw_hyper(hypers, lrs, group):
    h = hypers + group * ADAMW_HYPERS
    return AdamWHyper(
        lr=_read_lr(hypers, lrs, group, ADAMW_HYPERS),
        beta_max=tl.load(h + 1),
        beta2=tl.load(h + 2),
        log_beta2=tl.load(h + 3),
        eps=tl.load(h + 4),
        weight_decay=tl.load(h + 5),
        memory_lambda=tl.load(h + 6),
        anchored=tl.load(h + 7),
        loss_gap=tl.load(h + 8),
        maximize=tl.load(h + 9),
        shared=tl.load(h + 10),
    )


@triton.jit
def sgd_hyper(hypers, lrs, group):
    h = hypers + group * SGD_HYPERS
    return SGDHyper(
        lr=_read_lr(hypers, lrs, group, SGD_HYPERS),
        beta_max=tl.load(h + 1),
        weight_decay=tl.load(h + 2),
        memory_lambda=tl.load(h + 3),
        anchored=tl.load(h + 4),
        loss_gap=tl.load(h + 5),
        maximize=tl.load(h + 6),
        shared=tl.load(h + 7),
    )


@triton.jit
def shared_of(hypers, group, ADAMW: tl.constexpr):
    """Where the last column is."""
    COLUMNS: tl.constexpr = ADAMW_HYPERS if ADAMW else SGD_HYPERS
    return hypers + group * COLUMNS + COLUMNS - 1


# ---- chunks ---------------------------------------------------------------------------


@triton.jit
def place(layout, chunk_tensors, chunk, n):
    """A chunk's tensor, and which of the tensor's chunks it is."""
    i = tl.load(chunk_tensors + chunk).to(tl.int64)
    return i, chunk - tl.load(layout + FIRST_CHUNK * n + i)


@triton.jit
def chunks_of(layout, n, i, CHUNK: tl.constexpr):
    """A tensor's number of chunks."""
    return tl.cdiv(tl.load(layout + NUMEL * n + i), CHUNK)


@triton.jit
def ends(aligned, start, numel, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How far into a chunk whole blocks of 16-byte accesses go, and the chunk's length."""
    length = tl.minimum(numel - start, CHUNK)
    length = length.to(tl.int32)
    return tl.where(aligned, length // BLOCK * BLOCK, 0), length


@triton.jit
def is_aligned(a, b, c, d):
    low_bits = a.to(tl.int64) | b.to(tl.int64) | c.to(tl.int64) | d.to(tl.int64)
    return (low_bits & 15) == 0


@triton.jit
def masked(value, old, offsets, numel, VECTOR: tl.constexpr):
    """The value, and the old one beyond the end, where the formulas may have divided by 0."""
    if not VECTOR:
        value = tl.where(offsets < numel, value, old)
    return value

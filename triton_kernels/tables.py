"""How the kernels find a step's tensors: tables in device memory, and what lies behind them.

The tables are laid out by adamem_fused/backends/tables.py. What has coefficients is a unit. An
ordinary one is a single segment, a tensor or a row of one; a unit of rows is a tensor whose rows
have betas.

    addresses  [lists, n] int64      data pointers of n tensors: param, grad, the memories, the
                                     scalars
    layout     [15, units] int64     number of elements (of a row), group, first chunk, which
                                     scalars are float64 (a bit each), whether parameter and
                                     memories are stored in the type of the arithmetic, tensor,
                                     which row of it an ordinary unit is (0 where it is all of
                                     it), number of rows (NO_ROWS: an ordinary unit), first line
                                     in the seam's rows; the tensor's column of Packed.rounding
                                     (adamem_fused/backends/batch.py), and how many elements share
                                     a scale (zeros where nothing is packed)
    hypers     [groups, columns] float64, in the order of elements.AdamWHyper, SGDHyper;
                                 lrs [groups] int64: the address of a group's lr on the
                                 device, times 2, plus 1 for float64; 0: it is in hypers

A chunk is CHUNK elements of an ordinary unit, or what is left of it; or, of a unit of rows, as many
whole rows as fit, and one at least: chunk_units [chunks] int32 names its unit. Sums of an ordinary
unit's chunk go to partials [2, chunks] float64, and arrived [units] int32 counts those of a unit.
What is worked out of its scalars is in coefficients [units, columns] float64. Offsets are 64 bits
wide but within a chunk. A tensor's chunks lie side by side: tensor_chunks [2, n] int64 holds the
first, and how many there are.
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
TENSOR = tl.constexpr(5)
ROW = tl.constexpr(6)
ROWS = tl.constexpr(7)
FIRST_SEGMENT = tl.constexpr(8)
KEY = tl.constexpr(9)
OFFSET = tl.constexpr(10)
STRETCH = tl.constexpr(11)
SKIP = tl.constexpr(12)
ROUNDS = tl.constexpr(13)
BLOCK_LENGTH = tl.constexpr(14)

NO_ROWS = tl.constexpr(-1)

# Columns of `hypers`.
ADAMW_HYPERS = tl.constexpr(len(AdamWHyper._fields))
SGD_HYPERS = tl.constexpr(len(SGDHyper._fields))

# Arguments that change with the list of tensors: one compiled kernel for all their values, and for
# tables wherever they begin.
ANY_LIST = {
    "do_not_specialize": ["n", "units", "chunks", "first_chunk", "last_chunk"],
    "do_not_specialize_on_alignment": [
        *["addresses", "layout", "hypers", "lrs", "chunk_units", "arrived"],
        *["partials", "totals", "rows", "coefficients", "grad_scale", "found_inf"],
        *["tensor_chunks", "norms"],
    ],
}


@triton.jit
def column(layout, row: tl.constexpr, units, i):
    """What the layout says of unit i."""
    return tl.load(layout + row * units + i)


@triton.jit
def data_pointer(addresses, row: tl.constexpr, n, tensor, DTYPE: tl.constexpr):
    return tl.load(addresses + row * n + tensor).to(tl.pointer_type(DTYPE))


@triton.jit
def is_skipped(found_inf):
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    return skipped


@triton.jit
def load_scalars(address, is_double, at, mask):
    if is_double != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float64)) + at, mask=mask)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask).to(tl.float64)
    return value


@triton.jit
def store_scalars(address, is_double, value, at, mask):
    if is_double != 0:
        tl.store(address.to(tl.pointer_type(tl.float64)) + at, value, mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, value.to(tl.float32), mask=mask)


@triton.jit
def find_scalar(addresses, layout, first: tl.constexpr, k: tl.constexpr, n, units, i):
    """Where scalar k of unit i's tensor lies, and whether in float64; the scalars' rows of
    `addresses` start at `first`."""
    address = tl.load(addresses + (first + k) * n + column(layout, TENSOR, units, i))
    return address, (column(layout, DOUBLES, units, i) >> k) & 1


@triton.jit
def read_scalar(addresses, layout, first: tl.constexpr, k: tl.constexpr, n, units, i, at=0):
    address, is_double = find_scalar(addresses, layout, first, k, n, units, i)
    return load_scalars(address, is_double, at, None)


@triton.jit
def write_scalar(
    addresses, layout, first: tl.constexpr, k: tl.constexpr, n, units, i, value, at=0
):  # fmt: skip
    address, is_double = find_scalar(addresses, layout, first, k, n, units, i)
    store_scalars(address, is_double, value, at, None)


@triton.jit
def _read_lr(hypers, lrs, group, COLUMNS: tl.constexpr):
    tagged = tl.load(lrs + group)
    if tagged == 0:
        lr = tl.load(hypers + group * COLUMNS)
    else:
        lr = load_scalars(tagged >> 1, tagged & 1, 0, None)
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
def place(layout, chunk_units, chunk, units):
    """A chunk's unit, and which of the unit's chunks it is."""
    i = tl.load(chunk_units + chunk).to(tl.int64)
    return i, chunk - column(layout, FIRST_CHUNK, units, i)


@triton.jit
def chunks_of(layout, units, i, CHUNK: tl.constexpr):
    """An ordinary unit's number of chunks."""
    return tl.cdiv(column(layout, NUMEL, units, i), CHUNK)


@triton.jit
def rows_of(layout, units, i, chunk, CHUNK: tl.constexpr):
    """A chunk's first row, and how many it has."""
    numel = column(layout, NUMEL, units, i)
    most = tl.maximum(CHUNK // tl.maximum(numel, 1), 1)
    first = chunk * most
    return first, tl.minimum(column(layout, ROWS, units, i) - first, most).to(tl.int32)


@triton.jit
def elements_of(layout, units, i, chunk, CHUNK: tl.constexpr):
    """A chunk's first element in its tensor, and how many it has; of either kind of unit."""
    numel = column(layout, NUMEL, units, i)
    if column(layout, ROWS, units, i) == NO_ROWS:
        start = chunk * CHUNK
        begin = column(layout, ROW, units, i) * numel + start
        length = tl.minimum(numel - start, CHUNK).to(tl.int32)
    else:
        row, count = rows_of(layout, units, i, chunk, CHUNK)
        begin = row * numel
        length = count * numel.to(tl.int32)
    return begin, length


@triton.jit
def ends(aligned, start, numel, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How far into a chunk whole blocks of 16-byte accesses go, and the chunk's length."""
    length = tl.minimum(numel - start, CHUNK)
    length = length.to(tl.int32)
    return tl.where(aligned, length // BLOCK * BLOCK, 0), length

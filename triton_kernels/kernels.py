"""The kernels of a step: prepare, begin, rows, beta where it waits for other sums, and finish.

Lists of addresses: param, grad, the memories (exp_avg and exp_avg_sq where ADAMW, momentum_buffer
elsewhere), step, beta_prod where ADAMW, prev_lr, beta.

prepare works out a unit's coefficients.

A unit of rows is done by the rows kernel. A program loads as many rows as it can hold, takes their
num and den, and with their betas updates what it holds: one reading, with either plane, and nothing
to repair. Where num and den are asked for, one launch writes them, and a later one takes what it
finds in their place.

Of an ordinary unit begin takes a chunk's num and den, and, where the unit guesses, updates the
chunk with the cap for beta while it does so. The last program of a unit to arrive adds its partial
sums in a fixed order, so that two runs give the same bits, writes its scalars, and leaves in
coefficients what finish is to do: nothing, a repair, or the update. A unit of one chunk is finished
by its program at once. With the SEAM begin leaves the partial sums alone, and the beta kernel does
the rest.

What is stored in few bits (LOW) is decoded when it is loaded and rounded when it is stored:
storage.py. A repair begins with what was rounded, and rounds once more.

No program waits for another. With found_inf not 0 nothing is written but scratch, and rows of
zeros.

The squared norms of gradients, which clip a step or leave it out, are there before it: squares
takes a chunk's sum, whatever its unit, and a program a tensor adds them up.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.elements import (
    AdamWCoefficients,
    SGDCoefficients,
    adamw_add,
    adamw_coefficients,
    adamw_corrected,
    adamw_guesses,
    adamw_move,
    adamw_repair,
    adamw_root,
    adamw_sums,
    adamw_terms,
    adamw_update,
    clipped_beta,
    is_idle,
    sgd_coefficients,
    sgd_first_den,
    sgd_sums,
    sgd_update,
)
from adamem_fused.triton_kernels.storage import (
    block_at,
    load_elements,
    load_memory,
    load_param,
    load_square,
    masked,
    open_elements,
    rows_at,
    square_as_stored,
    store,
    to_repair,
)
from adamem_fused.triton_kernels.sums import complete, num_den, store_partials, sum_partials
from adamem_fused.triton_kernels.tables import (
    ANY_LIST,
    EXACT,
    FIRST_SEGMENT,
    GROUP,
    NO_ROWS,
    NUMEL,
    ROW,
    ROWS,
    TENSOR,
    adamw_hyper,
    chunks_of,
    column,
    data_pointer,
    elements_of,
    ends,
    find_scalar,
    is_skipped,
    load_scalars,
    place,
    read_scalar,
    rows_of,
    sgd_hyper,
    shared_of,
    store_scalars,
    write_scalar,
)

# Columns of coefficients; what the elements read lies behind them.
REST = tl.constexpr(0)
KEEP = tl.constexpr(1)
TAKE = tl.constexpr(2)  # what a repair or an update takes
STEP = tl.constexpr(3)
BETA_PROD = tl.constexpr(4)
BETA_MAX = tl.constexpr(5)
MEMORY_LAMBDA = tl.constexpr(6)
LR = tl.constexpr(7)
GUESSES = tl.constexpr(8)
READ = tl.constexpr(9)
COEFFICIENTS = tl.constexpr(READ.value + len(AdamWCoefficients._fields))

# What REST may be.
DONE = tl.constexpr(0)
REPAIR = tl.constexpr(1)
UPDATE = tl.constexpr(2)

# What the rows kernel does: all; sums, to `rows`; or the update, by the sums in `rows`.
WHOLE = tl.constexpr(0)
BEGIN = tl.constexpr(1)
FINISH = tl.constexpr(2)

# How many chunks a program of finish looks at together.
LOOK = tl.constexpr(32)

# Where the largest of a chunk's gradients is in between, its squares are summed as they are in
# float32: those that are below its range then add nothing.
LEAST = tl.constexpr(1e-15)
MOST = tl.constexpr(1e17)


@triton.jit
def _load_coefficients(row, T: tl.constexpr, ADAMW: tl.constexpr):
    row += READ
    if ADAMW:
        columns = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
        return AdamWCoefficients(*[tl.load(row + k).to(T) for k in columns])
    else:
        return SGDCoefficients(*[tl.load(row + k).to(T) for k in (0, 1, 2, 3, 4, 5, 6)])


@triton.jit
def _mixture(row, num, den, ADAMW: tl.constexpr):
    """Of segments with these sums: beta; what the new memory keeps of the old, and takes of the
    gradient; whether the step is none of theirs."""
    step, lr, beta_max = tl.load(row + STEP), tl.load(row + LR), tl.load(row + BETA_MAX)
    beta = clipped_beta(num, den, beta_max)
    if ADAMW:
        # There is no earlier iterate at the first step.
        beta = tl.where(step == 0, beta_max, beta)
        keep = beta
        take = 1.0 - beta
    else:
        beta = tl.where(step == 0, 0.0, beta)
        memory_lambda = tl.load(row + MEMORY_LAMBDA)
        keep = tl.where(step == 0, 0.0, (beta + memory_lambda) / (1.0 + memory_lambda))
        take = tl.where(step == 0, 1.0, (1.0 - beta) / (1.0 + memory_lambda))
    return beta, keep, take, is_idle(step, lr, den)


@triton.jit
def _count_step(addresses, layout, row, n, units, i, ADAMW: tl.constexpr):
    """Writes the step and prev_lr of a unit's tensor."""
    step, lr = tl.load(row + STEP), tl.load(row + LR)
    if ADAMW:
        write_scalar(addresses, layout, 4, 0, n, units, i, step + 1.0)
        write_scalar(addresses, layout, 4, 2, n, units, i, lr)
    else:
        write_scalar(addresses, layout, 3, 0, n, units, i, step + 1.0)
        write_scalar(addresses, layout, 3, 1, n, units, i, lr)


@triton.jit
def _set_beta(addresses, layout, row, n, units, i, num, den, ADAMW: tl.constexpr):
    """Writes an ordinary unit's beta and scalars; returns what is left to do: rest, keep, take."""
    beta, keep, take, idle = _mixture(row, num, den, ADAMW)
    if ADAMW:
        beta_max = tl.load(row + BETA_MAX)
        guesses = tl.load(row + GUESSES) != 0
        # Where den = 0, d equals g, and any beta gives the same.
        done = idle | (guesses & ((beta == beta_max) | (den == 0)))
        rest = tl.where(done, DONE, tl.where(guesses, REPAIR, UPDATE))
        take = tl.where(guesses, (beta_max - beta) / tl.where(guesses, beta_max, 1.0), take)
    else:
        rest = tl.where(idle, DONE, UPDATE)
    if not idle:
        # Of a tensor of several units each writes the same.
        _count_step(addresses, layout, row, n, units, i, ADAMW)
        segment = column(layout, ROW, units, i)
        if ADAMW:
            beta_prod = tl.load(row + BETA_PROD) * beta
            write_scalar(addresses, layout, 4, 1, n, units, i, beta_prod, segment)
            write_scalar(addresses, layout, 4, 3, n, units, i, beta, segment)
        else:
            write_scalar(addresses, layout, 3, 2, n, units, i, beta, segment)
    return rest, keep, take


@triton.jit
def _store_rest(row, rest, keep, take):
    tl.store(row + REST, rest.to(tl.float64))
    tl.store(row + KEEP, keep)
    tl.store(row + TAKE, take)


@triton.jit
def _open_chunk(
    addresses, layout, n, units, i, chunk, step,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    ADAMW: tl.constexpr, LOW: tl.constexpr, STRETCHED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's elements, where their 16-byte accesses end, and how many they are."""
    numel, start = column(layout, NUMEL, units, i), chunk * CHUNK
    e, aligned = open_elements(
        addresses, layout, n, units, i, column(layout, ROW, units, i) * numel + start, step,
        PARAM, GRAD, MEMORY, SQUARE, ADAMW, LOW, STRETCHED,
    )  # fmt: skip
    middle, end = ends(aligned, start, numel, BLOCK, CHUNK)
    return e, middle, end


@triton.jit
def _begin_blocks(
    e, num, den, begin, end, numel, c,
    GUESS: tl.constexpr, DECAY: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    for k in range(begin, end, BLOCK):
        at = block_at(k, numel, BLOCK, VECTOR)
        gs = load_elements(e.g, at, VECTOR, T)
        ds = load_memory(e, at, VECTOR, T)
        xs = gs
        if GUESS or DECAY:
            xs = load_param(e, at, VECTOR, T)
        if ADAMW:
            vs, root = adamw_root(gs, load_square(e, at, VECTOR, T), c)
            new_num, new_den = adamw_sums(xs, gs, ds, root, num, den, c, DECAY)
        else:
            new_num, new_den = sgd_sums(xs, gs, ds, num, den, c, DECAY)
        num = masked(new_num, num, at)
        den = masked(new_den, den, at)
        if GUESS:
            xs, ds = adamw_update(xs, gs, ds, root, c.cap_take, c)
            store(e, at, xs, ds, square_as_stored(e, at, vs), VECTOR)
    return num, den


@triton.jit
def _begin_chunk(
    e, middle, end, c,
    GUESS: tl.constexpr, DECAY: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's num and den. Where GUESS, it is updated with the cap."""
    num = tl.zeros([BLOCK], T)
    den = tl.zeros([BLOCK], T)
    num, den = _begin_blocks(
        e, num, den, 0, middle, end, c, GUESS, DECAY, ADAMW, T, BLOCK, True
    )  # fmt: skip
    num, den = _begin_blocks(
        e, num, den, middle, end, end, c, GUESS, DECAY, ADAMW, T, BLOCK, False
    )  # fmt: skip
    return tl.sum(num).to(tl.float64), tl.sum(den).to(tl.float64)


@triton.jit
def _finish_blocks(
    e, begin, end, numel, keep, take, c,
    MISSED: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    for k in range(begin, end, BLOCK):
        at = block_at(k, numel, BLOCK, VECTOR)
        xs = load_param(e, at, VECTOR, T)
        gs = load_elements(e.g, at, VECTOR, T)
        ds = load_memory(e, at, VECTOR, T)
        if MISSED:
            vs = load_square(e, at, VECTOR, T)
            xs, ds = adamw_repair(xs, gs, ds, tl.sqrt(vs), take, c)
            store(e, at, xs, ds, None, VECTOR)
        elif ADAMW:
            vs, root = adamw_root(gs, load_square(e, at, VECTOR, T), c)
            square = square_as_stored(e, at, vs)
            xs, ds = adamw_update(xs, gs, ds, root, take, c)
            store(e, at, xs, ds, square, VECTOR)
        else:
            xs, ds = sgd_update(xs, gs, ds, keep, take, c)
            store(e, at, xs, ds, None, VECTOR)


@triton.jit
def _finish_chunk(
    e, middle, end, rest, keep, take, c,
    ADAMW: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Repairs or updates a chunk."""
    keep, take = keep.to(T), take.to(T)
    if rest == UPDATE:
        _finish_blocks(e, 0, middle, end, keep, take, c, False, ADAMW, T, BLOCK, True)
        _finish_blocks(e, middle, end, end, keep, take, c, False, ADAMW, T, BLOCK, False)
    if ADAMW:
        if rest == REPAIR:
            e = to_repair(e)
            _finish_blocks(e, 0, middle, end, keep, take, c, True, ADAMW, T, BLOCK, True)
            _finish_blocks(e, middle, end, end, keep, take, c, True, ADAMW, T, BLOCK, False)


# ---- rows -----------------------------------------------------------------------------


@triton.jit
def _load_rows(
    e, first, active, numel,
    READS_PARAM: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    at = rows_at(first, active, numel, HEIGHT, WIDTH, VECTOR)
    gs = load_elements(e.g, at, VECTOR, T)
    ds = load_memory(e, at, VECTOR, T)
    xs = gs
    if READS_PARAM:
        xs = load_param(e, at, VECTOR, T)
    vs = ds
    if ADAMW:
        vs = load_square(e, at, VECTOR, T)
    return xs, gs, ds, vs


@triton.jit
def _rounded(c, T: tl.constexpr, ADAMW: tl.constexpr):
    """Coefficients of float64 in the type of the arithmetic."""
    if ADAMW:
        return AdamWCoefficients(*[c[k].to(T) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)])
    else:
        return SGDCoefficients(*[c[k].to(T) for k in (0, 1, 2, 3, 4, 5, 6)])


@triton.jit
def _are_zero(rows, layout, units, i, BLOCK: tl.constexpr):
    """Whether den is 0 in all of a unit's lines of the seam's rows."""
    first, count = column(layout, FIRST_SEGMENT, units, i), column(layout, ROWS, units, i)
    others = tl.zeros([BLOCK], tl.int32)
    for k in range(0, count, BLOCK):
        places = k + tl.arange(0, BLOCK)
        den = tl.load(rows + 2 * (first + places) + 1, mask=places < count, other=0.0)
        others |= (den != 0).to(tl.int32)
    return tl.max(others) == 0


@triton.jit
def _store_rows(
    e, xs, ds, square, first, active, numel,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    at = rows_at(first, active, numel, HEIGHT, WIDTH, VECTOR)
    store(e, at, xs, ds, square, VECTOR)


# ---- kernels --------------------------------------------------------------------------


@triton.jit(**ANY_LIST)
def am_prepare(
    addresses, layout, hypers, lrs, coefficients, grad_scale, found_inf, n, units,
    ADAMW: tl.constexpr, SEAM: tl.constexpr, ROWS_SEAM: tl.constexpr,
):  # fmt: skip
    """Every unit's coefficients. One program a unit."""
    if is_skipped(found_inf):
        return
    i = tl.program_id(0).to(tl.int64)
    group = column(layout, GROUP, units, i)
    rows = column(layout, ROWS, units, i)
    row = coefficients + COEFFICIENTS * i
    if ADAMW:
        h = adamw_hyper(hypers, lrs, group)
        step = read_scalar(addresses, layout, 4, 0, n, units, i)
        prev_lr = read_scalar(addresses, layout, 4, 2, n, units, i)
        # Those of rows are left to the rows kernel: with 0 nothing is corrected.
        beta_prod = tl.zeros((), tl.float64)
        if rows == NO_ROWS:
            segment = column(layout, ROW, units, i)
            beta_prod = read_scalar(addresses, layout, 4, 1, n, units, i, segment)
        c = adamw_coefficients(h, step, prev_lr, grad_scale)
        c = adamw_corrected(c, h.beta_max, beta_prod)
        # A repair reads the gradient once more: it may not be what was written.
        tensor = column(layout, TENSOR, units, i)
        is_own = tl.load(addresses + tensor) != tl.load(addresses + n + tensor)
        guesses = adamw_guesses(h, step, is_own & (column(layout, EXACT, units, i) != 0))
        tl.store(row + BETA_PROD, beta_prod)
        tl.store(row + GUESSES, guesses.to(tl.float64))
    else:
        h = sgd_hyper(hypers, lrs, group)
        step = read_scalar(addresses, layout, 3, 0, n, units, i)
        prev_lr = read_scalar(addresses, layout, 3, 1, n, units, i)
        c = sgd_coefficients(h, step, prev_lr, grad_scale)
    tl.store(row + STEP, step)
    tl.store(row + BETA_MAX, h.beta_max)
    tl.store(row + MEMORY_LAMBDA, h.memory_lambda)
    tl.store(row + LR, h.lr)
    for k in tl.static_range(len(c)):
        tl.store(row + READ + k, c[k])
    tl.debug_barrier()
    if not SEAM:
        # A tensor without elements has no chunk whose program would do this.
        if (rows == NO_ROWS) & (column(layout, NUMEL, units, i) == 0):
            zero = tl.zeros((), tl.float64)
            _set_beta(addresses, layout, row, n, units, i, zero, zero, ADAMW)
    if not ROWS_SEAM:
        # No other unit reads these scalars. A step that may be none is left to the rows.
        if (rows != NO_ROWS) & ((step != 0) | (h.lr != 0)):
            _count_step(addresses, layout, row, n, units, i, ADAMW)


@triton.jit(**ANY_LIST)
def am_rows(
    addresses, layout, chunk_units, rows, coefficients, found_inf, n, units, first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    T: tl.constexpr, ADAMW: tl.constexpr, LOW: tl.constexpr, STRETCHED: tl.constexpr,
    DECAY: tl.constexpr, PASS: tl.constexpr, CHUNK: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of up to WIDTH elements, HEIGHT at a time, from first_chunk on. One program a chunk."""
    skipped = is_skipped(found_inf)
    if PASS != BEGIN:
        if skipped:
            return
    i, chunk = place(layout, chunk_units, first_chunk + tl.program_id(0).to(tl.int64), units)
    numel = column(layout, NUMEL, units, i)
    first, count = rows_of(layout, units, i, chunk, CHUNK)
    row = coefficients + COEFFICIENTS * i
    step, lr = tl.load(row + STEP), tl.load(row + LR)
    e, aligned = open_elements(
        addresses, layout, n, units, i, first * numel, step,
        PARAM, GRAD, MEMORY, SQUARE, ADAMW, LOW, STRETCHED,
    )  # fmt: skip
    aligned = aligned & (numel % 8 == 0)
    if LOW:
        # A remainder's 16 bytes are as many elements.
        aligned = aligned & ((numel % 16 == 0) | (e.low.has_remainder == 0))
    numel = numel.to(tl.int32)
    c = _load_coefficients(row, tl.float64, ADAMW)
    seam = 2 * (column(layout, FIRST_SEGMENT, units, i) + first)
    if ADAMW:
        beta_prods, double_prods = find_scalar(addresses, layout, 4, 1, n, units, i)
        betas, double_betas = find_scalar(addresses, layout, 4, 3, n, units, i)
    else:
        betas, double_betas = find_scalar(addresses, layout, 3, 2, n, units, i)
    READS_PARAM: tl.constexpr = PASS != BEGIN or DECAY
    for k in range(0, count, HEIGHT):
        places = k + tl.arange(0, HEIGHT)
        active = places < count
        own = c
        if ADAMW:
            beta_prod = load_scalars(beta_prods, double_prods, first + places, active)
            own = adamw_corrected(c, tl.load(row + BETA_MAX), beta_prod[:, None])
        own = _rounded(own, T, ADAMW)
        if aligned:
            xs, gs, ds, vs = _load_rows(
                e, k, active, numel, READS_PARAM, ADAMW, T, HEIGHT, WIDTH, True
            )  # fmt: skip
        else:
            xs, gs, ds, vs = _load_rows(
                e, k, active, numel, READS_PARAM, ADAMW, T, HEIGHT, WIDTH, False
            )  # fmt: skip
        square = None
        if ADAMW:
            vs, root = adamw_root(gs, vs, own)
            at = rows_at(k, active, numel, HEIGHT, WIDTH, False)
            square = square_as_stored(e, at, vs)
            gs = gs * own.grad_factor
            terms = adamw_terms(gs, ds, root, own)
        if PASS == FINISH:
            num = tl.load(rows + seam + 2 * places, mask=active, other=0.0)
            den = tl.load(rows + seam + 2 * places + 1, mask=active, other=0.0)
        else:
            zero = tl.zeros([HEIGHT, WIDTH], T)
            if ADAMW:
                num, den = adamw_add(xs, gs, terms, zero, zero, own, DECAY)
            else:
                num, den = sgd_sums(xs, gs, ds, zero, zero, own, DECAY)
            inside = tl.arange(0, WIDTH)[None, :] < numel
            num = tl.sum(tl.where(inside, num, 0.0), 1).to(tl.float64)
            den = tl.sum(tl.where(inside, den, 0.0), 1).to(tl.float64)
            if not ADAMW:
                num = tl.where(step == 0, 0.0, num)
                den = tl.where(step == 0, sgd_first_den(lr, den), den)
        if PASS == BEGIN:
            tl.store(rows + seam + 2 * places, tl.where(skipped, 0.0, num), mask=active)
            tl.store(rows + seam + 2 * places + 1, tl.where(skipped, 0.0, den), mask=active)
        else:
            beta, keep, take, idle = _mixture(row, num, den, ADAMW)
            active = active & (idle == 0)
            # A row's beta_prod is read by all of its threads, and written by one of them.
            tl.debug_barrier()
            store_scalars(betas, double_betas, beta, first + places, active)
            if ADAMW:
                beta_prod = beta_prod * beta
                store_scalars(beta_prods, double_prods, beta_prod, first + places, active)
                xs, ds = adamw_move(xs, terms, take.to(T)[:, None], own)
            else:
                xs, ds = sgd_update(
                    xs, gs, ds, keep.to(T)[:, None], take.to(T)[:, None], own
                )  # fmt: skip
            if aligned:
                _store_rows(e, xs, ds, square, k, active, numel, HEIGHT, WIDTH, True)
            else:
                _store_rows(e, xs, ds, square, k, active, numel, HEIGHT, WIDTH, False)
        if PASS == WHOLE:
            # Whether a step that may be none is one, and prepare has left it: all write the same.
            if (step == 0) & (lr == 0):
                if tl.max(active.to(tl.int32)) != 0:
                    _count_step(addresses, layout, row, n, units, i, ADAMW)


@triton.jit(**ANY_LIST)
def am_begin(
    addresses, layout, chunk_units, arrived, partials, coefficients, found_inf, n, units, chunks,
    first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    T: tl.constexpr, ADAMW: tl.constexpr, LOW: tl.constexpr, STRETCHED: tl.constexpr,
    DECAY: tl.constexpr, SEAM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """The sums of every chunk from first_chunk on, and the guess. One program a chunk."""
    if is_skipped(found_inf):
        return
    at = first_chunk + tl.program_id(0).to(tl.int64)
    i, chunk = place(layout, chunk_units, at, units)
    row = coefficients + COEFFICIENTS * i
    c = _load_coefficients(row, T, ADAMW)
    e, middle, end = _open_chunk(
        addresses, layout, n, units, i, chunk, tl.load(row + STEP), PARAM, GRAD, MEMORY, SQUARE,
        ADAMW, LOW, STRETCHED, CHUNK, BLOCK,
    )  # fmt: skip
    if ADAMW:
        if tl.load(row + GUESSES) != 0:
            num, den = _begin_chunk(e, middle, end, c, True, DECAY, ADAMW, T, BLOCK)
        else:
            num, den = _begin_chunk(e, middle, end, c, False, DECAY, ADAMW, T, BLOCK)
    else:
        num, den = _begin_chunk(e, middle, end, c, False, DECAY, ADAMW, T, BLOCK)
    if not ADAMW:
        # A first step has no memory: d = g, and both sums are 0, or next to it.
        first = tl.load(row + STEP) == 0
        num = tl.where(first, 0.0, num)
        den = tl.where(first, sgd_first_den(tl.load(row + LR), den), den)
    if SEAM:
        store_partials(partials, chunks, at, num, den)
    else:
        count = chunks_of(layout, units, i, CHUNK)
        is_last, num, den = complete(
            layout, arrived, partials, units, chunks, i, at, count, num, den, CHUNK, PARTIALS
        )  # fmt: skip
        if is_last:
            rest, keep, take = _set_beta(addresses, layout, row, n, units, i, num, den, ADAMW)
            if count > 1:
                _store_rest(row, rest, keep, take)
            else:
                # After what other threads have written.
                tl.debug_barrier()
                _finish_chunk(e, middle, end, rest, keep, take, c, ADAMW, T, BLOCK)
                tl.store(row + REST, 0.0)


@triton.jit(**ANY_LIST)
def sum_rows(
    layout, partials, rows, found_inf, units, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """Every ordinary unit's num and den in rows [segments, 2]; zeros for a step that is skipped.

    One program a unit.
    """
    i = tl.program_id(0).to(tl.int64)
    if column(layout, ROWS, units, i) != NO_ROWS:
        return
    num = tl.zeros((), tl.float64)
    den = tl.zeros((), tl.float64)
    if not is_skipped(found_inf):
        num, den = sum_partials(partials, layout, chunks, units, i, CHUNK, PARTIALS)
    segment = column(layout, FIRST_SEGMENT, units, i)
    tl.store(rows + 2 * segment, num)
    tl.store(rows + 2 * segment + 1, den)


@triton.jit(**ANY_LIST)
def sum_shared(
    layout, hypers, chunk_units, partials, totals, units, chunks, ADAMW: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """totals [2]: num and den over all tensors that share one beta. One program."""
    num = tl.zeros([PARTIALS], tl.float64)
    den = tl.zeros([PARTIALS], tl.float64)
    for k in range(0, chunks, PARTIALS):
        chunk = k + tl.arange(0, PARTIALS)
        mask = chunk < chunks
        i = tl.load(chunk_units + chunk, mask=mask, other=0)
        group = tl.load(layout + GROUP * units + i, mask=mask, other=0)
        shared = tl.load(shared_of(hypers, group, ADAMW), mask=mask, other=0.0) != 0
        # Not masked by what is shared: that is known three loads later.
        num += tl.where(shared, tl.load(partials + chunk, mask=mask, other=0.0), 0.0)
        den += tl.where(shared, tl.load(partials + chunks + chunk, mask=mask, other=0.0), 0.0)
    tl.store(totals, tl.sum(num))
    tl.store(totals + 1, tl.sum(den))


@triton.jit(**ANY_LIST)
def am_beta(
    addresses, layout, hypers, partials, totals, rows, coefficients, found_inf, n, units, chunks,
    ADAMW: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Every ordinary unit's beta and scalars, where they wait for the sums of others; of a unit of
    rows, whose rows kernel waits for them as well, the step. One program a unit."""
    if is_skipped(found_inf):
        return
    i = tl.program_id(0).to(tl.int64)
    row = coefficients + COEFFICIENTS * i
    if column(layout, ROWS, units, i) == NO_ROWS:
        num, den = num_den(
            rows, totals, hypers, partials, layout, chunks, units, i, tl.load(row + STEP), ADAMW,
            CHUNK, PARTIALS,
        )  # fmt: skip
        rest, keep, take = _set_beta(addresses, layout, row, n, units, i, num, den, ADAMW)
        _store_rest(row, rest, keep, take)
    elif rows is not None:
        idle = (tl.load(row + STEP) == 0) & (tl.load(row + LR) == 0)
        if idle:
            idle = _are_zero(rows, layout, units, i, PARTIALS)
        if not idle:
            _count_step(addresses, layout, row, n, units, i, ADAMW)


@triton.jit(**ANY_LIST)
def am_finish(
    addresses, layout, chunk_units, coefficients, found_inf, n, units, first_chunk, last_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    T: tl.constexpr, ADAMW: tl.constexpr, LOW: tl.constexpr, STRETCHED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left, from last_chunk backwards to first_chunk. Any number of programs."""
    if is_skipped(found_inf):
        return
    stride = tl.num_programs(0)
    at = last_chunk - tl.program_id(0)
    while at >= first_chunk:
        # A look at many chunks takes no longer than at one.
        chunks = at - stride * tl.arange(0, LOOK)
        mask = chunks >= first_chunk
        own = tl.load(chunk_units + chunks, mask=mask, other=0).to(tl.int64)
        rests = tl.load(coefficients + COEFFICIENTS * own + REST, mask=mask, other=0.0)
        end = at - stride * LOOK
        if tl.max(rests) != DONE:
            while at > tl.maximum(end, first_chunk - 1):
                i, chunk = place(layout, chunk_units, at, units)
                row = coefficients + COEFFICIENTS * i
                rest, keep, take = tl.load(row + REST), tl.load(row + KEEP), tl.load(row + TAKE)
                if rest != DONE:
                    c = _load_coefficients(row, T, ADAMW)
                    e, middle, length = _open_chunk(
                        addresses, layout, n, units, i, chunk, tl.load(row + STEP), PARAM, GRAD,
                        MEMORY, SQUARE, ADAMW, LOW, STRETCHED, CHUNK, BLOCK,
                    )  # fmt: skip
                    _finish_chunk(e, middle, length, rest, keep, take, c, ADAMW, T, BLOCK)
                at -= stride
        at = end


# ---- squared norms --------------------------------------------------------------------


@triton.jit
def _square_blocks(
    g, sums, largest, factor, begin, end, numel, T: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    for k in range(begin, end, BLOCK):
        gs = load_elements(g, block_at(k, numel, BLOCK, VECTOR), VECTOR, T) * factor
        sums = tl.fma(gs, gs, sums)
        largest = tl.maximum(largest, tl.abs(gs))
    return sums, largest


@triton.jit
def _square_chunk(g, middle, end, factor, T: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of a chunk's gradients times the factor, and the largest of these."""
    sums = tl.zeros([BLOCK], T)
    largest = tl.zeros([BLOCK], T)
    sums, largest = _square_blocks(g, sums, largest, factor, 0, middle, end, T, BLOCK, True)
    sums, largest = _square_blocks(g, sums, largest, factor, middle, end, end, T, BLOCK, False)
    return tl.sum(sums).to(tl.float64), tl.max(largest)


@triton.jit(**ANY_LIST)
def am_squares(
    addresses, layout, chunk_units, partials, n, units, first_chunk, GRAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every chunk's sum of squared gradients, from first_chunk on. One program a chunk.

    Backwards: the step begins with the first chunks, which are those that L2 then still holds.
    """
    at = first_chunk + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i, chunk = place(layout, chunk_units, at, units)
    begin, length = elements_of(layout, units, i, chunk, CHUNK)
    g = data_pointer(addresses, 1, n, column(layout, TENSOR, units, i), GRAD) + begin
    middle = tl.where((g.to(tl.int64) & 15) == 0, length // BLOCK * BLOCK, 0)
    if tl.float64 == GRAD:
        squares, _ = _square_chunk(g, middle, length, 1.0, tl.float64, BLOCK)
    else:
        squares, largest = _square_chunk(g, middle, length, 1.0, tl.float32, BLOCK)
        is_small = (largest < LEAST) & (largest > 0.0)
        if is_small | (largest > MOST):
            # Once more, by a power of 2 that takes all that count into the middle of the range.
            factor = tl.where(is_small, 2.0**100, 2.0**-100).to(tl.float32)
            squares, _ = _square_chunk(g, middle, length, factor, tl.float32, BLOCK)
            squares *= tl.where(is_small, 2.0**-200, 2.0**200).to(tl.float64)
    tl.store(partials + at, squares)


@triton.jit(**ANY_LIST)
def sum_squares(tensor_chunks, partials, norms, n, PARTIALS: tl.constexpr):
    """norms [n]: the sum over each tensor's chunks, in a fixed order. One program a tensor."""
    i = tl.program_id(0).to(tl.int64)
    first, count = tl.load(tensor_chunks + i), tl.load(tensor_chunks + n + i)
    sums = tl.zeros([PARTIALS], tl.float64)
    for k in range(0, count, PARTIALS):
        offsets = k + tl.arange(0, PARTIALS)
        sums += tl.load(partials + first + offsets, mask=offsets < count, other=0.0)
    tl.store(norms + i, tl.sum(sums))

"""The kernels of a step: prepare, begin, beta where tensors wait for one another's, and finish.

Rows of addresses: param, grad, the memories (exp_avg and exp_avg_sq where ADAMW, momentum_buffer
elsewhere), step, beta_prod where ADAMW, prev_lr, beta.

prepare works out a tensor's coefficients. begin takes a chunk's num and den, and, where the tensor
guesses, updates the chunk with the cap for beta while it does so. The last program of a tensor to
arrive adds its partial sums in a fixed order, so that two runs give the same bits, writes the
tensor's scalars, and leaves in coefficients what finish is to do: nothing, a repair, or the update.
A tensor of one chunk is finished by its program at once. With the SEAM begin leaves the partial
sums alone, and the beta kernel does the rest. No program waits for another. With found_inf not 0
nothing is written but scratch, and rows of zeros.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.elements import (
    AdamWCoefficients,
    SGDCoefficients,
    adamw_coefficients,
    adamw_guesses,
    adamw_repair,
    adamw_root,
    adamw_sums,
    adamw_update,
    clipped_beta,
    is_idle,
    sgd_coefficients,
    sgd_first_den,
    sgd_sums,
    sgd_update,
)
from adamem_fused.triton_kernels.sums import complete, num_den, store_partials, sum_partials
from adamem_fused.triton_kernels.tables import (
    ANY_LIST,
    EXACT,
    GROUP,
    NUMEL,
    adamw_hyper,
    chunks_of,
    data_pointer,
    ends,
    is_aligned,
    is_skipped,
    load_elements,
    masked,
    place,
    read_scalar,
    sgd_hyper,
    shared_of,
    store_elements,
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

# How many chunks a program of finish looks at together.
LOOK = tl.constexpr(32)


@triton.jit
def _load_coefficients(row, T: tl.constexpr, ADAMW: tl.constexpr):
    row += READ
    if ADAMW:
        columns = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
        return AdamWCoefficients(*[tl.load(row + k).to(T) for k in columns])
    else:
        return SGDCoefficients(*[tl.load(row + k).to(T) for k in (0, 1, 2, 3, 4, 5, 6)])


@triton.jit
def _set_beta(addresses, layout, row, n, i, num, den, ADAMW: tl.constexpr):
    """Writes tensor i's beta and scalars; returns what is left to do for it: rest, keep, take."""
    step, lr, beta_max = tl.load(row + STEP), tl.load(row + LR), tl.load(row + BETA_MAX)
    idle = is_idle(step, lr, den)
    beta = clipped_beta(num, den, beta_max)
    if ADAMW:
        # There is no earlier iterate at the first step.
        beta = tl.where(step == 0, beta_max, beta)
        guesses = tl.load(row + GUESSES) != 0
        # Where den = 0, d equals g, and any beta gives the same.
        done = idle | (guesses & ((beta == beta_max) | (den == 0)))
        rest = tl.where(done, DONE, tl.where(guesses, REPAIR, UPDATE))
        keep = beta
        take = tl.where(guesses, (beta_max - beta) / tl.where(guesses, beta_max, 1.0), 1.0 - beta)
        if not idle:
            write_scalar(addresses, layout, 4, 0, n, i, step + 1.0)
            write_scalar(addresses, layout, 4, 1, n, i, tl.load(row + BETA_PROD) * beta)
            write_scalar(addresses, layout, 4, 2, n, i, lr)
            write_scalar(addresses, layout, 4, 3, n, i, beta)
    else:
        beta = tl.where(step == 0, 0.0, beta)
        memory_lambda = tl.load(row + MEMORY_LAMBDA)
        rest = tl.where(idle, DONE, UPDATE)
        keep = tl.where(step == 0, 0.0, (beta + memory_lambda) / (1.0 + memory_lambda))
        take = tl.where(step == 0, 1.0, (1.0 - beta) / (1.0 + memory_lambda))
        if not idle:
            write_scalar(addresses, layout, 3, 0, n, i, step + 1.0)
            write_scalar(addresses, layout, 3, 1, n, i, lr)
            write_scalar(addresses, layout, 3, 2, n, i, beta)
    return rest, keep, take


@triton.jit
def _store_rest(row, rest, keep, take):
    tl.store(row + REST, rest.to(tl.float64))
    tl.store(row + KEEP, keep)
    tl.store(row + TAKE, take)


@triton.jit
def _open_chunk(
    addresses, layout, n, i, chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    ADAMW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's x, g, d and v, where its 16-byte accesses end, and its length."""
    start = chunk * CHUNK
    x = data_pointer(addresses, 0, n, i, PARAM) + start
    g = data_pointer(addresses, 1, n, i, GRAD) + start
    d = data_pointer(addresses, 2, n, i, MEMORY) + start
    v = d
    if ADAMW:
        v = data_pointer(addresses, 3, n, i, SQUARE) + start
    numel = tl.load(layout + NUMEL * n + i)
    middle, end = ends(is_aligned(x, g, d, v), start, numel, BLOCK, CHUNK)
    return x, g, d, v, middle, end


@triton.jit
def _begin_blocks(
    x, g, d, v, num, den, begin, end, numel, c,
    GUESS: tl.constexpr, DECAY: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    for k in range(begin, end, BLOCK):
        at = k + tl.arange(0, BLOCK)
        gs = load_elements(g, at, numel, VECTOR, T)
        ds = load_elements(d, at, numel, VECTOR, T)
        xs = gs
        if GUESS or DECAY:
            xs = load_elements(x, at, numel, VECTOR, T)
        if ADAMW:
            vs, root = adamw_root(gs, load_elements(v, at, numel, VECTOR, T), c)
            new_num, new_den = adamw_sums(xs, gs, ds, root, num, den, c, DECAY)
        else:
            new_num, new_den = sgd_sums(xs, gs, ds, num, den, c, DECAY)
        num = masked(new_num, num, at, numel, VECTOR)
        den = masked(new_den, den, at, numel, VECTOR)
        if GUESS:
            xs, ds = adamw_update(xs, gs, ds, root, c.cap_take, c)
            store_elements(x, at, xs, numel, VECTOR)
            store_elements(d, at, ds, numel, VECTOR)
            store_elements(v, at, vs, numel, VECTOR)
    return num, den


@triton.jit
def _begin_chunk(
    x, g, d, v, middle, end, c,
    GUESS: tl.constexpr, DECAY: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's num and den. Where GUESS, it is updated with the cap."""
    num = tl.zeros([BLOCK], T)
    den = tl.zeros([BLOCK], T)
    num, den = _begin_blocks(
        x, g, d, v, num, den, 0, middle, end, c, GUESS, DECAY, ADAMW, T, BLOCK, True
    )  # fmt: skip
    num, den = _begin_blocks(
        x, g, d, v, num, den, middle, end, end, c, GUESS, DECAY, ADAMW, T, BLOCK, False
    )  # fmt: skip
    return tl.sum(num).to(tl.float64), tl.sum(den).to(tl.float64)


@triton.jit
def _finish_blocks(
    x, g, d, v, begin, end, numel, keep, take, c,
    MISSED: tl.constexpr, ADAMW: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    for k in range(begin, end, BLOCK):
        at = k + tl.arange(0, BLOCK)
        xs = load_elements(x, at, numel, VECTOR, T)
        gs = load_elements(g, at, numel, VECTOR, T)
        ds = load_elements(d, at, numel, VECTOR, T)
        if ADAMW:
            vs = load_elements(v, at, numel, VECTOR, T)
            if MISSED:
                xs, ds = adamw_repair(xs, gs, ds, tl.sqrt(vs), take, c)
            else:
                vs, root = adamw_root(gs, vs, c)
                xs, ds = adamw_update(xs, gs, ds, root, take, c)
                store_elements(v, at, vs, numel, VECTOR)
        else:
            xs, ds = sgd_update(xs, gs, ds, keep, take, c)
        store_elements(x, at, xs, numel, VECTOR)
        store_elements(d, at, ds, numel, VECTOR)


@triton.jit
def _finish_chunk(
    x, g, d, v, middle, end, rest, keep, take, c,
    ADAMW: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Repairs or updates a chunk."""
    keep, take = keep.to(T), take.to(T)
    if rest == UPDATE:
        _finish_blocks(x, g, d, v, 0, middle, end, keep, take, c, False, ADAMW, T, BLOCK, True)
        _finish_blocks(x, g, d, v, middle, end, end, keep, take, c, False, ADAMW, T, BLOCK, False)
    if ADAMW:
        if rest == REPAIR:
            _finish_blocks(x, g, d, v, 0, middle, end, keep, take, c, True, ADAMW, T, BLOCK, True)
            _finish_blocks(
                x, g, d, v, middle, end, end, keep, take, c, True, ADAMW, T, BLOCK, False
            )  # fmt: skip


# ---- kernels --------------------------------------------------------------------------


@triton.jit(**ANY_LIST)
def am_prepare(
    addresses, layout, hypers, lrs, coefficients, grad_scale, found_inf, n,
    ADAMW: tl.constexpr, SEAM: tl.constexpr,
):  # fmt: skip
    """Every tensor's coefficients. One program a tensor."""
    if is_skipped(found_inf):
        return
    i = tl.program_id(0).to(tl.int64)
    group = tl.load(layout + GROUP * n + i)
    row = coefficients + COEFFICIENTS * i
    if ADAMW:
        h = adamw_hyper(hypers, lrs, group)
        step = read_scalar(addresses, layout, 4, 0, n, i)
        beta_prod = read_scalar(addresses, layout, 4, 1, n, i)
        prev_lr = read_scalar(addresses, layout, 4, 2, n, i)
        c = adamw_coefficients(h, step, beta_prod, prev_lr, grad_scale)
        # A repair reads the gradient once more: it may not be what was written.
        is_own = tl.load(addresses + i) != tl.load(addresses + n + i)
        guesses = adamw_guesses(h, step, is_own & (tl.load(layout + EXACT * n + i) != 0))
        tl.store(row + BETA_PROD, beta_prod)
        tl.store(row + GUESSES, guesses.to(tl.float64))
    else:
        h = sgd_hyper(hypers, lrs, group)
        step = read_scalar(addresses, layout, 3, 0, n, i)
        prev_lr = read_scalar(addresses, layout, 3, 1, n, i)
        c = sgd_coefficients(h, step, prev_lr, grad_scale)
    tl.store(row + STEP, step)
    tl.store(row + BETA_MAX, h.beta_max)
    tl.store(row + MEMORY_LAMBDA, h.memory_lambda)
    tl.store(row + LR, h.lr)
    for k in tl.static_range(len(c)):
        tl.store(row + READ + k, c[k])
    if not SEAM:
        # A tensor without elements has no chunk whose program would do this.
        if tl.load(layout + NUMEL * n + i) == 0:
            tl.debug_barrier()
            zero = tl.zeros((), tl.float64)
            _set_beta(addresses, layout, row, n, i, zero, zero, ADAMW)


@triton.jit(**ANY_LIST)
def am_begin(
    addresses, layout, chunk_tensors, arrived, partials, coefficients, found_inf, n, chunks,
    first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    T: tl.constexpr, ADAMW: tl.constexpr, DECAY: tl.constexpr, SEAM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The sums of every chunk from first_chunk on, and the guess. One program a chunk."""
    if is_skipped(found_inf):
        return
    at = first_chunk + tl.program_id(0).to(tl.int64)
    i, chunk = place(layout, chunk_tensors, at, n)
    row = coefficients + COEFFICIENTS * i
    c = _load_coefficients(row, T, ADAMW)
    x, g, d, v, middle, end = _open_chunk(
        addresses, layout, n, i, chunk, PARAM, GRAD, MEMORY, SQUARE, ADAMW, CHUNK, BLOCK
    )  # fmt: skip
    if ADAMW:
        if tl.load(row + GUESSES) != 0:
            num, den = _begin_chunk(x, g, d, v, middle, end, c, True, DECAY, ADAMW, T, BLOCK)
        else:
            num, den = _begin_chunk(x, g, d, v, middle, end, c, False, DECAY, ADAMW, T, BLOCK)
    else:
        num, den = _begin_chunk(x, g, d, v, middle, end, c, False, DECAY, ADAMW, T, BLOCK)
        # A first step has no memory: d = g, and both sums are 0, or next to it.
        first = tl.load(row + STEP) == 0
        num = tl.where(first, 0.0, num)
        den = tl.where(first, sgd_first_den(tl.load(row + LR), den), den)
    if SEAM:
        store_partials(partials, chunks, at, num, den)
    else:
        count = chunks_of(layout, n, i, CHUNK)
        is_last, num, den = complete(
            layout, arrived, partials, n, chunks, i, at, count, num, den, CHUNK, PARTIALS
        )  # fmt: skip
        if is_last:
            rest, keep, take = _set_beta(addresses, layout, row, n, i, num, den, ADAMW)
            if count > 1:
                _store_rest(row, rest, keep, take)
            else:
                # After what other threads have written.
                tl.debug_barrier()
                _finish_chunk(x, g, d, v, middle, end, rest, keep, take, c, ADAMW, T, BLOCK)
                tl.store(row + REST, 0.0)


@triton.jit(**ANY_LIST)
def sum_rows(
    layout, partials, rows, found_inf, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """rows [n, 2]: every tensor's num and den; zeros for a step that is skipped.

    One program a tensor.
    """
    i = tl.program_id(0).to(tl.int64)
    num = tl.zeros((), tl.float64)
    den = tl.zeros((), tl.float64)
    if not is_skipped(found_inf):
        num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    tl.store(rows + 2 * i, num)
    tl.store(rows + 2 * i + 1, den)


@triton.jit(**ANY_LIST)
def sum_shared(
    layout, hypers, chunk_tensors, partials, totals, n, chunks, ADAMW: tl.constexpr,
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
        shared = tl.load(shared_of(hypers, group, ADAMW), mask=mask, other=0.0) != 0
        # Not masked by what is shared: that is known three loads later.
        num += tl.where(shared, tl.load(partials + chunk, mask=mask, other=0.0), 0.0)
        den += tl.where(shared, tl.load(partials + chunks + chunk, mask=mask, other=0.0), 0.0)
    tl.store(totals, tl.sum(num))
    tl.store(totals + 1, tl.sum(den))


@triton.jit(**ANY_LIST)
def am_beta(
    addresses, layout, hypers, partials, totals, rows, coefficients, found_inf, n, chunks,
    ADAMW: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Every tensor's beta and scalars, where they wait for the sums of others. One program each."""
    if is_skipped(found_inf):
        return
    i = tl.program_id(0).to(tl.int64)
    row = coefficients + COEFFICIENTS * i
    num, den = num_den(
        rows, totals, hypers, partials, layout, chunks, n, i, tl.load(row + STEP), ADAMW, CHUNK,
        PARTIALS,
    )  # fmt: skip
    rest, keep, take = _set_beta(addresses, layout, row, n, i, num, den, ADAMW)
    _store_rest(row, rest, keep, take)


@triton.jit(**ANY_LIST)
def am_finish(
    addresses, layout, chunk_tensors, coefficients, found_inf, n, first_chunk, last_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    T: tl.constexpr, ADAMW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
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
        tensors = tl.load(chunk_tensors + chunks, mask=mask, other=0).to(tl.int64)
        rests = tl.load(coefficients + COEFFICIENTS * tensors + REST, mask=mask, other=0.0)
        end = at - stride * LOOK
        if tl.max(rests) != DONE:
            while at > tl.maximum(end, first_chunk - 1):
                i, chunk = place(layout, chunk_tensors, at, n)
                row = coefficients + COEFFICIENTS * i
                rest, keep, take = tl.load(row + REST), tl.load(row + KEEP), tl.load(row + TAKE)
                if rest != DONE:
                    c = _load_coefficients(row, T, ADAMW)
                    x, g, d, v, middle, length = _open_chunk(
                        addresses, layout, n, i, chunk, PARAM, GRAD, MEMORY, SQUARE, ADAMW, CHUNK,
                        BLOCK,
                    )  # fmt: skip
                    _finish_chunk(x, g, d, v, middle, length, rest, keep, take, c, ADAMW, T, BLOCK)
                at -= stride
        at = end

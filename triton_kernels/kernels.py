"""The walk over memory: stats, beta and apply kernels over tables of all tensors.

Every kernel finds its tensors through three tables in device memory, laid out by
adamem_fused/tables.py, with one column a tensor (n of them):

    addresses  [rows, n] int64   data pointers: param, grad, the memories, the scalars
    layout     [4, n]    int64   number of elements, group, first chunk, which scalars are
                                 float64 (a bit each)
    hypers     [groups, columns] float64, in the order of elements.AdamWHyper, SGDHyper;
                                 lrs [groups] int64: the address of a group's lr on the
                                 device, times 2, plus 1 for float64; 0: it is in hypers

A chunk is CHUNK elements of one tensor, or what is left of it: chunk_tensors [chunks] int32
names its tensor. The stats kernel writes each chunk's num and den to partials
[2, chunks] float64; the beta kernel adds a tensor's partials in a fixed order, so that two
runs give the same bits, writes the tensor's scalars, and leaves in coefficients
[n, columns] float64 what the apply kernel needs. Offsets are 64 bits wide throughout.

With found_inf not 0 nothing is written but partials and rows.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.elements import (
    AdamWHyper,
    AdamWModel,
    SGDHyper,
    adamw_model,
    adamw_sums,
    adamw_update,
    clipped_beta,
    gap_factors,
    grad_factor,
    sgd_sums,
    sgd_update,
)

# Rows of `layout`.
NUMEL = tl.constexpr(0)
GROUP = tl.constexpr(1)
FIRST_CHUNK = tl.constexpr(2)
DOUBLES = tl.constexpr(3)
LAYOUT_ROWS = 4

# Columns of `hypers` and `coefficients`.
ADAMW_HYPERS = tl.constexpr(len(AdamWHyper._fields))
SGD_HYPERS = tl.constexpr(len(SGDHyper._fields))
ADAMW_COEFFICIENTS = tl.constexpr(9)
SGD_COEFFICIENTS = tl.constexpr(5)


# Arguments that change with the list of tensors: one compiled kernel for all their values.
COUNTS = ["n", "chunks", "first_chunk", "last_chunk"]


# ---- memory ---------------------------------------------------------------------------


@triton.jit
def _pointer(addresses, row: tl.constexpr, n, i, DTYPE: tl.constexpr):
    return tl.load(addresses + row * n + i).to(tl.pointer_type(DTYPE))


@triton.jit
def _load(pointer, offsets, numel, VECTOR: tl.constexpr, T: tl.constexpr):
    # 16-byte accesses need both: the hint, on the pointers that are loaded from, and no mask.
    if VECTOR:
        value = tl.load(tl.multiple_of(pointer + offsets, 16))
    else:
        value = tl.load(pointer + offsets, mask=offsets < numel, other=0.0)
    return value.to(T)


@triton.jit
def _store(pointer, offsets, value, numel, VECTOR: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if VECTOR:
        tl.store(tl.multiple_of(pointer + offsets, 16), value)
    else:
        tl.store(pointer + offsets, value, mask=offsets < numel)


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
def _read_scalar(addresses, layout, first: tl.constexpr, k: tl.constexpr, n, i):
    """Scalar k of tensor i; the scalars' rows of `addresses` start at `first`."""
    address = tl.load(addresses + (first + k) * n + i)
    return _load_scalar(address, (tl.load(layout + DOUBLES * n + i) >> k) & 1)


@triton.jit
def _write_scalar(addresses, layout, first: tl.constexpr, k: tl.constexpr, n, i, value):
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
def _adamw_hyper(hypers, lrs, group):
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
def _sgd_hyper(hypers, lrs, group):
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


# ---- the walk -------------------------------------------------------------------------


@triton.jit
def _place(layout, chunk_tensors, chunk, n, CHUNK: tl.constexpr):
    """A chunk's tensor, where the chunk starts in it, and the tensor's number of elements."""
    i = tl.load(chunk_tensors + chunk).to(tl.int64)
    start = (chunk - tl.load(layout + FIRST_CHUNK * n + i)) * CHUNK
    return i, start, tl.load(layout + NUMEL * n + i)


@triton.jit
def _ends(aligned, start, numel, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How far into a chunk whole blocks of 16-byte accesses go, and the chunk's length."""
    length = tl.minimum(numel - start, CHUNK)
    length = length.to(tl.int32)
    return tl.where(aligned, length // BLOCK * BLOCK, 0), length


@triton.jit
def _is_aligned(a, b, c, d):
    low_bits = a.to(tl.int64) | b.to(tl.int64) | c.to(tl.int64) | d.to(tl.int64)
    return (low_bits & 15) == 0


@triton.jit
def _masked(value, offsets, numel, VECTOR: tl.constexpr):
    """The value, and 0 beyond the end, where the formulas may have divided by 0."""
    if not VECTOR:
        value = tl.where(offsets < numel, value, 0.0)
    return value


@triton.jit
def _sum_partials(partials, layout, chunks, n, i, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """num and den of tensor i, in float64 and in a fixed order."""
    first = tl.load(layout + FIRST_CHUNK * n + i)
    count = tl.cdiv(tl.load(layout + NUMEL * n + i), CHUNK)
    num = tl.zeros([PARTIALS], tl.float64)
    den = tl.zeros([PARTIALS], tl.float64)
    for k in range(0, count, PARTIALS):
        offsets = k + tl.arange(0, PARTIALS)
        mask = offsets < count
        num += tl.load(partials + first + offsets, mask=mask, other=0.0)
        den += tl.load(partials + chunks + first + offsets, mask=mask, other=0.0)
    return tl.sum(num), tl.sum(den)


@triton.jit(do_not_specialize=COUNTS)
def sum_rows(layout, partials, rows, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """rows [n, 2]: every tensor's num and den. One program a tensor."""
    i = tl.program_id(0).to(tl.int64)
    num, den = _sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    tl.store(rows + 2 * i, num)
    tl.store(rows + 2 * i + 1, den)


@triton.jit(do_not_specialize=COUNTS)
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
def _num_den(
    rows, totals, shared, partials, layout, chunks, n, i, CHUNK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """From the rows where there are any, which is after something was done to them."""
    if rows is not None:
        num = tl.load(rows + 2 * i)
        den = tl.load(rows + 2 * i + 1)
    elif shared != 0:
        num = tl.load(totals)
        den = tl.load(totals + 1)
    else:
        num, den = _sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
    return num, den


# ---- AM-AdamW -------------------------------------------------------------------------
# Rows of addresses: param, grad, exp_avg, exp_avg_sq, step, beta_prod, prev_lr, beta.


@triton.jit
def _adamw_chunk_sums(
    x, g, d, v, num, den, begin, end, numel, model, gap, weight_decay,
    BLOCK: tl.constexpr, T: tl.constexpr, DECAY: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        gs = _load(g, at, numel, VECTOR, T)
        ds = _load(d, at, numel, VECTOR, T)
        vs = _load(v, at, numel, VECTOR, T)
        xs = gs
        if DECAY:
            xs = _load(x, at, numel, VECTOR, T)
        part_num, part_den = adamw_sums(xs, gs, ds, vs, model, gap, weight_decay)
        num += _masked(part_num, at, numel, VECTOR)
        den += _masked(part_den, at, numel, VECTOR)
    return num, den


@triton.jit(do_not_specialize=COUNTS)
def adamw_stats(
    addresses, layout, hypers, lrs, chunk_tensors, partials, grad_scale, n, chunks, first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial num and den of every chunk from first_chunk on. One program a chunk."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    i, start, numel = _place(layout, chunk_tensors, chunk, n, CHUNK)
    h = _adamw_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = _read_scalar(addresses, layout, 4, 0, n, i)
    beta_prod = _read_scalar(addresses, layout, 4, 1, n, i)
    prev_lr = _read_scalar(addresses, layout, 4, 2, n, i)
    model = adamw_model(h, step, beta_prod, grad_scale, T)
    scale = 1.0 + h.weight_decay * h.lr
    gap = gap_factors(prev_lr, h.lr, scale, h.anchored, h.loss_gap, T)
    weight_decay = h.weight_decay.to(T)

    x = _pointer(addresses, 0, n, i, PARAM) + start
    g = _pointer(addresses, 1, n, i, GRAD) + start
    d = _pointer(addresses, 2, n, i, EXP_AVG) + start
    v = _pointer(addresses, 3, n, i, EXP_AVG_SQ) + start
    num = tl.zeros([BLOCK], T)
    den = tl.zeros([BLOCK], T)
    middle, end = _ends(_is_aligned(x, g, d, v), start, numel, BLOCK, CHUNK)
    num, den = _adamw_chunk_sums(
        x, g, d, v, num, den, 0, middle, end, model, gap, weight_decay,
        BLOCK, T, DECAY, True, STAGES,
    )  # fmt: skip
    num, den = _adamw_chunk_sums(
        x, g, d, v, num, den, middle, end, end, model, gap, weight_decay,
        BLOCK, T, DECAY, False, STAGES,
    )  # fmt: skip
    tl.store(partials + chunk, tl.sum(num).to(tl.float64))
    tl.store(partials + chunks + chunk, tl.sum(den).to(tl.float64))


@triton.jit(do_not_specialize=COUNTS)
def adamw_beta(
    addresses, layout, hypers, lrs, partials, totals, rows, coefficients, grad_scale,
    found_inf, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """A tensor's beta, its scalars' next values, and its coefficients. One program a tensor."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    h = _adamw_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = _read_scalar(addresses, layout, 4, 0, n, i)
    beta_prod = _read_scalar(addresses, layout, 4, 1, n, i)
    num, den = _num_den(rows, totals, h.shared, partials, layout, chunks, n, i, CHUNK, PARTIALS)
    # There is no earlier iterate at the first step.
    beta = tl.where(step == 0, h.beta_max, clipped_beta(num, den, h.beta_max))
    _write_scalar(addresses, layout, 4, 0, n, i, step + 1.0)
    _write_scalar(addresses, layout, 4, 1, n, i, beta_prod * beta)
    _write_scalar(addresses, layout, 4, 2, n, i, h.lr)
    _write_scalar(addresses, layout, 4, 3, n, i, beta)

    c = coefficients + ADAMW_COEFFICIENTS * i
    model = adamw_model(h, step, beta_prod, grad_scale, tl.float64)
    tl.store(c, model.grad_factor)
    tl.store(c + 1, model.beta2)
    tl.store(c + 2, model.one_minus_beta2)
    tl.store(c + 3, model.v_scale)
    tl.store(c + 4, model.eps)
    tl.store(c + 5, model.memory_lambda)
    tl.store(c + 6, beta)
    tl.store(c + 7, h.lr)
    tl.store(c + 8, 1.0 - h.lr * h.weight_decay)


@triton.jit
def _adamw_chunk_update(
    x, g, d, v, begin, end, numel, model, beta, lr, decay,
    BLOCK: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        new_x, new_d, new_v = adamw_update(
            _load(x, at, numel, VECTOR, T),
            _load(g, at, numel, VECTOR, T),
            _load(d, at, numel, VECTOR, T),
            _load(v, at, numel, VECTOR, T),
            model,
            beta,
            lr,
            decay,
        )
        _store(x, at, new_x, numel, VECTOR)
        _store(d, at, new_d, numel, VECTOR)
        _store(v, at, new_v, numel, VECTOR)


@triton.jit(do_not_specialize=COUNTS)
def adamw_apply(
    addresses, layout, chunk_tensors, coefficients, found_inf, n, last_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Updates param, exp_avg and exp_avg_sq. One program a chunk, from last_chunk backwards."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = last_chunk - tl.program_id(0).to(tl.int64)
    i, start, numel = _place(layout, chunk_tensors, chunk, n, CHUNK)
    c = coefficients + ADAMW_COEFFICIENTS * i
    model = AdamWModel(
        grad_factor=tl.load(c).to(T),
        beta2=tl.load(c + 1).to(T),
        one_minus_beta2=tl.load(c + 2).to(T),
        v_scale=tl.load(c + 3).to(T),
        eps=tl.load(c + 4).to(T),
        memory_lambda=tl.load(c + 5).to(T),
    )
    beta = tl.load(c + 6).to(T)
    lr = tl.load(c + 7).to(T)
    decay = tl.load(c + 8).to(T)

    x = _pointer(addresses, 0, n, i, PARAM) + start
    g = _pointer(addresses, 1, n, i, GRAD) + start
    d = _pointer(addresses, 2, n, i, EXP_AVG) + start
    v = _pointer(addresses, 3, n, i, EXP_AVG_SQ) + start
    middle, end = _ends(_is_aligned(x, g, d, v), start, numel, BLOCK, CHUNK)
    _adamw_chunk_update(
        x, g, d, v, 0, middle, end, model, beta, lr, decay, BLOCK, T, True, STAGES
    )  # fmt: skip
    _adamw_chunk_update(
        x, g, d, v, middle, end, end, model, beta, lr, decay, BLOCK, T, False, STAGES
    )  # fmt: skip


# ---- AM-SGD ---------------------------------------------------------------------------
# Rows of addresses: param, grad, momentum_buffer, step, prev_lr, beta.


@triton.jit
def _sgd_chunk_sums(
    x, g, d, num, den, begin, end, numel, factor, gap, weight_decay, memory_lambda,
    BLOCK: tl.constexpr, T: tl.constexpr, DECAY: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        gs = _load(g, at, numel, VECTOR, T)
        ds = _load(d, at, numel, VECTOR, T)
        xs = gs
        if DECAY:
            xs = _load(x, at, numel, VECTOR, T)
        part_num, part_den = sgd_sums(xs, gs, ds, factor, gap, weight_decay, memory_lambda)
        num += _masked(part_num, at, numel, VECTOR)
        den += _masked(part_den, at, numel, VECTOR)
    return num, den


@triton.jit(do_not_specialize=COUNTS)
def sgd_stats(
    addresses, layout, hypers, lrs, chunk_tensors, partials, grad_scale, n, chunks, first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial num and den of every chunk from first_chunk on. One program a chunk."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    i, start, numel = _place(layout, chunk_tensors, chunk, n, CHUNK)
    h = _sgd_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = _read_scalar(addresses, layout, 3, 0, n, i)
    prev_lr = _read_scalar(addresses, layout, 3, 1, n, i)
    factor = grad_factor(h.maximize, grad_scale).to(T)
    gap = gap_factors(prev_lr, h.lr, 1.0 + h.memory_lambda, h.anchored, h.loss_gap, T)
    weight_decay = h.weight_decay.to(T)
    memory_lambda = h.memory_lambda.to(T)

    x = _pointer(addresses, 0, n, i, PARAM) + start
    g = _pointer(addresses, 1, n, i, GRAD) + start
    d = _pointer(addresses, 2, n, i, MOMENTUM) + start
    num = tl.zeros([BLOCK], T)
    den = tl.zeros([BLOCK], T)
    middle, end = _ends(_is_aligned(x, g, d, d), start, numel, BLOCK, CHUNK)
    num, den = _sgd_chunk_sums(
        x, g, d, num, den, 0, middle, end, factor, gap, weight_decay, memory_lambda,
        BLOCK, T, DECAY, True, STAGES,
    )  # fmt: skip
    num, den = _sgd_chunk_sums(
        x, g, d, num, den, middle, end, end, factor, gap, weight_decay, memory_lambda,
        BLOCK, T, DECAY, False, STAGES,
    )  # fmt: skip
    # A first step has no memory: d = g, and both sums are 0.
    tl.store(partials + chunk, tl.where(step == 0, 0.0, tl.sum(num).to(tl.float64)))
    tl.store(partials + chunks + chunk, tl.where(step == 0, 0.0, tl.sum(den).to(tl.float64)))


@triton.jit(do_not_specialize=COUNTS)
def sgd_beta(
    addresses, layout, hypers, lrs, partials, totals, rows, coefficients, grad_scale,
    found_inf, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """A tensor's beta, its scalars' next values, and its coefficients. One program a tensor."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    h = _sgd_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = _read_scalar(addresses, layout, 3, 0, n, i)
    num, den = _num_den(rows, totals, h.shared, partials, layout, chunks, n, i, CHUNK, PARTIALS)
    first = step == 0
    beta = tl.where(first, 0.0, clipped_beta(num, den, h.beta_max))
    _write_scalar(addresses, layout, 3, 0, n, i, step + 1.0)
    _write_scalar(addresses, layout, 3, 1, n, i, h.lr)
    _write_scalar(addresses, layout, 3, 2, n, i, beta)

    c = coefficients + SGD_COEFFICIENTS * i
    damping = 1.0 + h.memory_lambda
    tl.store(c, grad_factor(h.maximize, grad_scale))
    tl.store(c + 1, h.weight_decay)
    tl.store(c + 2, tl.where(first, 0.0, (beta + h.memory_lambda) / damping))
    tl.store(c + 3, tl.where(first, 1.0, (1.0 - beta) / damping))
    tl.store(c + 4, h.lr)


@triton.jit
def _sgd_chunk_update(
    x, g, d, begin, end, numel, factor, weight_decay, keep, take, lr,
    BLOCK: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        new_x, new_d = sgd_update(
            _load(x, at, numel, VECTOR, T),
            _load(g, at, numel, VECTOR, T),
            _load(d, at, numel, VECTOR, T),
            factor,
            weight_decay,
            keep,
            take,
            lr,
        )
        _store(x, at, new_x, numel, VECTOR)
        _store(d, at, new_d, numel, VECTOR)


@triton.jit(do_not_specialize=COUNTS)
def sgd_apply(
    addresses, layout, chunk_tensors, coefficients, found_inf, n, last_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Updates param and momentum_buffer. One program a chunk, from last_chunk backwards."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = last_chunk - tl.program_id(0).to(tl.int64)
    i, start, numel = _place(layout, chunk_tensors, chunk, n, CHUNK)
    c = coefficients + SGD_COEFFICIENTS * i
    factor = tl.load(c).to(T)
    weight_decay = tl.load(c + 1).to(T)
    keep = tl.load(c + 2).to(T)
    take = tl.load(c + 3).to(T)
    lr = tl.load(c + 4).to(T)

    x = _pointer(addresses, 0, n, i, PARAM) + start
    g = _pointer(addresses, 1, n, i, GRAD) + start
    d = _pointer(addresses, 2, n, i, MOMENTUM) + start
    middle, end = _ends(_is_aligned(x, g, d, d), start, numel, BLOCK, CHUNK)
    _sgd_chunk_update(
        x, g, d, 0, middle, end, factor, weight_decay, keep, take, lr, BLOCK, T, True, STAGES
    )  # fmt: skip
    _sgd_chunk_update(
        x, g, d, middle, end, end, factor, weight_decay, keep, take, lr, BLOCK, T, False, STAGES
    )  # fmt: skip

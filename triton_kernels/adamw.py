"""The kernels of AM-AdamW: stats, beta and apply, and step, which is all three in one launch.

Rows of addresses: param, grad, exp_avg, exp_avg_sq, step, beta_prod, prev_lr, beta.

The stats kernel writes each chunk's num and den to partials; the beta kernel adds a tensor's
partials in a fixed order, so that two runs give the same bits, writes the tensor's scalars, and
leaves in coefficients what the apply kernel needs. The step kernel calls the same functions, with
as many warps, and so gives the same bits. With found_inf not 0 nothing is written but partials
and rows.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.elements import (
    AdamWModel,
    adamw_model,
    adamw_sums,
    adamw_update,
    clipped_beta,
    gap_factors,
)
from adamem_fused.triton_kernels.schedule import (
    claim_item,
    is_last_of_tensor,
    launch_number,
    leave,
    publish,
    read_item,
    wait,
)
from adamem_fused.triton_kernels.sums import num_den, sum_partials
from adamem_fused.triton_kernels.tables import (
    ADAMW_HYPERS,
    ANY_LIST,
    FIRST_CHUNK,
    GROUP,
    NUMEL,
    adamw_hyper,
    data_pointer,
    ends,
    is_aligned,
    load_coefficient,
    load_elements,
    masked,
    place,
    read_scalar,
    store_elements,
    write_scalar,
)

COEFFICIENTS = tl.constexpr(10)


@triton.jit
def _add_sums(
    x, g, d, v, num, den, begin, end, numel, model, gap, weight_decay,
    BLOCK: tl.constexpr, T: tl.constexpr, DECAY: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        gs = load_elements(g, at, numel, VECTOR, T)
        ds = load_elements(d, at, numel, VECTOR, T)
        vs = load_elements(v, at, numel, VECTOR, T)
        xs = gs
        if DECAY:
            xs = load_elements(x, at, numel, VECTOR, T)
        part_num, part_den = adamw_sums(xs, gs, ds, vs, model, gap, weight_decay)
        num += masked(part_num, at, numel, VECTOR)
        den += masked(part_den, at, numel, VECTOR)
    return num, den


@triton.jit
def _sum_chunk(
    addresses, layout, hypers, lrs, partials, grad_scale, n, chunks, i, chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the partial num and den of a chunk of tensor i."""
    h = adamw_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = read_scalar(addresses, layout, 4, 0, n, i)
    beta_prod = read_scalar(addresses, layout, 4, 1, n, i)
    prev_lr = read_scalar(addresses, layout, 4, 2, n, i)
    model = adamw_model(h, step, beta_prod, grad_scale, T)
    scale = 1.0 + h.weight_decay * h.lr
    gap = gap_factors(prev_lr, h.lr, scale, h.anchored, h.loss_gap, T)
    weight_decay = h.weight_decay.to(T)

    start = chunk * CHUNK
    numel = tl.load(layout + NUMEL * n + i)
    x = data_pointer(addresses, 0, n, i, PARAM) + start
    g = data_pointer(addresses, 1, n, i, GRAD) + start
    d = data_pointer(addresses, 2, n, i, EXP_AVG) + start
    v = data_pointer(addresses, 3, n, i, EXP_AVG_SQ) + start
    num = tl.zeros([BLOCK], T)
    den = tl.zeros([BLOCK], T)
    middle, end = ends(is_aligned(x, g, d, v), start, numel, BLOCK, CHUNK)
    num, den = _add_sums(
        x, g, d, v, num, den, 0, middle, end, model, gap, weight_decay,
        BLOCK, T, DECAY, True, STAGES,
    )  # fmt: skip
    num, den = _add_sums(
        x, g, d, v, num, den, middle, end, end, model, gap, weight_decay,
        BLOCK, T, DECAY, False, STAGES,
    )  # fmt: skip
    # A tensor without elements has no place in the table.
    at = partials + tl.load(layout + FIRST_CHUNK * n + i) + chunk
    tl.store(at, tl.sum(num).to(tl.float64), mask=numel > 0)
    tl.store(at + chunks, tl.sum(den).to(tl.float64), mask=numel > 0)


@triton.jit
def _set_beta(addresses, layout, hypers, lrs, coefficients, grad_scale, n, i, num, den):
    """Tensor i's beta, its scalars' next values, and its coefficients."""
    h = adamw_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = read_scalar(addresses, layout, 4, 0, n, i)
    beta_prod = read_scalar(addresses, layout, 4, 1, n, i)
    # There is no earlier iterate at the first step.
    beta = tl.where(step == 0, h.beta_max, clipped_beta(num, den, h.beta_max))
    model = adamw_model(h, step, beta_prod, grad_scale, tl.float64)
    # Every warp has read the scalars before one of them writes.
    tl.debug_barrier()
    write_scalar(addresses, layout, 4, 0, n, i, step + 1.0)
    write_scalar(addresses, layout, 4, 1, n, i, beta_prod * beta)
    write_scalar(addresses, layout, 4, 2, n, i, h.lr)
    write_scalar(addresses, layout, 4, 3, n, i, beta)

    c = coefficients + COEFFICIENTS * i
    tl.store(c, model.grad_factor)
    tl.store(c + 1, model.beta2)
    tl.store(c + 2, model.one_minus_beta2)
    tl.store(c + 3, model.v_scale)
    tl.store(c + 4, model.eps)
    tl.store(c + 5, model.memory_lambda)
    tl.store(c + 6, beta)
    tl.store(c + 7, 1.0 - beta)
    tl.store(c + 8, h.lr)
    tl.store(c + 9, 1.0 - h.lr * h.weight_decay)


@triton.jit
def _update(
    x, g, d, v, begin, end, numel, model, beta, take, lr, decay,
    BLOCK: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        new_x, new_d, new_v = adamw_update(
            load_elements(x, at, numel, VECTOR, T),
            load_elements(g, at, numel, VECTOR, T),
            load_elements(d, at, numel, VECTOR, T),
            load_elements(v, at, numel, VECTOR, T),
            model,
            beta,
            take,
            lr,
            decay,
        )
        store_elements(x, at, new_x, numel, VECTOR)
        store_elements(d, at, new_d, numel, VECTOR)
        store_elements(v, at, new_v, numel, VECTOR)


@triton.jit
def _update_chunk(
    addresses, layout, coefficients, n, i, chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Updates param, exp_avg and exp_avg_sq in a chunk of tensor i."""
    c = coefficients + COEFFICIENTS * i
    model = AdamWModel(
        grad_factor=load_coefficient(c, T),
        beta2=load_coefficient(c + 1, T),
        one_minus_beta2=load_coefficient(c + 2, T),
        v_scale=load_coefficient(c + 3, T),
        eps=load_coefficient(c + 4, T),
        memory_lambda=load_coefficient(c + 5, T),
    )
    beta = load_coefficient(c + 6, T)
    take = load_coefficient(c + 7, T)
    lr = load_coefficient(c + 8, T)
    decay = load_coefficient(c + 9, T)

    start = chunk * CHUNK
    numel = tl.load(layout + NUMEL * n + i)
    x = data_pointer(addresses, 0, n, i, PARAM) + start
    g = data_pointer(addresses, 1, n, i, GRAD) + start
    d = data_pointer(addresses, 2, n, i, EXP_AVG) + start
    v = data_pointer(addresses, 3, n, i, EXP_AVG_SQ) + start
    middle, end = ends(is_aligned(x, g, d, v), start, numel, BLOCK, CHUNK)
    _update(x, g, d, v, 0, middle, end, model, beta, take, lr, decay, BLOCK, T, True, STAGES)
    _update(x, g, d, v, middle, end, end, model, beta, take, lr, decay, BLOCK, T, False, STAGES)


# ---- kernels --------------------------------------------------------------------------


@triton.jit(**ANY_LIST)
def adamw_stats(
    addresses, layout, hypers, lrs, chunk_tensors, partials, grad_scale, n, chunks, first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial num and den of every chunk from first_chunk on. One program a chunk."""
    i, chunk = place(layout, chunk_tensors, first_chunk + tl.program_id(0).to(tl.int64), n)
    _sum_chunk(
        addresses, layout, hypers, lrs, partials, grad_scale, n, chunks, i, chunk,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, T, DECAY, CHUNK, BLOCK, STAGES,
    )  # fmt: skip


@triton.jit(**ANY_LIST)
def adamw_beta(
    addresses, layout, hypers, lrs, partials, totals, rows, coefficients, grad_scale,
    found_inf, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Every tensor's beta, scalars and coefficients. One program a tensor."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    num, den = num_den(
        rows, totals, hypers, partials, layout, chunks, n, i, ADAMW_HYPERS, CHUNK, PARTIALS
    )  # fmt: skip
    _set_beta(addresses, layout, hypers, lrs, coefficients, grad_scale, n, i, num, den)


@triton.jit(**ANY_LIST)
def adamw_apply(
    addresses, layout, chunk_tensors, coefficients, found_inf, n, last_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Updates every chunk, from last_chunk backwards. One program a chunk."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    i, chunk = place(layout, chunk_tensors, last_chunk - tl.program_id(0).to(tl.int64), n)
    _update_chunk(
        addresses, layout, coefficients, n, i, chunk,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, T, CHUNK, BLOCK, STAGES,
    )  # fmt: skip


@triton.jit(**ANY_LIST)
def adamw_step(
    addresses, layout, hypers, lrs, items, control, partials, coefficients, grad_scale, found_inf,
    n, chunks, count,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """All of a step, for the tensors of `count` items. Any number of programs."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    launch = launch_number(control)
    k = claim_item(control)
    while k < count:
        i, chunk = read_item(items, k)
        if chunk >= 0:
            _sum_chunk(
                addresses, layout, hypers, lrs, partials, grad_scale, n, chunks, i, chunk,
                PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, T, DECAY, CHUNK, BLOCK, STAGES,
            )  # fmt: skip
            if is_last_of_tensor(control, layout, n, i, CHUNK):
                num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
                _set_beta(addresses, layout, hypers, lrs, coefficients, grad_scale, n, i, num, den)
                publish(control, i, launch)
        else:
            wait(control, i, launch)
            _update_chunk(
                addresses, layout, coefficients, n, i, ~chunk,
                PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, T, CHUNK, BLOCK, STAGES,
            )  # fmt: skip
        k = claim_item(control)
    leave(control, launch)

"""The kernels of AM-SGD: stats, beta and apply, and step, which is all three in one launch.

Rows of addresses: param, grad, momentum_buffer, step, prev_lr, beta. What each kernel does is
said in adamw.py.
"""

import triton
import triton.language as tl

from adamem_fused.triton_kernels.elements import (
    clipped_beta,
    gap_factors,
    grad_factor,
    sgd_sums,
    sgd_update,
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
    ANY_LIST,
    FIRST_CHUNK,
    GROUP,
    NUMEL,
    SGD_HYPERS,
    data_pointer,
    ends,
    is_aligned,
    load_coefficient,
    load_elements,
    masked,
    place,
    read_scalar,
    sgd_hyper,
    store_elements,
    write_scalar,
)

COEFFICIENTS = tl.constexpr(5)


@triton.jit
def _add_sums(
    x, g, d, num, den, begin, end, numel, factor, gap, weight_decay, memory_lambda,
    BLOCK: tl.constexpr, T: tl.constexpr, DECAY: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        gs = load_elements(g, at, numel, VECTOR, T)
        ds = load_elements(d, at, numel, VECTOR, T)
        xs = gs
        if DECAY:
            xs = load_elements(x, at, numel, VECTOR, T)
        part_num, part_den = sgd_sums(xs, gs, ds, factor, gap, weight_decay, memory_lambda)
        num += masked(part_num, at, numel, VECTOR)
        den += masked(part_den, at, numel, VECTOR)
    return num, den


@triton.jit
def _sum_chunk(
    addresses, layout, hypers, lrs, partials, grad_scale, n, chunks, i, chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the partial num and den of a chunk of tensor i."""
    h = sgd_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = read_scalar(addresses, layout, 3, 0, n, i)
    prev_lr = read_scalar(addresses, layout, 3, 1, n, i)
    factor = grad_factor(h.maximize, grad_scale).to(T)
    gap = gap_factors(prev_lr, h.lr, 1.0 + h.memory_lambda, h.anchored, h.loss_gap, T)
    weight_decay = h.weight_decay.to(T)
    memory_lambda = h.memory_lambda.to(T)

    start = chunk * CHUNK
    numel = tl.load(layout + NUMEL * n + i)
    x = data_pointer(addresses, 0, n, i, PARAM) + start
    g = data_pointer(addresses, 1, n, i, GRAD) + start
    d = data_pointer(addresses, 2, n, i, MOMENTUM) + start
    num = tl.zeros([BLOCK], T)
    den = tl.zeros([BLOCK], T)
    middle, end = ends(is_aligned(x, g, d, d), start, numel, BLOCK, CHUNK)
    num, den = _add_sums(
        x, g, d, num, den, 0, middle, end, factor, gap, weight_decay, memory_lambda,
        BLOCK, T, DECAY, True, STAGES,
    )  # fmt: skip
    num, den = _add_sums(
        x, g, d, num, den, middle, end, end, factor, gap, weight_decay, memory_lambda,
        BLOCK, T, DECAY, False, STAGES,
    )  # fmt: skip
    # A first step has no memory: d = g, and both sums are 0. A tensor without elements has no
    # place in the table.
    at = partials + tl.load(layout + FIRST_CHUNK * n + i) + chunk
    tl.store(at, tl.where(step == 0, 0.0, tl.sum(num).to(tl.float64)), mask=numel > 0)
    tl.store(at + chunks, tl.where(step == 0, 0.0, tl.sum(den).to(tl.float64)), mask=numel > 0)


@triton.jit
def _set_beta(addresses, layout, hypers, lrs, coefficients, grad_scale, n, i, num, den):
    """Tensor i's beta, its scalars' next values, and its coefficients."""
    h = sgd_hyper(hypers, lrs, tl.load(layout + GROUP * n + i))
    step = read_scalar(addresses, layout, 3, 0, n, i)
    first = step == 0
    beta = tl.where(first, 0.0, clipped_beta(num, den, h.beta_max))
    # Every warp has read the scalars before one of them writes.
    tl.debug_barrier()
    write_scalar(addresses, layout, 3, 0, n, i, step + 1.0)
    write_scalar(addresses, layout, 3, 1, n, i, h.lr)
    write_scalar(addresses, layout, 3, 2, n, i, beta)

    c = coefficients + COEFFICIENTS * i
    damping = 1.0 + h.memory_lambda
    tl.store(c, grad_factor(h.maximize, grad_scale))
    tl.store(c + 1, h.weight_decay)
    tl.store(c + 2, tl.where(first, 0.0, (beta + h.memory_lambda) / damping))
    tl.store(c + 3, tl.where(first, 1.0, (1.0 - beta) / damping))
    tl.store(c + 4, h.lr)


@triton.jit
def _update(
    x, g, d, begin, end, numel, factor, weight_decay, keep, take, lr,
    BLOCK: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for k in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)
        new_x, new_d = sgd_update(
            load_elements(x, at, numel, VECTOR, T),
            load_elements(g, at, numel, VECTOR, T),
            load_elements(d, at, numel, VECTOR, T),
            factor,
            weight_decay,
            keep,
            take,
            lr,
        )
        store_elements(x, at, new_x, numel, VECTOR)
        store_elements(d, at, new_d, numel, VECTOR)


@triton.jit
def _update_chunk(
    addresses, layout, coefficients, n, i, chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Updates param and momentum_buffer in a chunk of tensor i."""
    c = coefficients + COEFFICIENTS * i
    factor = load_coefficient(c, T)
    weight_decay = load_coefficient(c + 1, T)
    keep = load_coefficient(c + 2, T)
    take = load_coefficient(c + 3, T)
    lr = load_coefficient(c + 4, T)

    start = chunk * CHUNK
    numel = tl.load(layout + NUMEL * n + i)
    x = data_pointer(addresses, 0, n, i, PARAM) + start
    g = data_pointer(addresses, 1, n, i, GRAD) + start
    d = data_pointer(addresses, 2, n, i, MOMENTUM) + start
    middle, end = ends(is_aligned(x, g, d, d), start, numel, BLOCK, CHUNK)
    _update(
        x, g, d, 0, middle, end, factor, weight_decay, keep, take, lr, BLOCK, T, True, STAGES
    )  # fmt: skip
    _update(
        x, g, d, middle, end, end, factor, weight_decay, keep, take, lr, BLOCK, T, False, STAGES
    )  # fmt: skip


# ---- kernels --------------------------------------------------------------------------


@triton.jit(**ANY_LIST)
def sgd_stats(
    addresses, layout, hypers, lrs, chunk_tensors, partials, grad_scale, n, chunks, first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    T: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial num and den of every chunk from first_chunk on. One program a chunk."""
    i, chunk = place(layout, chunk_tensors, first_chunk + tl.program_id(0).to(tl.int64), n)
    _sum_chunk(
        addresses, layout, hypers, lrs, partials, grad_scale, n, chunks, i, chunk,
        PARAM, GRAD, MOMENTUM, T, DECAY, CHUNK, BLOCK, STAGES,
    )  # fmt: skip


@triton.jit(**ANY_LIST)
def sgd_beta(
    addresses, layout, hypers, lrs, partials, totals, rows, coefficients, grad_scale,
    found_inf, n, chunks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Every tensor's beta, scalars and coefficients. One program a tensor."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    num, den = num_den(
        rows, totals, hypers, partials, layout, chunks, n, i, SGD_HYPERS, CHUNK, PARTIALS
    )  # fmt: skip
    _set_beta(addresses, layout, hypers, lrs, coefficients, grad_scale, n, i, num, den)


@triton.jit(**ANY_LIST)
def sgd_apply(
    addresses, layout, chunk_tensors, coefficients, found_inf, n, last_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    T: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Updates every chunk, from last_chunk backwards. One program a chunk."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    i, chunk = place(layout, chunk_tensors, last_chunk - tl.program_id(0).to(tl.int64), n)
    _update_chunk(
        addresses, layout, coefficients, n, i, chunk,
        PARAM, GRAD, MOMENTUM, T, CHUNK, BLOCK, STAGES,
    )  # fmt: skip


@triton.jit(**ANY_LIST)
def sgd_step(
    addresses, layout, hypers, lrs, items, control, partials, coefficients, grad_scale, found_inf,
    n, chunks, count,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr,
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
                PARAM, GRAD, MOMENTUM, T, DECAY, CHUNK, BLOCK, STAGES,
            )  # fmt: skip
            if is_last_of_tensor(control, layout, n, i, CHUNK):
                num, den = sum_partials(partials, layout, chunks, n, i, CHUNK, PARTIALS)
                _set_beta(addresses, layout, hypers, lrs, coefficients, grad_scale, n, i, num, den)
                publish(control, i, launch)
        else:
            wait(control, i, launch)
            _update_chunk(
                addresses, layout, coefficients, n, i, ~chunk,
                PARAM, GRAD, MOMENTUM, T, CHUNK, BLOCK, STAGES,
            )  # fmt: skip
        k = claim_item(control)
    leave(control, launch)

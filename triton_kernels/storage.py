"""Loading and storing elements, in whatever format they are kept: formats.py has the formats.

A step's arithmetic is the same for all of them. What a tensor keeps its memories in, and its
parameter, are the types of the pointers; whether the parameter is rounded stochastically, and has a
remainder, is looked up at run time, as are the lengths of blocks.

What a tuple does not have is (), whose length is 0: Triton 3.6 returns none with None in it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from adamem_fused.triton_kernels.formats import (
    SHORTEST,
    SMALLEST_SCALE,
    StepKeys,
    decode_signed,
    decode_square,
    encode_signed,
    encode_square,
    inverse_scale,
    join,
    largest_magnitudes,
    random_bits,
    repaired_keys,
    split,
    spread_over,
    step_keys,
    to_bfloat16,
    to_nearest,
)
from adamem_fused.triton_kernels.tables import (
    BLOCK_LENGTH,
    KEY,
    OFFSET,
    ROUNDS,
    SKIP,
    STRETCH,
    TENSOR,
    column,
    data_pointer,
)


class Stretches(NamedTuple):
    """How a shard lies in the whole tensor, where it does not do so in one piece."""

    until: tl.tensor  # behind so many elements of the chunk, and then behind each `length`,
    length: tl.tensor
    skip: tl.tensor  # are so many that are others'


class Low(NamedTuple):
    """What a chunk has beside its elements where something is stored in few bits."""

    scales: tl.tensor  # of the memory's blocks, from the chunk's first on
    square_scales: tl.tensor
    shift: tl.tensor  # a block is 64 << shift elements
    remainder: tl.tensor
    has_remainder: tl.tensor
    rounds: tl.tensor
    place: tl.tensor  # of the first element in the whole tensor
    stretches: Stretches | tuple[()]  # (): it does


class Elements(NamedTuple):
    """A chunk's x, g, d and v, from its first element on, and what else is kept of them."""

    x: tl.tensor
    g: tl.tensor
    d: tl.tensor
    v: tl.tensor
    low: Low | tuple[()]  # (): nothing is
    keys: StepKeys | tuple[()]  # with which what is low is rounded


class Tile(NamedTuple):
    """Which elements a program holds at a time: by their distance from the chunk's first."""

    offsets: tl.tensor
    mask: tl.tensor  # which are there; the compiler drops one that says all
    heads: tl.tensor  # the first of each 64
    heads_mask: tl.tensor


@triton.jit
def _open_stretches(layout, units, i, start):
    """And how many lie between the chunk's first element and the tensor's."""
    length, skip = column(layout, STRETCH, units, i), column(layout, SKIP, units, i)
    # Nothing is as long as this that is done at a time.
    most = tl.full((), 2**30, tl.int64)
    length = tl.where(length > 0, length, start + most)
    count = start // length
    until = tl.minimum((count + 1) * length - start, most)
    length = tl.minimum(length, most)
    return Stretches(until.to(tl.int32), length.to(tl.int32), skip), count * skip


@triton.jit
def _open_low(
    addresses, layout, n, units, i, start, ADAMW: tl.constexpr, STRETCHED: tl.constexpr
):  # fmt: skip
    SCALES: tl.constexpr = 8 if ADAMW else 6
    tensor = column(layout, TENSOR, units, i)
    length = column(layout, BLOCK_LENGTH, units, i)
    shift = (length >= 128).to(tl.int32) + (length >= 256).to(tl.int32)
    first_block = (start // SHORTEST) >> shift
    scales = data_pointer(addresses, SCALES, n, tensor, tl.float32) + first_block
    square_scales = scales
    if ADAMW:
        square_scales = data_pointer(addresses, SCALES + 1, n, tensor, tl.float32) + first_block
    remainder = data_pointer(addresses, SCALES + (2 if ADAMW else 1), n, tensor, tl.int8)
    place = column(layout, OFFSET, units, i) + start
    stretches = ()
    if STRETCHED:
        stretches, skipped = _open_stretches(layout, units, i, start)
        place += skipped
    return Low(
        scales,
        square_scales,
        shift,
        remainder + start,
        remainder.to(tl.int64) != 0,
        column(layout, ROUNDS, units, i) != 0,
        place,
        stretches,
    )


@triton.jit
def open_elements(
    addresses, layout, n, units, i, start, step,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEMORY: tl.constexpr, SQUARE: tl.constexpr,
    ADAMW: tl.constexpr, LOW: tl.constexpr, STRETCHED: tl.constexpr,
):  # fmt: skip
    """Those of unit i's tensor from element `start` on, and whether 16-byte accesses may be."""
    tensor = column(layout, TENSOR, units, i)
    x = data_pointer(addresses, 0, n, tensor, PARAM) + start
    g = data_pointer(addresses, 1, n, tensor, GRAD) + start
    d = data_pointer(addresses, 2, n, tensor, MEMORY) + start
    v = d
    if ADAMW:
        v = data_pointer(addresses, 3, n, tensor, SQUARE) + start
    low_bits = x.to(tl.int64) | g.to(tl.int64) | d.to(tl.int64) | v.to(tl.int64)
    low = ()
    keys = ()
    if LOW:
        low = _open_low(addresses, layout, n, units, i, start, ADAMW, STRETCHED)
        keys = step_keys(column(layout, KEY, units, i), step)
        low_bits |= tl.where(low.has_remainder, low.remainder.to(tl.int64), 0)
    return Elements(x, g, d, v, low, keys), (low_bits & 15) == 0


# ---- tiles ----------------------------------------------------------------------------


@triton.jit
def block_at(first, numel, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """BLOCK elements of an ordinary unit's chunk; all are there for 16-byte accesses."""
    offsets = first + tl.arange(0, BLOCK)
    heads = first + SHORTEST * tl.arange(0, BLOCK // SHORTEST)
    mask, heads_mask = offsets < numel, heads < numel
    if VECTOR:
        mask = tl.full(mask.shape, True, tl.int1)
        heads_mask = tl.full(heads_mask.shape, True, tl.int1)
    return Tile(offsets, mask, heads, heads_mask)


@triton.jit
def rows_at(first, active, numel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """HEIGHT rows, from `first` on, of which the active ones are there."""
    if VECTOR:
        numel = numel // 8 * 8  # which it is: so the compiler sees that 16 bytes are there or not
    starts = (first + tl.arange(0, HEIGHT))[:, None] * numel
    active = active[:, None]
    places = tl.arange(0, WIDTH)[None, :]
    offsets, mask = starts + places, active & (places < numel)
    heads, heads_mask = offsets, mask
    if WIDTH >= SHORTEST:
        blocks = SHORTEST * tl.arange(0, WIDTH // SHORTEST)[None, :]
        heads, heads_mask = starts + blocks, active & (blocks < numel)
    return Tile(offsets, mask, heads, heads_mask)


@triton.jit
def _pointers(pointer, at, VECTOR: tl.constexpr):
    # 16-byte accesses need both: the hint, on the pointers that are loaded from, and no mask, or
    # one that is seen to be the same for 16 bytes.
    pointers = pointer + at.offsets
    if VECTOR:
        if len(pointers.shape) == 1:
            pointers = tl.multiple_of(pointers, 16)
        else:
            pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def load_elements(pointer, at, VECTOR: tl.constexpr, T: tl.constexpr):
    return tl.load(_pointers(pointer, at, VECTOR), mask=at.mask, other=0).to(T)


@triton.jit
def store_elements(pointer, at, value, VECTOR: tl.constexpr):
    tl.store(_pointers(pointer, at, VECTOR), value.to(pointer.dtype.element_ty), mask=at.mask)


@triton.jit
def masked(value, old, at):
    """The value, and the old one beyond the end, where the formulas may have divided by 0."""
    return tl.where(at.mask, value, old)


# ---- what is stored in few bits -------------------------------------------------------


@triton.jit
def _random(low, key, at):
    places = low.place + at.offsets
    if len(low.stretches) > 0:
        own = low.stretches
        behind = at.offsets - own.until
        # Exact below 2^20.
        count = ((behind.to(tl.float32) + 0.5) / own.length).to(tl.int32) + 1
        places += tl.where(behind < 0, 0, count) * own.skip
    return random_bits(key, places)


@triton.jit
def _scale_pointers(scales, low, at):
    # Each of a block's 64s has its scale's.
    return scales + (at.heads // SHORTEST >> low.shift)


@triton.jit
def _load_scales(scales, low, at, factor):
    """One for each 64 elements, times a factor."""
    value = tl.load(_scale_pointers(scales, low, at), mask=at.heads_mask, other=0.0)
    return tl.reshape(value, [value.numel]) * factor


@triton.jit
def _load_memory(pointer, scales, low, at, VECTOR: tl.constexpr, T: tl.constexpr):
    value = load_elements(pointer, at, VECTOR, T)
    if pointer.dtype.element_ty.is_int8():
        value = decode_signed(value, spread_over(_load_scales(scales, low, at, 1 / 16129), value))
    elif pointer.dtype.element_ty.is_uint8():
        value = decode_square(value, spread_over(_load_scales(scales, low, at, 1 / 65025), value))
    return value


@triton.jit
def load_memory(e, at, VECTOR: tl.constexpr, T: tl.constexpr):
    if len(e.low) == 0:
        value = load_elements(e.d, at, VECTOR, T)
    else:
        value = _load_memory(e.d, e.low.scales, e.low, at, VECTOR, T)
    return value


@triton.jit
def load_square(e, at, VECTOR: tl.constexpr, T: tl.constexpr):
    if len(e.low) == 0:
        value = load_elements(e.v, at, VECTOR, T)
    else:
        value = _load_memory(e.v, e.low.square_scales, e.low, at, VECTOR, T)
    return value


@triton.jit
def load_param(e, at, VECTOR: tl.constexpr, T: tl.constexpr):
    value = load_elements(e.x, at, VECTOR, T)
    if len(e.low) > 0:
        if e.x.dtype.element_ty.is_bf16():
            if e.low.has_remainder:
                remainder = load_elements(e.low.remainder, at, VECTOR, tl.int8)
                value = join(value.to(tl.float32), remainder).to(T)
    return value


class Stored(NamedTuple):
    """A memory's new values as they are stored."""

    value: tl.tensor
    scale: tl.tensor | tuple[()]  # of codes, one for each 64 elements


@triton.jit
def _memory_as_stored(value, low, random, DTYPE: tl.constexpr):
    scale = ()
    if DTYPE.is_bf16():
        value = to_bfloat16(value.to(tl.float32), random)
    elif DTYPE.is_int8():
        value = value.to(tl.float32)
        scale = largest_magnitudes(value, low.shift)
        value = encode_signed(value, spread_over(inverse_scale(scale), value), random)
    elif DTYPE.is_uint8():
        value = value.to(tl.float32)
        scale = tl.sqrt_rn(largest_magnitudes(value, low.shift))
        value = encode_square(value, spread_over(inverse_scale(scale), value), random)
    return Stored(value, scale)


@triton.jit
def _store_memory(pointer, scales, low, at, stored, VECTOR: tl.constexpr):
    if pointer.dtype.element_ty.is_int8() or pointer.dtype.element_ty.is_uint8():
        scale = tl.where(stored.scale < SMALLEST_SCALE, 0.0, stored.scale)
        tl.store(
            _scale_pointers(scales, low, at), tl.reshape(scale, at.heads.shape), mask=at.heads_mask
        )
    store_elements(pointer, at, stored.value, VECTOR)


@triton.jit
def _store_param(e, at, value, VECTOR: tl.constexpr):
    low = e.low
    if e.x.dtype.element_ty.is_bf16():
        value = value.to(tl.float32)
        random = _random(low, e.keys.param, at)
        if low.has_remainder:
            new, remainder = split(value, tl.where(low.rounds, random & 0xFF, 0x80))
            store_elements(e.x, at, new, VECTOR)
            store_elements(low.remainder, at, remainder, VECTOR)
        else:
            new = to_bfloat16(value, tl.where(low.rounds, random, to_nearest(value)))
            store_elements(e.x, at, new, VECTOR)
    else:
        store_elements(e.x, at, value, VECTOR)


@triton.jit
def square_as_stored(e, at, value):
    """The new v as `store` takes it. Rounded as soon as it is known, it
    takes fewer registers."""
    if len(e.low) == 0:
        stored = Stored(value, ())
    else:
        random = _random(e.low, e.keys.memories, at) >> 16
        stored = _memory_as_stored(value, e.low, random, e.v.dtype.element_ty)
    return stored


@triton.jit
def store(e, at, xs, ds, square, VECTOR: tl.constexpr):
    """The new x and d, and v if it is not None."""
    if len(e.low) == 0:
        store_elements(e.x, at, xs, VECTOR)
        store_elements(e.d, at, ds, VECTOR)
        if square is not None:
            store_elements(e.v, at, square.value, VECTOR)
    else:
        if square is not None:
            _store_memory(e.v, e.low.square_scales, e.low, at, square, VECTOR)
        random = _random(e.low, e.keys.memories, at)
        memory = _memory_as_stored(ds, e.low, random, e.d.dtype.element_ty)
        _store_memory(e.d, e.low.scales, e.low, at, memory, VECTOR)
        _store_param(e, at, xs, VECTOR)


@triton.jit
def to_repair(e):
    """The elements, to be stored for the second time in a step."""
    if len(e.keys) > 0:
        e = Elements(e.x, e.g, e.d, e.v, e.low, repaired_keys(e.keys))
    return e

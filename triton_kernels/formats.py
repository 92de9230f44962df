"""How a memory or a parameter is stored in fewer bits than the arithmetic has: the formats of
adamem_fused/formats.py, which says what they are and why, as csrc/formats.h has them.

Values are float32 here, words 32 bits without a sign. Rounding is done in integers, which are the
same on every device and under Triton's interpreter.
"""

from typing import NamedTuple

import triton
import triton.language as tl

QUIET_NAN = tl.constexpr(0x7FC0)  # of bfloat16

# A block whose largest magnitude is below this is of zeros: its inverse would be infinite.
SMALLEST_SCALE = tl.constexpr(1e-37)

# The shortest block, of which the others are 2 or 4.
SHORTEST = tl.constexpr(64)


# ---- random bits ----------------------------------------------------------------------


@triton.jit
def _mix(word):
    """A hash of 64 bits: the finalizer of Steele, Lea & Flood's SplitMix64 (OOPSLA 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


class StepKeys(NamedTuple):
    """A tensor's keys in a step."""

    memories: tl.tensor
    param: tl.tensor


@triton.jit
def step_keys(key, step):
    """step: the number of steps before this one."""
    memories = _mix(key.to(tl.uint64) ^ (step.to(tl.int64) + 1).to(tl.uint64))
    return StepKeys(memories, _mix(memories))


@triton.jit
def repaired_keys(keys):
    """Those of the step's repair, which rounds a second time."""
    memories = _mix(keys.param)
    return StepKeys(memories, _mix(memories))


@triton.jit
def random_bits(key, places):
    """Of the elements at these places in the whole tensor, int64. The low 16 bits are for a signed
    memory and for a parameter, the high ones for exp_avg_sq."""
    x = places.to(tl.uint32) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ ((places >> 32).to(tl.uint32) + (key >> 32).to(tl.uint32))
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


# ---- bfloat16 -------------------------------------------------------------------------


@triton.jit
def _bits(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def _as_bfloat16(value, word):
    """The value whose bits are the word's low 16; NaN where the value that was rounded is."""
    word = tl.where(value == value, word, QUIET_NAN)
    return word.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_nearest(value):
    """What `to_bfloat16` adds so that it rounds to the nearest, of two the even one."""
    return ((_bits(value) >> 16) & 1) + 0x7FFF


@triton.jit
def to_bfloat16(value, random):
    """One of the two neighbours. random: of which the low 16 bits count."""
    return _as_bfloat16(value, (_bits(value) + (random & 0xFFFF)) >> 16)


# ---- a bfloat16 parameter and its remainder -------------------------------------------


@triton.jit
def split(value, added):
    """The bfloat16 values, and the int8 remainders. added: 0x80 to round to nearest, or 8 random
    bits."""
    # The sign bit shifted in is lost again: of 24 bits, and of the 16 above the remainder.
    short = (_bits(value) + added) >> 8
    param = (short + 0x80) >> 8
    remainder = tl.where(value == value, short - (param << 8), 0)
    return _as_bfloat16(value, param), remainder.to(tl.int8)


@triton.jit
def join(param, remainder):
    """param: the bfloat16 values, as float32. remainder: int8."""
    words = param.to(tl.int32, bitcast=True) + (remainder.to(tl.int32) << 8)
    value = words.to(tl.float32, bitcast=True)
    # Of another parameter than the remainder's the bits may be those of a NaN.
    return tl.where(value == value, value, param)


# ---- int8 -----------------------------------------------------------------------------


@triton.jit
def decode_signed(code, part):
    """part: scale / 127^2, of the block."""
    return code * tl.abs(code) * part


@triton.jit
def decode_square(code, part):
    """part: scale / 255^2, of the block."""
    root = code * code * part
    return root * root


@triton.jit
def inverse_scale(scale):
    none = scale < SMALLEST_SCALE
    return tl.where(none, 0.0, tl.div_rn(1.0, tl.where(none, 1.0, scale)))


@triton.jit
def _chance(random):
    """16 random bits as a number in (0, 1)."""
    # By the bits of 2^23 and it: a conversion is issued at a quarter of the rate.
    whole = ((random & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return tl.fma(whole, 2.0**-16, 2.0**-17)


@triton.jit
def _rounded_code(level, root, c, POWER: tl.constexpr):
    """The code whose POWER stands for `level`, rounded by chance c, as csrc/formats.h has it. root:
    level^(1 / POWER), to a quarter."""
    near = (root + (0.75 - c) + 12582912.0) - 12582912.0  # the nearest whole number
    q = tl.where(near > 1.0, near, 1.0)
    p = q - 1.0
    high, low = q * q, p * p
    if POWER == 4:
        high, low = high * high, low * low
    return tl.where(tl.fma(c, high - low, low) < level, q, p)


@triton.jit
def _to_byte(whole):
    """Of one of at most 255: the low bits of it and 2^23."""
    return _bits(whole + 8388608.0).to(tl.uint8)


@triton.jit
def encode_signed(value, inverse, random):
    """int8 codes. inverse: 1 / scale, of the block."""
    level = tl.abs(value) * inverse * 16129.0
    root = level * tl.rsqrt(tl.where(level > 1e-30, level, 1e-30))
    code = _to_byte(tl.minimum(_rounded_code(level, root, _chance(random), 2), 127.0))
    return tl.where(value < 0, 0 - code, code).to(tl.int8, bitcast=True)


@triton.jit
def encode_square(value, inverse, random):
    """uint8 codes of exp_avg_sq. inverse: 1 / scale, of the block."""
    level = value * inverse * (inverse * 4228250625.0)
    root = tl.rsqrt(tl.rsqrt(level))
    code = tl.minimum(_rounded_code(level, root, _chance(random), 4), 255.0)
    # Of an infinite scale all are 0, and so NaN.
    return _to_byte(tl.where((value > 0) & (inverse > 0), tl.maximum(code, 1.0), code))


# What follows has one value for each 64 elements of a tile, whatever its shape, flat; a block is
# 1 << shift of them.


@triton.jit
def _spread(value, COUNT: tl.constexpr):
    """Each element COUNT times, one behind the other."""
    repeated = tl.broadcast_to(value[:, None], [value.shape[0], COUNT])
    return tl.reshape(repeated, [value.shape[0] * COUNT])


@triton.jit
def spread_over(scales, tile):
    """Each element's, in the tile's shape."""
    return tl.reshape(_spread(scales, SHORTEST), tile.shape)


@triton.jit
def _pairs(largest):
    return tl.max(tl.reshape(largest, [largest.shape[0] // 2, 2]), 1)


@triton.jit
def largest_magnitudes(values, shift):
    """Each block's, NaN where one is: its bits are larger than those of any number."""
    words = tl.abs(values).to(tl.int32, bitcast=True)
    ones = tl.max(tl.reshape(words, [values.numel // SHORTEST, SHORTEST]), 1)
    twos = _pairs(ones)
    fours = _pairs(twos)
    largest = tl.where(shift == 0, ones, tl.where(shift == 1, _spread(twos, 2), _spread(fours, 4)))
    return largest.to(tl.float32, bitcast=True)

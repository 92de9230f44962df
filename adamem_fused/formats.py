"""How a memory or a parameter is stored in fewer bits than the arithmetic has.

Here in torch, one function a conversion, for the reference backend and for loading; csrc/formats.h
and triton_kernels/formats.py have the same for the kernels.

    bfloat16    rounded stochastically: exp_avg_sq with beta2 = 0.999 changes by a thousandth in a
                step, which nearest rounding, to a part in 256, would never let through.
    int8        blocks of 64, 128 or 256 elements with a float32 scale each, the largest magnitude
                of the block. Codes are roots of magnitudes, so that small ones do not become 0.
                Of a signed memory (exp_avg, momentum_buffer) code c, of -127 to 127, is c |c| /
                127^2 of the scale. Of exp_avg_sq, whose scale is a square root, code c, of 0 to
                255, is (c / 255)^4 of its square, and what is not 0 has 1 at least: the
                denominator may be too large, and not too small. Rounded stochastically too.
    remainder   a bfloat16 parameter and 8 further bits of its float32 value.

Rounding is stochastic in the values: a number between two neighbours becomes one of them, with the
probabilities that make it right in the mean. The random bits are a hash of the tensor's key, the
step, and the element's place in the whole tensor, row by row. So they are the same for any number
of threads, chunks and shards, and after a checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# ---- random bits ------------------------------------------------------------------------

_WORD = (1 << 64) - 1
_HALF = (1 << 32) - 1


def mix(word: int) -> int:
    """A hash of 64 bits: the finalizer of Steele, Lea & Flood's SplitMix64 (OOPSLA 2014)."""
    word &= _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


# torch.compile makes a symbol of a seed that was another one in an earlier step, and cannot hash
# that: so it is told to take the number.
def tensor_key(seed: int, index: int) -> int:
    """The key of the optimizer's parameter of this index, over all groups in order."""
    return mix(mix(int(seed)) + index + 1)  # NumPy's would overflow


# torch.compiler.assume_constant_result, but without importing torch._dynamo, which takes seconds.
tensor_key._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_signed(word: int) -> int:
    """64 bits as an int64 has them."""
    return word - (1 << 64) if word >> 63 else word


class StepKeys(NamedTuple):
    """A tensor's keys in a step, and those of a repair, which rounds a second time."""

    memories: int
    param: int
    repaired_memories: int
    repaired_param: int


def step_keys(key: int, step: int) -> StepKeys:
    """step: the number of steps before this one."""
    keys = [mix(key ^ (step + 1))]
    while len(keys) < len(StepKeys._fields):
        keys.append(mix(keys[-1]))
    return StepKeys(*keys)


def random_bits(key: int, places: Tensor) -> Tensor:
    """32 bits for each of these places in the tensor: int64, of [0, 2^32).

    Two rounds of multiplication and shifts, of which each takes a half of the key. The low 16 bits
    are those of a signed memory, the high 16 those of exp_avg_sq; a parameter, which has a
    key of its own, takes the low ones. Places that are a multiple of 2^32 apart have bits that are
    fair, and not independent of each other.

    Args:
        places: int64, below 2^63.
    """
    x = (places & _HALF) ^ (key & _HALF)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _HALF
    x = x ^ (((places >> 32) + (key >> 32)) & _HALF)
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _HALF
    return x ^ (x >> 16)


def places(numel: int, offset: int, stretch: int, skip: int, device: torch.device) -> Tensor:
    """Where a shard's elements lie in the whole tensor, [numel] int64.

    From `offset` on; where stretch is not 0, `skip` elements that are others' come behind every
    `stretch` of the shard's.
    """
    own = torch.arange(numel, device=device)
    return offset + own + (own // stretch * skip if stretch > 0 else 0)


# ---- bfloat16 ---------------------------------------------------------------------------


def to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Rounded to one of the two neighbours, by 16 random bits. Infinities stay, and so does NaN.

    Beyond the largest finite number the upper neighbour is infinity.

    Args:
        value: floating-point; taken as float32.
        bits: int64, of which the low 16 count.
    """
    words = value.float().view(torch.int32).long()
    rounded = (words + (bits & 0xFFFF)) & ~0xFFFF
    result = rounded.to(torch.int32).view(torch.float32)
    return torch.where(value.isnan(), value.float(), result).bfloat16()


# ---- a bfloat16 parameter and its remainder --------------------------------------------


def split(value: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 values as bfloat16 and int8: those of 24 bits, the bfloat16 one the nearest.

    Args:
        value: floating-point; taken as float32.
        bits: int64, of which the low 8 round stochastically to 24 bits; None rounds to nearest.
    """
    value = value.float()
    words = value.view(torch.int32).long()
    short = (words + (0x80 if bits is None else bits & 0xFF)) >> 8
    high = (short + 0x80) >> 8
    remainder = torch.where(value.isnan(), 0, short - (high << 8))
    param = (high << 16).to(torch.int32).view(torch.float32)
    return torch.where(value.isnan(), value, param).bfloat16(), remainder.to(torch.int8)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values of a bfloat16 parameter and its remainder.

    A parameter that has been set between steps keeps its remainder, at most half an ulp. With 0 or
    infinity that may be the bits of a NaN: it is then the parameter alone.
    """
    words = param.float().view(torch.int32).long() + (remainder.long() << 8)
    result = words.to(torch.int32).view(torch.float32)
    return torch.where(result.isnan(), param.float(), result)


# ---- int8 -------------------------------------------------------------------------------

# A block whose scale is below this is of zeros: the scale's inverse would be infinite.
SMALLEST_SCALE = 1e-37

# Elements that a block may have.
BLOCKS = (256, 128, 64)


def block_length(row_numel: int) -> int:
    """Elements of a block: the most that divide a row. 0: there are none."""
    return next((length for length in BLOCKS if row_numel % length == 0), 0)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 values of codes, of their shape.

    Args:
        codes: int8 of a signed memory, uint8 of exp_avg_sq, contiguous.
        scales: float32, one a block, in the order of the blocks.
    """
    c = _blocks(codes, scales).double()
    scale = scales.double().reshape(-1, 1)
    if codes.dtype == torch.int8:
        values = c * c.abs() * (scale / 127**2)
    else:
        values = ((c / 255) ** 2 * scale) ** 2
    return values.reshape(codes.shape)


def _blocks(tensor: Tensor, scales: Tensor) -> Tensor:
    """[blocks, elements of each]; also of a shard that has none."""
    count = scales.numel()
    return tensor.reshape(count, max(1, tensor.numel() // max(1, count)))


def encode(value: Tensor, codes: Tensor, scales: Tensor, bits: Tensor | None) -> None:
    """Writes values as codes and scales. A block with what is not finite becomes NaN.

    The scale of exp_avg_sq is the largest square root.

    Args:
        value: of the codes' shape, floating-point.
        codes, scales: as `decode` takes them; they are written.
        bits: int64, of which the low 16 round stochastically; None rounds to nearest.
    """
    signed = codes.dtype == torch.int8
    most, power = (127, 2) if signed else (255, 4)
    value = _blocks(value, scales).double()
    magnitude = value.abs() if signed else value.sqrt()
    # NaN where one is, as amax has it.
    scale = magnitude.amax(1, keepdim=True).float().double()
    is_none = scale < SMALLEST_SCALE
    z = torch.where(is_none, 0.0, magnitude / torch.where(is_none, 1.0, scale))
    level = z if signed else z * z
    low = (most * level ** (1 / power)).floor().clamp(0, most)
    part, gap = level * most**power - low**power, (low + 1) ** power - low**power
    chance = 0.5 if bits is None else ((bits & 0xFFFF).double() + 0.5).reshape(z.shape) / 2**16
    code = torch.where(chance * gap < part, low + 1, low).clamp(0, most)
    if signed:
        code = torch.where(value < 0, -code, code)
    else:
        code = torch.where((code == 0) & (z > 0), 1.0, code)
    scales.copy_(torch.where(is_none, 0.0, scale).reshape(scales.shape))
    codes.copy_(code.nan_to_num(0.0).reshape(codes.shape).to(codes.dtype))

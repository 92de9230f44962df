"""How numbers are stored in few bits: adamem_fused/formats.py."""

import math

import pytest
import torch

from adamem_fused import formats

INF = float("inf")


def floats(*words):
    """float32 numbers by their bits."""
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)


def words_of(tensor):
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def bits_for(numel, step=0, key=11):
    return formats.random_bits(
        formats.step_keys(key, step)[0], formats.places(numel, 0, 0, 0, torch.device("cpu"))
    )


def over_the_range():
    """Both signs, from the smallest denormal to the largest that rounds to a finite bfloat16."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(0, 255).repeat_interleave(2)
    exponents = torch.cat([exponents, torch.tensor([0, 0, 0])])
    mantissas = torch.randint(0, 1 << 23, exponents.shape, generator=generator)
    mantissas[-3:] = torch.tensor([1, 0x7FFF, 0x8001])
    signs = torch.randint(0, 2, exponents.shape, generator=generator)
    words = (exponents << 23) | mantissas
    return floats(*(words.clamp(max=0x7F7F0000) - (signs << 31)).tolist())


def is_unbiased(rounded, value, low, high, count):
    """Whether means of `count` roundings are within 5 standard errors of the values."""
    low, high, value = low.double(), high.double(), value.double()
    chance = (value - low) / (high - low)
    error = (high - low).abs() * (chance * (1 - chance)).clamp(min=0).sqrt() / math.sqrt(count)
    return (rounded.double().mean(0) - value).abs() <= 5 * error + 1e-12 * value.abs()


# ---- random bits ----------------------------------------------------------------------


def test_the_bits_are_those_of_the_documented_hash():
    assert formats.mix(0) == 0
    assert formats.mix(1) == 0x5692161D100B05E5
    key = formats.step_keys(formats.tensor_key(7, 3), 41)[0]
    assert 0 <= key < 1 << 64
    bits = formats.random_bits(key, torch.tensor([0, 1, (5 << 32) + 9]))

    def by_hand(place):
        x = (place ^ key) & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x ^= ((place >> 32) + (key >> 32)) & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    assert bits.tolist() == [by_hand(0), by_hand(1), by_hand((5 << 32) + 9)]


def sixteen(bits, of_squares):
    return (bits >> 16 if of_squares else bits) & 0xFFFF


def is_even(counts, expected):
    """Whether a chi-square of so many counts is within 5 of its deviations."""
    degrees = counts.numel() - 1
    square = ((counts.double() - expected) ** 2 / expected).sum().item()
    return abs(square - degrees) <= 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("of_squares", [False, True])
@pytest.mark.parametrize("offset", [0, 1 << 32, (1 << 33) - 60_000, (1 << 62) + 5])
def test_each_bit_is_fair_and_bytes_are_even(of_squares, offset):
    n = 120_000
    for key in (0, 1, 11, (1 << 64) - 1):
        bits = sixteen(formats.random_bits(key, offset + torch.arange(n)), of_squares)
        ones = torch.stack([(bits >> k & 1).sum() for k in range(16)])
        assert ((ones - n / 2).abs() <= 5 * math.sqrt(n) / 2).all()
        for byte in (bits & 0xFF, bits >> 8):
            assert is_even(byte.bincount(minlength=256), n / 256)


def assert_unrelated(one, other):
    """No bit of one tells a bit of the other, nor the high 4 bits together the others' high 4."""
    n = one.numel()
    for k in range(16):
        for shift in (0, 1, 5):
            same = ((one >> k & 1) == (other >> (k + shift) % 16 & 1)).sum().item()
            assert abs(same - n / 2) <= 5 * math.sqrt(n) / 2, (k, shift)
    assert is_even(((one >> 12 << 4) + (other >> 12)).bincount(minlength=256), n / 256)


@pytest.mark.parametrize("of_squares", [False, True])
def test_neighbours_steps_tensors_and_seeds_have_unrelated_bits(of_squares):
    n = 100_000

    def bits(seed=0, index=0, step=0, first=0, param=False):
        key = formats.step_keys(formats.tensor_key(seed, index), step)[param]
        return sixteen(formats.random_bits(key, first + torch.arange(n)), of_squares)

    own = bits()
    for other in (
        bits(first=1),
        bits(first=2),
        bits(first=256),
        bits(first=4096),
        bits(first=(1 << 32) + 1),
        bits(step=1),
        bits(step=2),
        bits(step=1000),
        bits(index=1),
        bits(index=4999),
        bits(seed=1),
        bits(seed=1 << 62),
        bits(param=True),
    ):
        assert_unrelated(own, other)


def test_a_signed_memory_and_exp_avg_sq_have_unrelated_bits():
    bits = bits_for(100_000)
    assert_unrelated(sixteen(bits, False), sixteen(bits, True))


def test_keys_of_tensors_seeds_and_steps_are_all_different():
    keys = [formats.tensor_key(seed, i) for seed in (0, 1, 2, 2**63 - 1) for i in range(1000)]
    of_steps = {key for own in keys[:50] for s in range(100) for key in formats.step_keys(own, s)}
    assert len(set(keys)) == 4000
    assert len(of_steps) == 50 * 100 * 2
    assert all(formats.as_signed(key) & (2**64 - 1) == key for key in keys)
    assert all(-(2**63) <= formats.as_signed(key) < 2**63 for key in keys)


def test_places_of_a_split_are_those_of_the_whole():
    whole = torch.arange(6 * 10).view(6, 10)
    device = torch.device("cpu")
    rows = formats.places(20, 20, 0, 0, device)
    assert torch.equal(rows, whole[2:4].flatten())
    columns = formats.places(6 * 3, 4, 3, 7, device)
    assert torch.equal(columns, whole[:, 4:7].flatten())
    assert formats.places(2, 1 << 40, 0, 0, device).tolist() == [1 << 40, (1 << 40) + 1]
    assert formats.places(0, 0, 0, 0, device).numel() == 0


# ---- bfloat16 -------------------------------------------------------------------------


def bfloat16_neighbours(value):
    """Those towards 0 and away from it."""
    words = value.view(torch.int32).long() & ~0xFFFF
    low = words.to(torch.int32).view(torch.float32)
    high = (words + 0x10000).to(torch.int32).view(torch.float32)
    return low, high


def test_bfloat16_is_unbiased_over_the_whole_range():
    count, value = 10_000, over_the_range()
    bits = bits_for(count * value.numel()).view(count, -1)
    rounded = formats.to_bfloat16(value.expand(count, -1), bits)
    low, high = bfloat16_neighbours(value)
    own = rounded.float()
    assert ((own == low) | (own == high)).all()
    assert is_unbiased(rounded, value, low, high, count).all()


def test_bfloat16_keeps_what_it_has_and_what_is_not_finite():
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    for bits in (0, 0xFFFF):
        kept = formats.to_bfloat16(every.float(), torch.full((1 << 16,), bits))
        is_nan = every.isnan()
        assert torch.equal(words_of(kept)[~is_nan], words_of(every)[~is_nan])
        assert kept[is_nan].isnan().all()


def test_bfloat16_takes_16_bits_and_no_others():
    value = floats(0x3F800001, 0x3F80FFFF)
    up = [formats.to_bfloat16(value, torch.full((2,), b)).tolist() for b in (0, 1, 0xFFFE, 0xFFFF)]
    one, next_up = 1.0, 1.0078125
    assert up == [[one, one], [one, next_up], [one, next_up], [next_up, next_up]]
    high = formats.to_bfloat16(value, torch.full((2,), 0xABCD0000))
    assert high.tolist() == [one, one]


def test_beyond_the_largest_bfloat16_the_neighbour_is_infinity():
    largest = torch.finfo(torch.float32).max
    value = torch.tensor([largest, -largest])
    assert formats.to_bfloat16(value, torch.tensor([0, 0])).isfinite().all()
    assert formats.to_bfloat16(value, torch.tensor([1, 1])).tolist() == [INF, -INF]


# ---- a parameter and its remainder ------------------------------------------------------


def edges():
    """Around each exponent's ends, and around where a remainder or a bfloat16 number turns over."""
    exponents = [e << 23 for e in (0, 1, 2, 64, 126, 127, 128, 200, 253, 254)]
    mantissas = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F00, 0x7F7F, 0x7F80, 0x7FFF, 0x8000]
    mantissas += [0x8001, 0x80FF, 0xFF7F, 0xFF80, 0xFFFF, 0x10000, 0x7FFF00, 0x7FFF7F]
    words = [e + m for e in exponents for m in mantissas]
    return floats(*words, *(word - (1 << 31) for word in words))


def test_a_split_parameter_is_the_float32_one_to_24_bits():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=generator)
    value = torch.cat([words.to(torch.int32).view(torch.float32), edges()])
    value = value[value.isfinite()]
    param, remainder = formats.split(value, None)
    joined = formats.join(param, remainder)
    assert param.dtype == torch.bfloat16
    assert remainder.dtype == torch.int8
    normal = value.abs() >= torch.finfo(torch.float32).tiny
    error = (joined.double() - value.double()).abs()
    # Half of the last of 24 bits, which is one of 2^-15: sign, exponent, 15 bits behind the point.
    assert (error <= value.double().abs() * 2**-16)[normal].all()
    assert (error <= 2.0**-126 * 2**-16)[~normal].all()
    # The parameter alone is the nearest, but where two are as near.
    nearest = (param.double() - joined.double()).abs()
    other = (joined.bfloat16().double() - joined.double()).abs()
    assert (nearest == other)[param.isfinite()].all()


def test_what_is_split_is_restored_bit_for_bit():
    param, remainder = formats.split(edges(), None)
    joined = formats.join(param, remainder)
    for bits in (None, torch.zeros(joined.numel()).long(), torch.full((joined.numel(),), 0xFF)):
        again, rest = formats.split(joined, bits)
        assert torch.equal(words_of(again), words_of(param))
        assert torch.equal(rest, remainder)


def test_splitting_is_unbiased():
    count, value = 10_000, over_the_range()
    bits = bits_for(count * value.numel()).view(count, -1)
    joined = formats.join(*formats.split(value.expand(count, -1), bits))
    words = value.view(torch.int32).long() & ~0xFF
    low, high = ((words + step).to(torch.int32).view(torch.float32).double() for step in (0, 0x100))
    assert is_unbiased(joined, value, low, high, count).all()


def test_splitting_keeps_what_is_not_finite():
    value = torch.tensor([INF, -INF, math.nan])
    for bits in (None, torch.full((3,), 0xFF)):
        param, remainder = formats.split(value, bits)
        assert remainder.tolist() == [0, 0, 0]
        assert param[:2].tolist() == [INF, -INF]
        assert param[2].isnan()
    assert formats.join(torch.tensor([math.nan]).bfloat16(), torch.tensor([5]).char()).isnan()


def test_a_remainder_of_a_parameter_that_was_set_is_at_most_half_an_ulp():
    remainder = torch.arange(-128, 128).to(torch.int8)
    for value in (0.0, -0.0, 1.0, -1.0, 2.0**-126, 3e38, INF, -INF):
        param = torch.full((256,), value).bfloat16()
        joined = formats.join(param, remainder)
        assert not joined.isnan().any(), value
        if math.isfinite(value):
            ulp = max(abs(param[0].item()), 2.0**-126) * 2**-7
            assert ((joined.double() - param.double()).abs() <= ulp / 2).all()
        else:
            assert (joined.abs() > 3e38).all()
            assert (joined.sign() == param.sign()).all()


# ---- int8 -------------------------------------------------------------------------------


def round_trip(value, dtype, bits=None, block=256):
    codes = torch.zeros(value.shape, dtype=dtype)
    scales = torch.zeros(value.numel() // block)
    formats.encode(value, codes, scales, bits)
    return codes, scales, formats.decode(codes, scales)


def gap_of(codes, scales, dtype):
    """From each code's value to the next larger magnitude's, or from the one below."""
    most = 127 if dtype == torch.int8 else 255
    code = codes.long().abs().view(scales.numel(), -1)

    def magnitude(c):
        c = c.double().clamp(0, most) / most
        own = scales.double().unsqueeze(1)
        return c**2 * own if dtype == torch.int8 else c**4 * own**2

    above, below = magnitude(code + 1) - magnitude(code), magnitude(code) - magnitude(code - 1)
    return torch.maximum(above, below).view(codes.shape)


def blocks():
    """Random ones, and those that a scale serves badly."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(64, 256, generator=generator)
    own = [normal, normal * torch.randn(64, 1, generator=generator).mul(10).exp()]
    own.append(normal * (normal * 8).exp())  # some 20 orders of magnitude in a block
    huge = normal[:1].clone() * 1e-8
    huge[0, 17] = 3e30
    tiny = normal[:1] * 1e-30
    denormal = normal[:1] * 1e-40
    spread = torch.logspace(-36, 30, 256).unsqueeze(0)
    constant = torch.full((1, 256), 0.3)
    zero = torch.zeros(1, 256)
    one = zero.clone()
    one[0, 255] = -2.5
    largest = torch.full((1, 256), torch.finfo(torch.float32).max)
    return torch.cat([*own, huge, tiny, denormal, spread, constant, zero, one, largest])


@pytest.mark.parametrize("block", formats.BLOCKS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_round_trip_is_within_a_step_of_the_code(dtype, block, stochastic):
    value = blocks() if dtype == torch.int8 else blocks().double().square().float()
    value = value[value.isfinite().all(1)]
    bits = bits_for(value.numel()).view(value.shape) if stochastic else None
    codes, scales, decoded = round_trip(value, dtype, bits, block)
    assert decoded.isfinite().all()
    error = (decoded - value.double()).abs()
    bound = gap_of(codes, scales, dtype) * (1 if stochastic else 0.5)
    least = value.new_tensor(formats.SMALLEST_SCALE if dtype == torch.int8 else 0.0).double()
    if dtype == torch.uint8 and not stochastic:  # what is not 0 has code 1 at least
        bound = torch.where(codes == 1, 2 * bound, bound)
    rounding = value.double().abs() * 1e-6
    assert (error <= torch.maximum(bound + rounding, least)).all()
    assert ((decoded == 0) | (decoded.sign() == value.sign())).all()
    assert (decoded[value == 0] == 0).all()
    if dtype == torch.uint8:
        assert (codes[value > 0] > 0).all()
        assert (decoded[value > 0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_keep_their_values(dtype):
    every = torch.arange(-127, 128) if dtype == torch.int8 else torch.arange(256)
    codes = torch.cat([every, every[-1:].expand(256 - every.numel())]).to(dtype)
    for scale in (1.0, 1.7e-30, 2.9e-5, 3.1e30 if dtype == torch.int8 else 1.3e15):
        scales = torch.tensor([scale])
        value = formats.decode(codes, scales)
        for bits in (None, torch.zeros(256).long(), torch.full((256,), 0xFFFF)):
            again, own, _ = round_trip(value, dtype, bits)
            assert torch.equal(again, codes)
            assert torch.equal(own, scales)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_unbiased(dtype):
    count = 10_000
    level = torch.cat([torch.linspace(0, 1, 40), torch.logspace(-12, 0, 24)])
    sign = 1 if dtype == torch.uint8 else torch.tensor([1, -1]).repeat(32)
    value = (level * 3e-4 * sign).double()
    value[63] = 3e-4
    own = value.repeat(count)  # blocks of 64
    codes, scales, decoded = round_trip(
        own.view(count, 64), dtype, bits_for(own.numel()).view(count, 64), 64
    )
    assert (scales == scales[0]).all()
    most, power = (127, 2) if dtype == torch.int8 else (255, 4)
    largest = formats.decode(codes[:1], scales[:1]).abs().max().item()
    low = (most * (level.double() * 3e-4 / largest) ** (1 / power)).floor().clamp(max=most - 1)
    ends = [((low + k) / most) ** power * largest * sign for k in (0, 1)]
    is_fair = is_unbiased(decoded, value, *ends, count)
    # Half of the last of 16 random bits, of a step.
    bias = (decoded.mean(0) - value).abs() <= (ends[1] - ends[0]).abs() * 2**-16
    if dtype == torch.uint8:  # which of the smallest are 1 and not 0
        is_fair |= (low == 0) & (decoded.mean(0) >= value)
    assert (is_fair | bias).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_block_with_what_is_not_finite_is_nan_and_no_other(dtype, bad):
    value = torch.rand(4, 256)
    value[1, 3], value[2, 0] = bad, bad
    value[2, 1:] = 0.0
    bits = bits_for(value.numel()).view(value.shape)
    codes, scales, decoded = round_trip(value, dtype, bits)
    assert decoded[1].isnan().all()
    assert decoded[2].isnan().all()
    assert decoded[[0, 3]].isfinite().all()
    again = round_trip(decoded, dtype, bits)
    assert again[2][1:3].isnan().all()
    assert torch.equal(again[0][[0, 3]], codes[[0, 3]])
    assert torch.equal(again[1][[0, 3]], scales[[0, 3]])


def test_blocks_are_the_longest_that_divide_a_row():
    lengths = {768: 256, 128: 128, 64: 64, 384: 128, 576: 64, 147: 0, 32: 0, 50257: 0}
    assert {row: formats.block_length(row) for row in lengths} == lengths

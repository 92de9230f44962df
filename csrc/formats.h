// How a memory or a parameter is stored in fewer bits than the arithmetic has: the formats of
// adamem_fused/formats.py, which says what they are and why.
//
// One text for the CPU and for CUDA, as in am_math.h. O gives the lanes: types Float and Word, of
// 32 bits each, and
//   Word bits(Float), Float floats(Word)         the same bits
// Words of 16 or 8 bits are the low ones of a Word, and of a signed one its high bits do not count.
// Conditions are what `?:` of Float and Word takes.
//
// Codes are worked out in V, a float or a pack of them, as in am_math.h.
#pragma once

#include <cstdint>

#include "am_math.h"

namespace am {

// ---- random bits --------------------------------------------------------------------

// A hash of 64 bits: the finalizer of Steele, Lea & Flood's SplitMix64 (OOPSLA 2014).
AM_INLINE uint64_t mix(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

// A tensor's keys in a step, and those of a repair, which rounds a second time.
struct StepKeys {
  uint64_t memories, param, repaired_memories, repaired_param;
};

// step: the number of steps before this one.
AM_INLINE StepKeys step_keys(int64_t key, double step) {
  StepKeys keys;
  keys.memories = mix(static_cast<uint64_t>(key) ^ (static_cast<uint64_t>(step) + 1));
  keys.param = mix(keys.memories);
  keys.repaired_memories = mix(keys.param);
  keys.repaired_param = mix(keys.repaired_memories);
  return keys;
}

// Of the elements at these places in the whole tensor, whose halves low and high are. The low 16
// bits are for a signed memory and for a parameter, the high ones for exp_avg_sq.
template <class Word>
AM_INLINE Word random_bits(uint64_t key, Word low, Word high) {
  Word x = low ^ static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = x ^ (high + static_cast<uint32_t>(key >> 32));
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// ---- bfloat16 -----------------------------------------------------------------------

constexpr uint32_t kQuietNaN = 0x7FC0;  // of bfloat16

// The 16 bits of one of the two neighbours. random: of which the low 16 bits count.
template <class O>
AM_INLINE typename O::Word to_bfloat16(typename O::Float value, typename O::Word random) {
  using Word = typename O::Word;
  const Word rounded = (O::bits(value) + (random & 0xFFFFu)) >> 16;
  return value == value ? rounded : Word{} + kQuietNaN;
}

// ---- a bfloat16 parameter and its remainder -----------------------------------------

template <class Word>
struct Halves {
  Word param, remainder;  // the bits of a bfloat16, and of an int8
};

// added: 0x80 to round to nearest, or 8 random bits.
template <class O>
AM_INLINE Halves<typename O::Word> split(typename O::Float value, typename O::Word added) {
  using Word = typename O::Word;
  // The sign bit shifted in is lost again: of 24 bits, and of the 16 above the remainder.
  const Word shortened = (O::bits(value) + added) >> 8;
  const Word param = (shortened + 0x80u) >> 8;
  const Word remainder = shortened - (param << 8);
  return {value == value ? param : Word{} + kQuietNaN, value == value ? remainder : Word{}};
}

// remainder: of which the low 8 bits count, and are signed. Where a parameter has been set between
// steps, to 0 or infinity, the two may be the bits of a NaN: then it is the parameter alone.
template <class O>
AM_INLINE typename O::Float join(typename O::Word param, typename O::Word remainder) {
  using Word = typename O::Word;
  const Word high = param << 16;
  const Word is_negative = (remainder >> 7) & 1u;
  const Word added = ((remainder & 0xFFu) << 8) - (is_negative << 16);
  const auto value = O::floats(high + added);
  return value == value ? value : O::floats(high);
}

// ---- int8 ---------------------------------------------------------------------------

// A block whose largest magnitude is below this is of zeros: its inverse would be infinite.
constexpr float kSmallestScale = 1e-37f;

// 1 / scale, with which a block's magnitudes are multiplied.
AM_INLINE float inverse_scale(float scale) { return scale < kSmallestScale ? 0.0f : 1.0f / scale; }

// What a signed memory's code, c in [-127, 127], stands for. part: scale / 127^2, of the block.
template <class Float>
AM_INLINE Float decode_signed(Float code, Float magnitude, float part) {
  return code * magnitude * part;
}

// exp_avg_sq by its code, c in [0, 255]. part: scale / 255^2, of the block.
template <class Float>
AM_INLINE Float decode_square(Float code, float part) {
  const Float root = code * code * part;
  return root * root;
}

// For float; a pack of lanes brings its own.

// 1 / sqrt, to a part in 2,000: of 0 infinity or NaN, and so maybe of what has too few bits.
AM_INLINE float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / std::sqrt(x);
#endif
}

// The nearest whole number, of one below 2^22: beside 1.5 * 2^23 no fraction is left.
AM_INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// b where a is NaN.
AM_INLINE float larger(float a, float b) { return a > b ? a : b; }
AM_INLINE float smaller(float a, float b) { return a < b ? a : b; }

AM_INLINE float where_less(float a, float b, float x, float y) { return a < b ? x : y; }

// 16 random bits, a whole number here, as a chance in (0, 1).
template <class V>
AM_INLINE V chance_of(V random) {
  return fma(random, V(0x1p-16f), V(0x1p-17f));
}

// The code whose k-th power stands for `level`, rounded by chance c: the largest q, or 0, with
//   (q - 1)^k + c (q^k - (q - 1)^k) < level
// 0 where level is NaN. root: level^(1/k), to a quarter: an exact square root takes longer than all
// else here. The real q for which the two sides are equal lies between root + 1 - c and a half less
// (0.25 for k = 2, 0.48 for k = 4), which leaves two whole numbers, and the inequality decides.
template <int k, class V>
AM_INLINE V rounded_code(V level, V root, V c) {
  static_assert(k == 2 || k == 4);
  const V one(1.0f), q = larger(nearest(root + (V(0.75f) - c)), one), p = q - one;
  V high = q * q, low = p * p;
  if (k == 4) {
    high = high * high;
    low = low * low;
  }
  return where_less(fma(c, high - low, low), level, q, p);
}

// The magnitude of a signed memory's code. inverse: 1 / scale, of the block.
template <class V>
AM_INLINE V signed_code(V magnitude, float inverse, V c) {
  const V level = magnitude * V(inverse) * V(16129.0f);  // 127^2
  const V root = level * inverse_root(larger(level, V(1e-30f)));
  return smaller(rounded_code<2>(level, root, c), V(127.0f));
}

// A code of exp_avg_sq, whose scale is a square root.
template <class V>
AM_INLINE V square_code(V v, float inverse, V c) {
  const V level = v * V(inverse) * V(inverse * 4228250625.0f);  // 255^4
  const V code = rounded_code<4>(level, inverse_root(inverse_root(level)), c);
  const V one(inverse > 0.0f ? 1.0f : 0.0f);  // of an infinite scale all are 0, and so NaN
  const V least = where_less(V(0.0f), v, one, V(0.0f));
  return smaller(larger(code, least), V(255.0f));
}

}  // namespace am

// How a memory or a parameter is stored in fewer bits than the arithmetic has: the formats of
// adamem_fused/formats.py, which says what they are and why.
//
// One text for the CPU and for CUDA, as in am_math.h. O gives the lanes: types Float and Word, of
// 32 bits each, and
//   Word bits(Float), Float floats(Word)         the same bits
//   Float to_float(Word)                         the number, below 2^24
//   Word to_word(Float)                          without its fraction, of [0, 2^24)
//   Float sqrt(Float)
// Words of 16 or 8 bits are the low ones of a Word, and of a signed one its high bits do not count.
// Conditions are what `?:` of Float and Word takes.
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

// 16 random bits as a number in (0, 1).
template <class O>
AM_INLINE typename O::Float chance(typename O::Word random) {
  return (O::to_float(random & 0xFFFFu) + 0.5f) * 0x1p-16f;
}

// The magnitude of a signed memory's code is the whole part of this, and 127 at most; NaN stands
// for 0. level: |d| / scale, in [0, 1].
//
// With t = 127^2 level and chance c it is the largest q, or 0, with
//   (q - 1)^2 + c (q^2 - (q - 1)^2) < t     or     (q - 1 + c)^2 + c (1 - c) < t
// and so the whole part of sqrt(t - c (1 - c)) + 1 - c.
template <class O>
AM_INLINE typename O::Float signed_code(typename O::Float level, typename O::Word random) {
  using Float = typename O::Float;
  const Float c = chance<O>(random), rest = 1.0f - c;
  return O::sqrt(level * 16129.0f - c * rest) + rest;
}

template <class O>
AM_INLINE typename O::Word encode_signed(typename O::Float level, typename O::Word random) {
  using Float = typename O::Float;
  using Word = typename O::Word;
  const Float own = signed_code<O>(level, random);
  const Word code = O::to_word(own > 0.0f ? own : Float{});
  return code > 127u ? Word{} + 127u : code;
}

// A code of exp_avg_sq. root: sqrt(v) / scale, in [0, 1].
template <class O>
AM_INLINE typename O::Word encode_square(typename O::Float root, typename O::Word random) {
  using Float = typename O::Float;
  using Word = typename O::Word;
  const Word low = O::to_word(O::sqrt(root) * 255.0f);
  const Float q = O::to_float(low), next = q + 1.0f;
  const Float q2 = q * q, next2 = next * next;
  const Float part = root * root * 4228250625.0f - q2 * q2, gap = next2 * next2 - q2 * q2;
  const Word code = chance<O>(random) * gap < part ? low + 1u : low;
  const Word least = root > 0.0f ? Word{} + 1u : Word{};
  const Word above = code < least ? least : code;
  return above > 255u ? Word{} + 255u : above;
}

}  // namespace am

// What is stored in few bits: the formats of ../formats.h, an element a lane.
#pragma once

#include "../formats.h"
#include "pieces.h"
#include "tables.h"

namespace am::cuda {

// The stored types that are none of C++'s.
struct Param16 {};  // a bfloat16 parameter: rounded to nearest or stochastically, or with remainder
struct Rounded {};  // a memory in bfloat16
struct Codes {};    // a memory in 8 bits, with scales

template <class S>
constexpr bool kIsLow =
    std::is_same_v<S, Param16> || std::is_same_v<S, Rounded> || std::is_same_v<S, Codes>;

struct Lane {
  using Float = float;
  using Word = uint32_t;

  static __device__ Word bits(Float f) { return __float_as_uint(f); }
  static __device__ Float floats(Word w) { return __uint_as_float(w); }
};

// A whole number below 2^23 as a float, by the bits of 2^23 and it: an instruction that converts is
// issued at a quarter of the rate.
__device__ __forceinline__ float to_float(uint32_t word) {
  return Lane::floats(word | 0x4B000000u) - 8388608.0f;
}
// Of the eight bits of a signed one.
__device__ __forceinline__ float signed_to_float(uint8_t byte) {
  return Lane::floats((byte ^ 0x80u) | 0x4B000000u) - 8388736.0f;  // 2^23 + 2^7
}
// One of at most 255.
__device__ __forceinline__ uint8_t to_byte(float whole) {
  return static_cast<uint8_t>(Lane::bits(whole + 8388608.0f));
}

// ---- random bits ------------------------------------------------------------------

// Where a unit's random bits are from in this step, as prepare finds it: see formats.h, and
// Packed.rounding of adamem_fused/backends/batch.py.
struct Rounding {
  StepKeys keys;
  int64_t offset, stretch, skip, rounds;
  double inverse;  // 1 / stretch

  // step: the number of steps before this one.
  static __device__ Rounding of(const Step& s, int64_t unit, double step) {
    const int64_t stretch = layout_at(s, kStretch, unit);
    return {step_keys(layout_at(s, kKey, unit), step),
            layout_at(s, kOffset, unit),
            stretch,
            layout_at(s, kSkip, unit),
            layout_at(s, kRounds, unit),
            1.0 / static_cast<double>(stretch)};
  }

  // For a repair of what has been rounded.
  __device__ void set_repaired() {
    keys.memories = keys.repaired_memories;
    keys.param = keys.repaired_param;
  }
};

template <int kCount>
struct Random {
  uint32_t words[kCount];
};

__device__ __forceinline__ uint32_t random_at(uint64_t key, int64_t place) {
  return random_bits(key, static_cast<uint32_t>(place),
                     static_cast<uint32_t>(static_cast<uint64_t>(place) >> 32));
}

// Those of a piece's elements. begin: the place of the run's first one in the tensor that is here.
template <class Own>
__device__ __forceinline__ Random<Own::kCount> random_of(const Rounding& from, uint64_t key,
                                                         int64_t begin, Own piece) {
  Random<Own::kCount> random;
  const int64_t stretch = from.stretch;
#pragma unroll
  for (int first = 0; first < Own::kCount; first += Own::kSpan) {
    const int64_t i = begin + piece.at(first);
    int64_t place = from.offset + i;
    if (stretch == 0) {
#pragma unroll
      for (int j = 0; j < Own::kSpan; ++j) random.words[first + j] = random_at(key, place + j);
    } else {
      // A division of int64 takes too many registers.
      int64_t before = static_cast<int64_t>(static_cast<double>(i) * from.inverse);
      int64_t left = (before + 1) * stretch - i;
      if (left > stretch) {
        --before;
        left -= stretch;
      } else if (left <= 0) {
        ++before;
        left += stretch;
      }
      place += before * from.skip;
#pragma unroll
      for (int j = 0; j < Own::kSpan; ++j) {
        random.words[first + j] = random_at(key, place + j);
        if (--left > 0) continue;
        place += from.skip;
        left = stretch;
      }
    }
  }
  return random;
}

// ---- columns, see elements.h ------------------------------------------------------

template <>
struct Column<float, Rounded> {
  static constexpr int kBytes = 2;

  uint16_t* data;

  static __device__ Column at(int64_t address, int64_t begin, int32_t) {
    return {reinterpret_cast<uint16_t*>(address) + begin};
  }

  __device__ bool is_aligned() const { return is_multiple(data, 16); }

  template <Use kUse, class Own>
  __device__ __forceinline__ void load(Own piece, float (&out)[Own::kCount]) const {
    Raw<uint16_t, Own> raw;
    raw.template read<kUse>(data, piece);
#pragma unroll
    for (int j = 0; j < Own::kCount; ++j)
      out[j] = Lane::floats(static_cast<uint32_t>(raw.elements[j]) << 16);
  }

  template <class Own>
  __device__ __forceinline__ void prefetch(Own piece, int ahead) const {
    am::cuda::prefetch(data + ahead, piece);
  }

  // random: of which the low 16 bits count.
  template <class Own>
  __device__ __forceinline__ void store(Own piece, const float (&in)[Own::kCount],
                                        const Random<Own::kCount>& random) const {
    Raw<uint16_t, Own> raw;
#pragma unroll
    for (int j = 0; j < Own::kCount; ++j)
      raw.elements[j] = static_cast<uint16_t>(to_bfloat16<Lane>(in[j], random.words[j]));
    raw.write(data, piece);
  }
};

template <>
struct Column<float, Param16> {
  static constexpr int kBytes = 2;

  uint16_t* data;
  int8_t* remainder;  // null: there is none

  static __device__ Column at(int64_t address, int64_t begin, int32_t) {
    return {reinterpret_cast<uint16_t*>(address) + begin, nullptr};
  }

  __device__ bool is_aligned() const { return is_multiple(data, 16) && is_multiple(remainder, 8); }

  template <Use kUse, class Own>
  __device__ __forceinline__ void load(Own piece, float (&out)[Own::kCount]) const {
    Raw<uint16_t, Own> raw;
    raw.template read<kUse>(data, piece);
    if (remainder == nullptr) {
#pragma unroll
      for (int j = 0; j < Own::kCount; ++j)
        out[j] = Lane::floats(static_cast<uint32_t>(raw.elements[j]) << 16);
    } else {
      Raw<uint8_t, Own> rest;
      rest.template read<kUse>(reinterpret_cast<const uint8_t*>(remainder), piece);
#pragma unroll
      for (int j = 0; j < Own::kCount; ++j) out[j] = join<Lane>(raw.elements[j], rest.elements[j]);
    }
  }

  template <class Own>
  __device__ __forceinline__ void prefetch(Own piece, int ahead) const {
    am::cuda::prefetch(data + ahead, piece);
    if (remainder != nullptr) am::cuda::prefetch(remainder + ahead, piece);
  }

  // random: the parameter's bits; none, and it is rounded to nearest.
  template <class Own>
  __device__ __forceinline__ void store(Own piece, const float (&in)[Own::kCount], bool rounds,
                                        const Random<Own::kCount>& random) const {
    Raw<uint16_t, Own> raw;
    if (remainder == nullptr) {
#pragma unroll
      for (int j = 0; j < Own::kCount; ++j) {
        // To nearest, ties to even.
        const uint32_t half = 0x7FFFu + (Lane::bits(in[j]) >> 16 & 1u);
        const uint32_t added = rounds ? random.words[j] : half;
        raw.elements[j] = static_cast<uint16_t>(to_bfloat16<Lane>(in[j], added));
      }
    } else {
      Raw<uint8_t, Own> rest;
#pragma unroll
      for (int j = 0; j < Own::kCount; ++j) {
        const Halves<uint32_t> halves =
            split<Lane>(in[j], rounds ? random.words[j] & 0xFFu : 0x80u);
        raw.elements[j] = static_cast<uint16_t>(halves.param);
        rest.elements[j] = static_cast<uint8_t>(halves.remainder);
      }
      rest.write(reinterpret_cast<uint8_t*>(remainder), piece);
    }
    raw.write(data, piece);
  }
};

// A block of codes is of one piece of the lanes that share it, in a span or over all of them: it
// has 256 elements at most, and a thread 8 of a piece. See Spans.
template <>
struct Column<float, Codes> {
  static constexpr int kBytes = 2;  // as many as give a thread 8 elements

  uint8_t* data;
  float* scales;  // from that of the run's first block on
  int shift;      // a block has 2^shift elements

  static __device__ Column at(int64_t address, int64_t begin, int32_t) {
    return {reinterpret_cast<uint8_t*>(address) + begin, nullptr, 0};
  }

  __device__ void set_scales(int64_t address, int64_t begin, int64_t block) {
    shift = 31 - __clz(static_cast<int>(block));
    scales = reinterpret_cast<float*>(address) + (begin >> shift);
  }

  __device__ bool is_aligned() const { return is_multiple(data, 8); }

  template <Use kUse, class Own>
  __device__ __forceinline__ void load(Own piece, bool is_square, float (&out)[Own::kCount]) const {
    constexpr int kSpan = Own::kSpan;
    Raw<uint8_t, Own> raw;
    raw.template read<kUse>(data, piece);
#pragma unroll
    for (int first = 0; first < Own::kCount; first += kSpan) {
      const float scale = piece.has(first) ? scales[piece.at(first) >> shift] : 0.0f;
#pragma unroll
      for (int j = first; j < first + kSpan; ++j) {
        if (is_square) {
          const float code = to_float(raw.elements[j]);
          out[j] = decode_square(code, scale * (1.0f / (255 * 255)));
        } else {
          const float code = signed_to_float(raw.elements[j]);
          out[j] = decode_signed(code, fabsf(code), scale * (1.0f / (127 * 127)));
        }
      }
    }
  }

  template <class Own>
  __device__ __forceinline__ void prefetch(Own piece, int ahead) const {
    am::cuda::prefetch(data + ahead, piece);
  }

  // All lanes of the piece come here. random: of which the low 16 bits count.
  template <class Own>
  __device__ __forceinline__ void store(Own piece, bool is_square, const float (&in)[Own::kCount],
                                        const Random<Own::kCount>& random) const {
    constexpr int kSpan = Own::kSpan, kSpans = Own::kCount / kSpan;
    uint32_t most[kSpans] = {};
#pragma unroll
    for (int j = 0; j < Own::kCount; ++j) {
      // Magnitudes, in the order of positive numbers, with NaN above all of them.
      const uint32_t word = Lane::bits(in[j]) & 0x7FFFFFFFu;
      if (piece.has(j) && word > most[j / kSpan]) most[j / kSpan] = word;
    }
    const int wanted = (1 << shift) / kSpan;
    const int lanes = wanted < piece.width ? wanted : piece.width;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (uint32_t& own : most) {
        const uint32_t other = __shfl_xor_sync(piece.lanes(), own, offset);
        own = other > own ? other : own;
      }
    }
    if (wanted > piece.width) {
#pragma unroll
      for (int s = 1; s < kSpans; ++s) most[0] = most[s] > most[0] ? most[s] : most[0];
#pragma unroll
      for (int s = 1; s < kSpans; ++s) most[s] = most[0];
    }
    Raw<uint8_t, Own> raw;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      const float largest = Lane::floats(most[s]);
      const float scale = is_square ? root_of(largest) : largest;
      const float inverse = inverse_scale(scale);
#pragma unroll
      for (int j = s * kSpan; j < (s + 1) * kSpan; ++j) {
        const float chance = chance_of(to_float(random.words[j] & 0xFFFFu));
        if (is_square) {
          raw.elements[j] = to_byte(square_code(in[j], inverse, chance));
        } else {
          const uint8_t code = to_byte(signed_code(fabsf(in[j]), inverse, chance));
          raw.elements[j] = in[j] < 0.0f ? 0u - code : code;
        }
      }
      const int k = piece.at(s * kSpan);
      // The thread that has the block's first element.
      if (piece.has(s * kSpan) && (k & ((1 << shift) - 1)) == 0)
        scales[k >> shift] = scale < kSmallestScale ? 0.0f : scale;
    }
    raw.write(data, piece);
  }
};

}  // namespace am::cuda

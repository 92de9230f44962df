// Pack<T>: 64 bytes of lanes, as one AVX-512 register, two of AVX2 or four of the
// baseline. The number of lanes is the same on each, and so are a sum's bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Everything here has internal linkage, see AM_INLINE.
#include "../am_math.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <class T>
using Register = typename VectorOf<T, kRegisterBytes>::type;

template <class T>
struct Pack {
  static constexpr int kLanes = 64 / sizeof(T);
  static constexpr int kRegisters = 64 / kRegisterBytes;
  static constexpr int kRegisterLanes = kRegisterBytes / sizeof(T);
  Register<T> r[kRegisters];
};

template <class T>
AM_INLINE Pack<T> broadcast(T s) {
  Pack<T> out;
  for (int k = 0; k < Pack<T>::kRegisters; ++k) out.r[k] = Register<T>{} + s;
  return out;
}

#define AM_PACK_OPERATOR(op)                                                     \
  template <class T>                                                             \
  AM_INLINE Pack<T> operator op(Pack<T> a, Pack<T> b) {                          \
    Pack<T> out;                                                                 \
    for (int k = 0; k < Pack<T>::kRegisters; ++k) out.r[k] = a.r[k] op b.r[k];   \
    return out;                                                                  \
  }                                                                              \
  template <class T>                                                             \
  AM_INLINE Pack<T> operator op(Pack<T> a, T b) {                                \
    return a op broadcast(b);                                                    \
  }                                                                              \
  template <class T>                                                             \
  AM_INLINE Pack<T> operator op(T a, Pack<T> b) {                                \
    return broadcast(a) op b;                                                    \
  }
AM_PACK_OPERATOR(+)
AM_PACK_OPERATOR(-)
AM_PACK_OPERATOR(*)
AM_PACK_OPERATOR(/)
#undef AM_PACK_OPERATOR

#if defined(__AVX512F__)
AM_INLINE Register<float> register_sqrt(Register<float> x) {
  return (Register<float>)_mm512_sqrt_ps((__m512)x);
}
AM_INLINE Register<double> register_sqrt(Register<double> x) {
  return (Register<double>)_mm512_sqrt_pd((__m512d)x);
}
#elif defined(__AVX2__)
AM_INLINE Register<float> register_sqrt(Register<float> x) {
  return (Register<float>)_mm256_sqrt_ps((__m256)x);
}
AM_INLINE Register<double> register_sqrt(Register<double> x) {
  return (Register<double>)_mm256_sqrt_pd((__m256d)x);
}
#elif defined(__x86_64__)
AM_INLINE Register<float> register_sqrt(Register<float> x) {
  return (Register<float>)_mm_sqrt_ps((__m128)x);
}
AM_INLINE Register<double> register_sqrt(Register<double> x) {
  return (Register<double>)_mm_sqrt_pd((__m128d)x);
}
#else
template <class R>
AM_INLINE R register_sqrt(R x) {
  for (unsigned l = 0; l < sizeof(R) / sizeof(x[0]); ++l) x[l] = std::sqrt(x[l]);
  return x;
}
#endif

template <class T>
AM_INLINE Pack<T> sqrt(Pack<T> a) {
  for (int k = 0; k < Pack<T>::kRegisters; ++k) a.r[k] = register_sqrt(a.r[k]);
  return a;
}

// Stored types. Conversions round to nearest, ties to even, as torch's do.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using Half = VectorOf<uint16_t, kRegisterBytes / 2>::type;  // a register's worth of 16 bits
using Word = Register<uint32_t>;

AM_INLINE Register<float> widen(Half h, BFloat16) {
  return (Register<float>)(__builtin_convertvector(h, Word) << 16);
}

AM_INLINE Half narrow(Register<float> f, BFloat16) {
  const Word u = (Word)f;
  const Word rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const Word quiet_nan = Word{} + 0x7FC0;
  return __builtin_convertvector(f == f ? rounded : quiet_nan, Half);
}

#if defined(__AVX512F__)
AM_INLINE Register<float> widen(Half h, Float16) {
  return (Register<float>)_mm512_cvtph_ps((__m256i)h);
}
AM_INLINE Half narrow(Register<float> f, Float16) {
  return (Half)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
AM_INLINE Register<float> widen(Half h, Float16) {
  return (Register<float>)_mm256_cvtph_ps((__m128i)h);
}
AM_INLINE Half narrow(Register<float> f, Float16) {
  return (Half)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
}
#else
AM_INLINE Register<float> widen(Half h, Float16) {
  const Word bits = __builtin_convertvector(h, Word);
  const Word magnitude = bits & 0x7FFF;
  // The exponent's bias moves by 112; the multiplication does subnormals too.
  const Register<float> finite = (Register<float>)(magnitude << 13) * 0x1p112f;
  const Word inf_or_nan = (magnitude << 13) | 0x7F800000u;
  const Word result = magnitude < 0x7C00 ? (Word)finite : inf_or_nan;
  return (Register<float>)(result | ((bits & 0x8000) << 16));
}
AM_INLINE Half narrow(Register<float> f, Float16) {
  const Word u = (Word)f;
  const Word magnitude = u & 0x7FFFFFFF;
  // Below 2^-14 the result is subnormal: adding 0.5 leaves it in the low bits, rounded.
  const Word subnormal = (Word)((Register<float>)magnitude + 0.5f) - 0x3F000000;
  const Word normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13;
  const Word infinity = Word{} + 0x7C00;
  const Word nan = Word{} + 0x7E00;
  Word result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude < 0x47800000 ? result : infinity;
  result = magnitude > 0x7F800000 ? nan : result;
  return __builtin_convertvector(result | ((u >> 16) & 0x8000), Half);
}
#endif

template <class T>
AM_INLINE Pack<T> load(const T* p) {
  Pack<T> out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

template <class T>
AM_INLINE void store(T* p, Pack<T> a) {
  std::memcpy(p, &a, sizeof(a));
}

template <class S>
AM_INLINE Pack<float> load_16bit(const S* p) {
  Pack<float> out;
  for (int k = 0; k < Pack<float>::kRegisters; ++k) {
    Half h;
    std::memcpy(&h, p + k * Pack<float>::kRegisterLanes, sizeof(h));
    out.r[k] = widen(h, S{});
  }
  return out;
}

template <class S>
AM_INLINE void store_16bit(S* p, Pack<float> a) {
  for (int k = 0; k < Pack<float>::kRegisters; ++k) {
    const Half h = narrow(a.r[k], S{});
    std::memcpy(p + k * Pack<float>::kRegisterLanes, &h, sizeof(h));
  }
}

AM_INLINE Pack<float> load(const BFloat16* p) { return load_16bit(p); }
AM_INLINE Pack<float> load(const Float16* p) { return load_16bit(p); }
AM_INLINE void store(BFloat16* p, Pack<float> a) { store_16bit(p, a); }
AM_INLINE void store(Float16* p, Pack<float> a) { store_16bit(p, a); }

}  // namespace

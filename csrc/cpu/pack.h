// Pack<T>: 64 bytes of lanes, as one AVX-512 register, two of AVX2, or four of NEON or of
// the baseline. The number of lanes is the same on each, and the first three have the same
// operations, each rounded once: they give the same bits, but for the sign and the payload of
// a NaN. The baseline has no fused multiply-add and gives its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

template <class T, int R = 64 / kRegisterBytes>
struct Pack {
  static constexpr int kLanes = R * kRegisterBytes / sizeof(T);
  static constexpr int kRegisters = R;
  static constexpr int kRegisterLanes = kRegisterBytes / sizeof(T);
  Register<T> r[kRegisters];

  Pack() = default;
  __attribute__((always_inline)) explicit Pack(T s) {
    for (Register<T>& lanes : r) lanes = Register<T>{} + s;
  }
};

#define AM_PACK_OPERATOR(op)                                     \
  template <class T, int R>                                      \
  AM_INLINE Pack<T, R> operator op(Pack<T, R> a, Pack<T, R> b) { \
    Pack<T, R> out;                                              \
    for (int k = 0; k < R; ++k) out.r[k] = a.r[k] op b.r[k];     \
    return out;                                                  \
  }
AM_PACK_OPERATOR(+)
AM_PACK_OPERATOR(-)
AM_PACK_OPERATOR(*)
AM_PACK_OPERATOR(/)
#undef AM_PACK_OPERATOR

// sqrt, and a * b + c: rounded once where the instruction set has it.
#if defined(__AVX512F__)
AM_INLINE __m512 register_sqrt(__m512 x) { return _mm512_sqrt_ps(x); }
AM_INLINE __m512d register_sqrt(__m512d x) { return _mm512_sqrt_pd(x); }
AM_INLINE __m512 register_fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
AM_INLINE __m512d register_fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
AM_INLINE __m256 register_sqrt(__m256 x) { return _mm256_sqrt_ps(x); }
AM_INLINE __m256d register_sqrt(__m256d x) { return _mm256_sqrt_pd(x); }
AM_INLINE __m256 register_fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
AM_INLINE __m256d register_fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
using Floats = Register<float>;
using Doubles = Register<double>;
AM_INLINE Floats register_sqrt(Floats x) { return (Floats)vsqrtq_f32((float32x4_t)x); }
AM_INLINE Doubles register_sqrt(Doubles x) { return (Doubles)vsqrtq_f64((float64x2_t)x); }
AM_INLINE Floats register_fma(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
AM_INLINE Doubles register_fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class R>
AM_INLINE R register_sqrt(R x) {
  for (unsigned l = 0; l < sizeof(R) / sizeof(x[0]); ++l) x[l] = std::sqrt(x[l]);
  return x;
}
template <class R>
AM_INLINE R register_fma(R a, R b, R c) {
  return a * b + c;
}
#endif

template <class T, int R>
AM_INLINE Pack<T, R> sqrt(Pack<T, R> a) {
  for (int k = 0; k < R; ++k) a.r[k] = register_sqrt(a.r[k]);
  return a;
}

template <class T, int R>
AM_INLINE Pack<T, R> fma(Pack<T, R> a, Pack<T, R> b, Pack<T, R> c) {
  for (int k = 0; k < R; ++k) a.r[k] = register_fma(a.r[k], b.r[k], c.r[k]);
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

// GCC 12 makes several instructions of a conversion that is one: 6 % of a step with bfloat16
// (AVX2; for NEON it takes lane by lane).
#if defined(__AVX512F__)
AM_INLINE Word as_words(Half h) { return (Word)_mm512_cvtepu16_epi32((__m256i)h); }
#elif defined(__AVX2__)
AM_INLINE Word as_words(Half h) { return (Word)_mm256_cvtepu16_epi32((__m128i)h); }
#elif defined(__aarch64__)
AM_INLINE Word as_words(Half h) { return (Word)vmovl_u16((uint16x4_t)h); }
#else
AM_INLINE Word as_words(Half h) { return __builtin_convertvector(h, Word); }
#endif

AM_INLINE Register<float> widen(Half h, BFloat16) { return (Register<float>)(as_words(h) << 16); }

AM_INLINE Half narrow(Register<float> f, BFloat16) {
  const Word u = (Word)f;
  const Word rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const Word quiet_nan = Word{} + 0x7FC0;
#if defined(__aarch64__)
  return (Half)vmovn_u32((uint32x4_t)(f == f ? rounded : quiet_nan));
#else
  return __builtin_convertvector(f == f ? rounded : quiet_nan, Half);
#endif
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
#elif defined(__aarch64__)
AM_INLINE Register<float> widen(Half h, Float16) {
  return (Register<float>)vcvt_f32_f16((float16x4_t)h);
}
AM_INLINE Half narrow(Register<float> f, Float16) { return (Half)vcvt_f16_f32((float32x4_t)f); }
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

// Register by register: a copy of the whole pack at once would pass through the stack.
template <class T>
AM_INLINE Pack<T> load(const T* p) {
  Pack<T> out;
  for (int k = 0; k < Pack<T>::kRegisters; ++k)
    std::memcpy(&out.r[k], p + k * Pack<T>::kRegisterLanes, sizeof(Register<T>));
  return out;
}

template <class T>
AM_INLINE void store(T* p, Pack<T> a) {
  for (int k = 0; k < Pack<T>::kRegisters; ++k)
    std::memcpy(p + k * Pack<T>::kRegisterLanes, &a.r[k], sizeof(Register<T>));
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

// The first n of a pack's elements in memory: others are read as zeros, and not written.
template <class S>
struct First {
  S* p;
  int64_t n;
};

#if defined(__AVX512F__)
template <class T>
AM_INLINE auto first_lanes(int64_t n) {
  using Mask = std::conditional_t<sizeof(T) == 8, __mmask8, __mmask16>;
  return static_cast<Mask>((1u << n) - 1);
}
AM_INLINE Pack<float> load(First<const float> f) {
  Pack<float> out;
  out.r[0] = _mm512_maskz_loadu_ps(first_lanes<float>(f.n), f.p);
  return out;
}
AM_INLINE Pack<double> load(First<const double> f) {
  Pack<double> out;
  out.r[0] = _mm512_maskz_loadu_pd(first_lanes<double>(f.n), f.p);
  return out;
}
template <class S>
AM_INLINE Pack<float> load(First<const S> f) {
  Pack<float> out;
  out.r[0] = widen((Half)_mm256_maskz_loadu_epi16(first_lanes<float>(f.n), f.p), S{});
  return out;
}
AM_INLINE void store(First<float> f, Pack<float> a) {
  _mm512_mask_storeu_ps(f.p, first_lanes<float>(f.n), a.r[0]);
}
AM_INLINE void store(First<double> f, Pack<double> a) {
  _mm512_mask_storeu_pd(f.p, first_lanes<double>(f.n), a.r[0]);
}
template <class S>
AM_INLINE void store(First<S> f, Pack<float> a) {
  _mm256_mask_storeu_epi16(f.p, first_lanes<float>(f.n), (__m256i)narrow(a.r[0], S{}));
}
#else
template <class S>
constexpr int kLanesOf = 64 / (sizeof(S) == 8 ? 8 : 4);

#if defined(__AVX2__)
// A register's lanes that are among the first n.
AM_INLINE __m256i first_lanes(int64_t n, float) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
}
AM_INLINE __m256i first_lanes(int64_t n, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_set_epi64x(3, 2, 1, 0));
}
AM_INLINE __m256 masked_load(const float* p, __m256i mask) { return _mm256_maskload_ps(p, mask); }
AM_INLINE __m256d masked_load(const double* p, __m256i mask) { return _mm256_maskload_pd(p, mask); }
AM_INLINE void masked_store(float* p, __m256i mask, __m256 a) { _mm256_maskstore_ps(p, mask, a); }
AM_INLINE void masked_store(double* p, __m256i mask, __m256d a) { _mm256_maskstore_pd(p, mask, a); }

template <class T, class = std::enable_if_t<std::is_floating_point_v<T> > >
AM_INLINE Pack<T> load(First<const T> f) {
  constexpr int kEach = Pack<T>::kRegisterLanes;
  Pack<T> out;
  for (int k = 0; k < Pack<T>::kRegisters; ++k)
    out.r[k] = masked_load(f.p + k * kEach, first_lanes(f.n - k * kEach, T{}));
  return out;
}
template <class T, class = std::enable_if_t<std::is_floating_point_v<T> > >
AM_INLINE void store(First<T> f, Pack<T> a) {
  constexpr int kEach = Pack<T>::kRegisterLanes;
  for (int k = 0; k < Pack<T>::kRegisters; ++k)
    masked_store(f.p + k * kEach, first_lanes(f.n - k * kEach, T{}), a.r[k]);
}
template <class S>
constexpr bool kIsCopied = !std::is_floating_point_v<S>;
#else
template <class S>
constexpr bool kIsCopied = true;
#endif

// Copies n elements, of fewer than 2 * kMost.
#if defined(__aarch64__)
// By the bits of n, in the place of a call.
template <int kMost, class S>
AM_INLINE void copy_first(S* to, const S* from, int64_t n) {
  const int64_t part = n & kMost;
  if (part != 0) std::memcpy(to, from, kMost * sizeof(S));
  if constexpr (kMost > 1) copy_first<kMost / 2>(to + part, from + part, n);
}
#else
template <int kMost, class S>
AM_INLINE void copy_first(S* to, const S* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(S));
}
#endif

template <class S, class = std::enable_if_t<kIsCopied<S> >, class = void>
AM_INLINE auto load(First<const S> f) {
  S all[kLanesOf<S>] = {};
  copy_first<kLanesOf<S> >(all, f.p, f.n);
  return load(all);
}
template <class S, class T, class = std::enable_if_t<kIsCopied<S> > >
AM_INLINE void store(First<S> f, Pack<T> a) {
  S all[kLanesOf<S>];
  store(all, a);
  copy_first<kLanesOf<S> >(f.p, all, f.n);
}
#endif

template <class S>
AM_INLINE auto load(First<S> f) {
  return load(First<const S>{f.p, f.n});
}

}  // namespace

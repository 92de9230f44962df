// What is stored in few bits as float32 and back, by ../formats.h: included by kernels_impl.h, for
// each instruction set. The kernels then work on what is in float32.
#include "../formats.h"

namespace {

using namespace am::cpu;

// ---- a register of lanes, as formats.h takes it ---------------------------------------

struct Lanes {
  using Float = Register<float>;
  using Word = ::Word;

  AM_INLINE Word bits(Float f) { return (Word)f; }
  AM_INLINE Float floats(Word w) { return (Float)w; }
};

// Of words below 2^31.
#if defined(__AVX512F__)
AM_INLINE Register<float> to_floats(Word w) { return _mm512_cvtepi32_ps((__m512i)w); }
#elif defined(__AVX2__)
AM_INLINE Register<float> to_floats(Word w) { return _mm256_cvtepi32_ps((__m256i)w); }
#else
AM_INLINE Register<float> to_floats(Word w) {
  return __builtin_convertvector((Register<int32_t>)w, Register<float>);
}
#endif

constexpr int kEach = Pack<float>::kRegisterLanes;

using Bytes = VectorOf<uint8_t, kEach>::type;  // a register's worth of 8 bits
using SignedBytes = VectorOf<int8_t, kEach>::type;

// GCC 12 makes many instructions of these where it is left to it.
#if defined(__AVX512F__)
AM_INLINE Word widen_unsigned(Bytes b) { return (Word)_mm512_cvtepu8_epi32((__m128i)b); }
AM_INLINE Word widen_signed(Bytes b) { return (Word)_mm512_cvtepi8_epi32((__m128i)b); }
AM_INLINE Bytes low_bytes(Word w) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)w); }
AM_INLINE Half low_halves(Word w) { return (Half)_mm512_cvtepi32_epi16((__m512i)w); }
#elif defined(__AVX2__)
AM_INLINE Word widen_unsigned(Bytes b) {
  return (Word)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)b));
}
AM_INLINE Word widen_signed(Bytes b) {
  return (Word)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)b));
}
AM_INLINE __m128i packed_halves(Word w) {
  const __m256i masked = _mm256_and_si256((__m256i)w, _mm256_set1_epi32(0xFFFF));
  return _mm_packus_epi32(_mm256_castsi256_si128(masked), _mm256_extracti128_si256(masked, 1));
}
AM_INLINE Half low_halves(Word w) { return (Half)packed_halves(w); }
AM_INLINE Bytes low_bytes(Word w) {
  const __m128i halves = packed_halves(w & 0xFFu);
  return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
}
#elif defined(__aarch64__)
AM_INLINE Word widen_unsigned(Bytes b) {
  return (Word)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8((uint32_t)b))));
}
AM_INLINE Word widen_signed(Bytes b) {
  return (Word)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8((uint32_t)b))));
}
AM_INLINE uint16x4_t packed_halves(Word w) { return vmovn_u32((uint32x4_t)w); }
AM_INLINE Half low_halves(Word w) { return (Half)packed_halves(w); }
AM_INLINE Bytes low_bytes(Word w) {
  const uint16x4_t halves = packed_halves(w);
  return (Bytes)vget_lane_u32((uint32x2_t)vmovn_u16(vcombine_u16(halves, halves)), 0);
}
#else
AM_INLINE Word widen_unsigned(Bytes b) { return __builtin_convertvector(b, Word); }
AM_INLINE Word widen_signed(Bytes b) {
  return (Word) __builtin_convertvector((SignedBytes)b, Register<int32_t>);
}
AM_INLINE Bytes low_bytes(Word w) { return __builtin_convertvector(w, Bytes); }
AM_INLINE Half low_halves(Word w) { return __builtin_convertvector(w, Half); }
#endif

// Of words below 2^31.
#if defined(__AVX512F__)
AM_INLINE Word larger(Word a, Word b) { return (Word)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
AM_INLINE Word larger(Word a, Word b) { return (Word)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#elif defined(__aarch64__)
AM_INLINE Word larger(Word a, Word b) { return (Word)vmaxq_u32((uint32x4_t)a, (uint32x4_t)b); }
#else
AM_INLINE Word larger(Word a, Word b) { return a > b ? a : b; }
#endif

template <class R, class P>
AM_INLINE R read(const P* p) {
  R r;
  std::memcpy(&r, p, sizeof(R));
  return r;
}

template <class R, class P>
AM_INLINE void write(P* p, R r) {
  std::memcpy(p, &r, sizeof(R));
}

// A register's worth of what is stored where there is less: a copy, which is written back.
template <class P>
struct Tail {
  P* stored;
  int64_t n;
  std::remove_const_t<P> all[kEach] = {};

  AM_MEMBER Tail(P* stored, int64_t n) : stored(stored), n(n) {
    std::memcpy(all, stored, n * sizeof(P));
  }
  AM_MEMBER ~Tail() {
    if constexpr (!std::is_const_v<P>) std::memcpy(stored, all, n * sizeof(P));
  }
};

// Calls f(i, stored + i...) for every register of n elements, of which the last may not be whole:
// float32 values have room for it.
template <class F, class... P>
AM_INLINE void for_registers(int64_t n, F f, P*... stored) {
  const int64_t whole = n - n % kEach;
  for (int64_t i = 0; i < whole; i += kEach) {
    f(i, stored + i...);
  }
  if (whole < n) f(whole, Tail<P>(stored + whole, n - whole).all...);
}

// ---- random bits ----------------------------------------------------------------------

// Of n elements from `begin` on, with room for one register more.
inline void fill_random(const LowTensor& t, uint64_t key, int64_t begin, int64_t n,
                        uint32_t* random) {
  Word lane;
  for (int l = 0; l < kEach; ++l) lane[l] = l;
  for (int64_t i = 0; i < n;) {
    // Elements whose places follow one another, and have the same high word.
    const int64_t element = begin + i;
    uint64_t place = static_cast<uint64_t>(t.offset + element);
    uint64_t run = n - i;
    if (t.stretch > 0) {
      place += static_cast<uint64_t>(element / t.stretch * t.skip);
      run = std::min<uint64_t>(run, t.stretch - element % t.stretch);
    }
    const uint32_t low = static_cast<uint32_t>(place);
    run = std::min<uint64_t>(run, (uint64_t{1} << 32) - low);
    const Word high = Word{} + static_cast<uint32_t>(place >> 32);
    for (uint64_t k = 0; k < run; k += kEach) {
      const Word own = random_bits<Word>(key, lane + (low + static_cast<uint32_t>(k)), high);
      write(random + i + k, own);
    }
    i += run;
  }
}

// ---- bfloat16 -------------------------------------------------------------------------

inline void decode_bfloat16(const uint16_t* stored, int64_t n, float* values) {
  for_registers(
      n,
      [&](int64_t i, const uint16_t* p)
          AM_INLINE_LAMBDA { write(values + i, widen(read<Half>(p), BFloat16{})); },
      stored);
}

// kShift: of the random bits.
template <int kShift>
void encode_bfloat16(const float* values, int64_t n, const uint32_t* random, uint16_t* stored,
                     const Beside<1>& beside) {
  for_registers(
      n,
      [&](int64_t i, uint16_t* p) AM_INLINE_LAMBDA {
        beside(i);
        const Word own = read<Word>(random + i) >> kShift;
        write(p, low_halves(to_bfloat16<Lanes>(read<Lanes::Float>(values + i), own)));
      },
      stored);
}

// ---- a bfloat16 parameter and its remainder -------------------------------------------

inline void join_param(const uint16_t* param, const uint8_t* remainder, int64_t n, float* values) {
  for_registers(
      n,
      [&](int64_t i, const uint16_t* p, const uint8_t* r) AM_INLINE_LAMBDA {
        write(values + i, join<Lanes>(as_words(read<Half>(p)), widen_unsigned(read<Bytes>(r))));
      },
      param, remainder);
}

// random: none where it is rounded to nearest.
inline void split_param(const float* values, int64_t n, const uint32_t* random, uint16_t* param,
                        uint8_t* remainder) {
  for_registers(
      n,
      [&](int64_t i, uint16_t* p, uint8_t* r) AM_INLINE_LAMBDA {
        const Word added = random ? read<Word>(random + i) & 0xFFu : Word{} + 0x80u;
        const auto halves = split<Lanes>(read<Lanes::Float>(values + i), added);
        write(p, low_halves(halves.param));
        write(r, low_bytes(halves.remainder));
      },
      param, remainder);
}

// ---- int8 -----------------------------------------------------------------------------

template <bool kSigned>
void decode_codes(const uint8_t* codes, const float* scales, int64_t block, int64_t n,
                  float* values) {
  for (; n > 0; n -= block, codes += block, values += block) {
    const float part = *scales++ / (kSigned ? 16129.0f : 65025.0f);
    for_registers(
        block,
        [&](int64_t i, const uint8_t* p) AM_INLINE_LAMBDA {
          const Bytes bytes = read<Bytes>(p);
          if constexpr (kSigned) {
            const Lanes::Float code = to_floats(widen_signed(bytes));
            const Lanes::Float magnitude = Lanes::floats(Lanes::bits(code) & 0x7FFFFFFFu);
            write(values + i, decode_signed(code, magnitude, part));
          } else {
            write(values + i, decode_square(to_floats(widen_unsigned(bytes)), part));
          }
        },
        codes);
  }
}

// The largest magnitude of a block; NaN where one is, whose bits are above those of all others.
AM_INLINE float largest_magnitude(const float* values, int64_t block) {
  Word most[2] = {};
  for (int64_t i = 0; i < block; i += 2 * kEach)
    for (int k = 0; k < 2; ++k)
      most[k] = larger(most[k], read<Word>(values + i + k * kEach) & 0x7FFFFFFFu);
  const Word all = larger(most[0], most[1]);
  uint32_t result = 0;
  for (int l = 0; l < kEach; ++l) result = std::max<uint32_t>(result, all[l]);
  float magnitude;
  std::memcpy(&magnitude, &result, sizeof(magnitude));
  return magnitude;
}

// Registers that are encoded side by side, as an operation waits for the one before it and the
// processor does not look far ahead: a quarter to a third of the time of encoding (Zen 3, AVX2).
constexpr int kAtOnce = 4;
using Several = Pack<float, kAtOnce>;

// GCC makes several instructions of `?:` where these are one.
#if defined(__AVX512F__)
AM_INLINE __m512 register_inverse_root(__m512 x) { return _mm512_rsqrt14_ps(x); }
AM_INLINE __m512 register_nearest(__m512 x) { return _mm512_roundscale_ps(x, 0); }
AM_INLINE __m512 register_larger(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
AM_INLINE __m512 register_smaller(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
AM_INLINE __m256 register_inverse_root(__m256 x) { return _mm256_rsqrt_ps(x); }
AM_INLINE __m256 register_nearest(__m256 x) { return _mm256_round_ps(x, 0); }
AM_INLINE __m256 register_larger(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
AM_INLINE __m256 register_smaller(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
#else
#if defined(__aarch64__)
AM_INLINE Floats register_inverse_root(Floats x) {
  const float32x4_t root = vrsqrteq_f32((float32x4_t)x);  // to a part in 256
  return (Floats)vmulq_f32(root, vrsqrtsq_f32(vmulq_f32((float32x4_t)x, root), root));
}
#else
template <class R>
AM_INLINE R register_inverse_root(R x) {
  return 1.0f / register_sqrt(x);
}
#endif
AM_INLINE Register<float> register_nearest(Register<float> x) {
  return (x + 12582912.0f) - 12582912.0f;
}
AM_INLINE Register<float> register_larger(Register<float> a, Register<float> b) {
  return a > b ? a : b;
}
AM_INLINE Register<float> register_smaller(Register<float> a, Register<float> b) {
  return a < b ? a : b;
}
#endif

AM_INLINE Several inverse_root(Several a) {
  for (Register<float>& lanes : a.r) lanes = register_inverse_root(lanes);
  return a;
}

AM_INLINE Several nearest(Several a) {
  for (Register<float>& lanes : a.r) lanes = register_nearest(lanes);
  return a;
}

AM_INLINE Several larger(Several a, Several b) {
  for (int k = 0; k < kAtOnce; ++k) a.r[k] = register_larger(a.r[k], b.r[k]);
  return a;
}

AM_INLINE Several smaller(Several a, Several b) {
  for (int k = 0; k < kAtOnce; ++k) a.r[k] = register_smaller(a.r[k], b.r[k]);
  return a;
}

AM_INLINE Several where_less(Several a, Several b, Several x, Several y) {
  for (int k = 0; k < kAtOnce; ++k) x.r[k] = a.r[k] < b.r[k] ? x.r[k] : y.r[k];
  return x;
}

// Whole numbers that fit, as bytes.
template <bool kSigned>
AM_INLINE void store_codes(uint8_t* p, Several code) {
#if defined(__AVX512F__)
  for (int k = 0; k < kAtOnce; ++k) {
    const __m512i words = _mm512_cvttps_epi32(code.r[k]);
    write(p + k * kEach, _mm512_cvtepi32_epi8(words));
  }
#elif defined(__AVX2__)
  __m256i words[kAtOnce];
  for (int k = 0; k < kAtOnce; ++k) words[k] = _mm256_cvttps_epi32(code.r[k]);
  const __m256i low = _mm256_packs_epi32(words[0], words[1]);
  const __m256i high = _mm256_packs_epi32(words[2], words[3]);
  const __m256i bytes = kSigned ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  // In 128 bits each, which are a half of every register.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  write(p, _mm256_permutevar8x32_epi32(bytes, order));
#else
  for (int k = 0; k < kAtOnce; ++k)
    write(p + k * kEach, low_bytes((Word) __builtin_convertvector(code.r[k], Register<int32_t>)));
#endif
}

template <bool kSigned>
void encode_codes(const float* values, int64_t n, const uint32_t* random, int64_t block,
                  uint8_t* codes, float* scales, const Beside<1>& beside) {
  for (int64_t done = 0; done < n;
       done += block, codes += block, values += block, random += block) {
    const float largest = largest_magnitude(values, block);
    const float scale = kSigned ? largest : std::sqrt(largest);
    *scales++ = scale < kSmallestScale ? 0.0f : scale;
    // Of zeros, or with what is not finite, which makes all of it NaN.
    if (!(scale >= kSmallestScale && scale <= std::numeric_limits<float>::max())) {
      std::memset(codes, 0, block);
      continue;
    }
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < block; i += Several::kLanes) {
      for (int64_t line = 0; line < Several::kLanes; line += 16) beside(done + i + line);
      Several value, random_bits;
      for (int k = 0; k < kAtOnce; ++k) {
        value.r[k] = read<Register<float>>(values + i + k * kEach);
        const Word own = read<Word>(random + i + k * kEach);
        random_bits.r[k] = to_floats(kSigned ? own & 0xFFFFu : own >> 16);
      }
      const Several chance = chance_of(random_bits);
      Several code;
      if constexpr (kSigned) {
        Several magnitude = value;
        for (Register<float>& lanes : magnitude.r)
          lanes = Lanes::floats(Lanes::bits(lanes) & 0x7FFFFFFFu);
        code = signed_code(magnitude, inverse, chance);
        for (int k = 0; k < kAtOnce; ++k) {
          const Word sign = Lanes::bits(value.r[k]) & 0x80000000u;
          code.r[k] = Lanes::floats(Lanes::bits(code.r[k]) | sign);
        }
      } else {
        code = square_code(value, inverse, chance);
      }
      store_codes<kSigned>(codes + i, code);
    }
  }
}

// ---- a piece of a tensor ----------------------------------------------------------------

// Elements that are encoded at once, whose random bits and values stay in the first cache.
constexpr int64_t kPiece = 1024;
static_assert(kPiece % kBlock == 0);  // so that its sums are those of a whole row

// Its elements as the kernels take them: in their place where they are stored so, else copies.
struct Staged {
  void* param;
  const void* grad;
  float* memories[2];
};

// room: for kLowRoom arrays of n elements, and a register more of each.

inline Staged stage(const LowTensor& t, int64_t begin, int64_t n, bool reads_param, float* room) {
  const int64_t each = n + kEach;
  Staged staged{};
  const auto* grad = static_cast<const uint16_t*>(t.grad) + begin;
  auto* param = static_cast<uint16_t*>(t.param) + begin;
  if (t.dtype == kFloat32) {
    staged.grad = static_cast<const float*>(t.grad) + begin;
    staged.param = static_cast<float*>(t.param) + begin;
  } else if (t.is_param_staged()) {
    decode_bfloat16(grad, n, room);
    staged.grad = room;
    staged.param = room + each;
    if (reads_param && t.remainder != nullptr)
      join_param(param, t.remainder + begin, n, room + each);
    if (reads_param && t.remainder == nullptr) decode_bfloat16(param, n, room + each);
  } else {
    staged.grad = grad;
    staged.param = param;
  }
  for (int k = 0; k < 2; ++k) {
    const LowMemory& memory = t.memories[k];
    float* const values = room + (2 + k) * each;
    staged.memories[k] = values;
    const auto* codes = static_cast<const uint8_t*>(memory.data) + begin;
    const float* scales = memory.block > 0 ? memory.scales + begin / memory.block : nullptr;
    switch (memory.format) {
      case kFloats:
        if (memory.data != nullptr) staged.memories[k] = static_cast<float*>(memory.data) + begin;
        break;
      case kShorts:
        decode_bfloat16(static_cast<const uint16_t*>(memory.data) + begin, n, values);
        break;
      case kSignedCodes:
        decode_codes<true>(codes, scales, memory.block, n, values);
        break;
      case kSquareCodes:
        decode_codes<false>(codes, scales, memory.block, n, values);
        break;
    }
  }
  return staged;
}

// From an element on, which may be behind the last.
AM_INLINE Stream stream(const LowTensor& t, const void* param_or_grad, int64_t next) {
  const int64_t bytes = t.dtype == kFloat32 ? 4 : 2;
  return {static_cast<const char*>(param_or_grad) + next * bytes, bytes};
}

AM_INLINE Stream memory_stream(const LowMemory& memory, int64_t next) {
  const int64_t bytes = memory.format == kFloats ? 4 : memory.format == kShorts ? 2 : 1;
  return {static_cast<const char*>(memory.data) + next * bytes, bytes};
}

// What of a piece is to be stored.
enum class Stores { kNone, kAll, kRepair };  // a repair leaves exp_avg_sq

// Stores the copies of n elements, of which `staged` begins with the first. next: the first
// of as many that are staged next.
template <Stores kStores = Stores::kAll>
void store_piece(const LowTensor& t, int64_t begin, int64_t n, const Staged& staged, int64_t next) {
  constexpr bool kRepairs = kStores == Stores::kRepair;
  constexpr int kMemories = kRepairs ? 1 : 2;
  alignas(64) uint32_t random[kPiece + kEach];
  if (t.memories[0].format != kFloats || t.memories[kMemories - 1].format != kFloats)
    fill_random(t, kRepairs ? t.keys.repaired_memories : t.keys.memories, begin, n, random);
  // Nothing else is read meanwhile: 10 to 15 % of a step with int8 memories (Zen 5, AVX-512).
  const Beside<1> beside[] = {{stream(t, t.grad, next)}, {stream(t, t.param, next)}};
  for (int k = 0; k < kMemories; ++k) {
    const LowMemory& memory = t.memories[k];
    const float* const values = staged.memories[k];
    auto* codes = static_cast<uint8_t*>(memory.data) + begin;
    auto* shorts = static_cast<uint16_t*>(memory.data) + begin;
    float* scales = memory.block > 0 ? memory.scales + begin / memory.block : nullptr;
    switch (memory.format) {
      case kFloats:
        break;
      case kShorts:
        k == 0 ? encode_bfloat16<0>(values, n, random, shorts, beside[k])
               : encode_bfloat16<16>(values, n, random, shorts, beside[k]);
        break;
      case kSignedCodes:
        encode_codes<true>(values, n, random, memory.block, codes, scales, beside[k]);
        break;
      case kSquareCodes:
        encode_codes<false>(values, n, random, memory.block, codes, scales, beside[k]);
        break;
    }
  }
  if (!t.is_param_staged()) return;
  if (t.rounds) fill_random(t, kRepairs ? t.keys.repaired_param : t.keys.param, begin, n, random);
  const auto* values = static_cast<const float*>(staged.param);
  auto* param = static_cast<uint16_t*>(t.param) + begin;
  if (t.remainder != nullptr) {
    split_param(values, n, t.rounds ? random : nullptr, param, t.remainder + begin);
  } else {
    encode_bfloat16<0>(values, n, random, param, beside[1]);
  }
}

inline void store_staged(const LowTensor& t, int64_t begin, int64_t n, Staged staged) {
  for (int64_t done = 0; done < n; done += kPiece) {
    store_piece(t, begin + done, std::min(kPiece, n - done), staged, begin + done + n);
    if (t.is_param_staged()) staged.param = static_cast<float*>(staged.param) + kPiece;
    for (float*& values : staged.memories) values += kPiece;
  }
}

}  // namespace

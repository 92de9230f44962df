// A tensor's elements in memory: stored types, and wide access where alignment allows it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "config.h"
#include "tables.h"

namespace am::cuda {

// Conversions round to nearest, ties to even, as torch's do.
template <class T, class S>
__device__ inline T widen(S s) {
  return static_cast<T>(s);
}
template <>
__device__ inline float widen<float>(__nv_bfloat16 s) {
  return __bfloat162float(s);
}
template <>
__device__ inline float widen<float>(__half s) {
  return __half2float(s);
}
template <>
__device__ inline double widen<double>(__nv_bfloat16 s) {
  return __bfloat162float(s);
}
template <>
__device__ inline double widen<double>(__half s) {
  return __half2float(s);
}

template <class S, class T>
__device__ inline S narrow(T t) {
  return static_cast<S>(t);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float t) {
  return __float2bfloat16_rn(t);
}
template <>
__device__ inline __half narrow<__half>(float t) {
  return __float2half_rn(t);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(double t) {
  return __double2bfloat16(t);
}
template <>
__device__ inline __half narrow<__half>(double t) {
  return __double2half(t);
}

// How long what is read will be wanted: by an update of the same elements that follows soon, or
// not again, so that it had better leave its place in L2 to others. So does what is written.
enum class Use { kAgain, kLast };

// The threads that share a run of elements: a block, or, where a run is a short row, a warp or a
// part of one.
struct Team {
  int rank, size;

  __device__ int width() const { return size < kWarp ? size : kWarp; }
};

__device__ inline Team whole_block() { return {static_cast<int>(threadIdx.x), kThreads}; }

// What a thread takes of a run at a time: kCount elements from the k-th on, in spans of kSpan that
// lie side by side, and a team's width of spans apart. `slot` counts a team's pieces, and j is that
// of a single element in its piece.
template <int kOwnSpan, int kOwnCount>
struct Piece {
  static constexpr int kSpan = kOwnSpan, kCount = kOwnCount;
  int k, width, slot, j;
};

// A list's elements from a chunk's first one on, stored as S, computed with as T.
template <class T, class S>
struct Column {
  static constexpr int kBytes = sizeof(S);

  S* data;

  static __device__ Column at(int64_t address, int64_t begin, int32_t) {
    return {reinterpret_cast<S*>(address) + begin};
  }

  __device__ bool is_aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

  // Each span of a piece in one access. One element may lie anywhere.
  template <Use kUse, int kSpan, int kCount>
  __device__ void load(Piece<kSpan, kCount> piece, T (&out)[kCount]) const {
    if constexpr (kCount == 1) {
      out[0] = widen<T>(data[piece.k]);
    } else {
      Raw<kSpan, kCount> raw;
      const auto* p = reinterpret_cast<const Word<kSpan>*>(data + piece.k);
#pragma unroll
      for (int w = 0; w < kCount / kSpan; ++w) {
        const auto* word = p + piece.width * w;
        raw.words[w] = kUse == Use::kLast ? __ldcs(word) : __ldcg(word);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = widen<T>(raw.elements[j]);
    }
  }

  template <int kSpan, int kCount>
  __device__ void store(Piece<kSpan, kCount> piece, const T (&in)[kCount]) const {
    if constexpr (kCount == 1) {
      data[piece.k] = narrow<S>(in[0]);
    } else {
      Raw<kSpan, kCount> raw;
#pragma unroll
      for (int j = 0; j < kCount; ++j) raw.elements[j] = narrow<S>(in[j]);
      auto* p = reinterpret_cast<Word<kSpan>*>(data + piece.k);
#pragma unroll
      for (int w = 0; w < kCount / kSpan; ++w) __stcs(p + piece.width * w, raw.words[w]);
    }
  }

 private:
  // 16 bytes, or 8 of a list whose elements have half the bytes of another's.
  template <int kSpan>
  using Word = std::conditional_t<kSpan * sizeof(S) == 16, uint4, uint2>;

  template <int kSpan, int kCount>
  union Raw {
    static_assert(sizeof(Word<kSpan>) == kSpan * sizeof(S));
    Word<kSpan> words[kCount / kSpan];
    S elements[kCount];
    __device__ Raw() {}
  };
};

// A stored type that is known at run time only: for the rare combinations of dtypes. Element by
// element, as it is never aligned.
struct AnyType {};

template <class T>
struct Column<T, AnyType> {
  static constexpr int kBytes = 8;

  int64_t address;
  int32_t dtype;

  static __device__ Column at(int64_t address, int64_t begin, int32_t stored) {
    return {address + begin * bytes_of(stored), stored};
  }

  __device__ bool is_aligned() const { return false; }

  template <Use kUse, int kSpan, int kCount>
  __device__ void load(Piece<kSpan, kCount> piece, T (&out)[kCount]) const {
    visit([&](auto* data) { out[0] = widen<T>(data[piece.k]); });
  }

  template <int kSpan, int kCount>
  __device__ void store(Piece<kSpan, kCount> piece, const T (&in)[kCount]) const {
    visit(
        [&](auto* data) { data[piece.k] = narrow<std::remove_pointer_t<decltype(data)>>(in[0]); });
  }

 private:
  template <class F>
  __device__ void visit(F f) const {
    switch (dtype) {
      case kFloat64:
        return f(reinterpret_cast<double*>(address));
      case kBFloat16:
        return f(reinterpret_cast<__nv_bfloat16*>(address));
      case kFloat16:
        return f(reinterpret_cast<__half*>(address));
      default:
        return f(reinterpret_cast<float*>(address));
    }
  }
};

// A run of elements: those of param, grad and memories.
template <class T, class Param, class Grad, class Memory, int kMemories>
struct Elements {
  // The blocks that a multiprocessor is to hold.
  static constexpr bool kIsWide = sizeof(T) == 8 || std::is_same_v<Param, AnyType>;
  static constexpr int kBlocks = kIsWide              ? kBlocksWide
                                 : sizeof(Param) == 2 ? kBlocks16Bit
                                                      : kBlocksFloat;

  // How many elements a thread takes at a time: 16 bytes of the smallest of the stored types.
  // Those of 16 bytes of the largest lie side by side. A warp's access to any list then takes
  // whole sectors of 32 bytes: were a thread's elements of float32 as many as those of its
  // bfloat16, each of two accesses would take half of every sector.
  static constexpr int kBytes[] = {Column<T, Param>::kBytes, Column<T, Grad>::kBytes,
                                   Column<T, Memory>::kBytes};
  static constexpr int least(int a, int b) { return a < b ? a : b; }
  static constexpr int kVector = 16 / least(least(kBytes[0], kBytes[1]), kBytes[2]);
  static constexpr int kSpan = least(least(16 / kBytes[0], 16 / kBytes[1]), 16 / kBytes[2]);

  Column<T, Param> param;
  Column<T, Grad> grad;
  Column<T, Memory> memories[kMemories];
  int length;

  __device__ Elements(const Step& s, const Bucket& b, int64_t unit, int64_t begin, int count)
      : length(count) {
    const int64_t tensor = layout_at(s, kTensor, unit);
    const auto address = [&](int list) { return s.addresses[list * s.tensors + tensor]; };
    param = param.at(address(0), begin, b.dtypes[0]);
    grad = grad.at(address(1), begin, b.dtypes[1]);
#pragma unroll
    for (int m = 0; m < kMemories; ++m)
      memories[m] = memories[m].at(address(2 + m), begin, b.dtypes[2 + m]);
  }

  // Calls f(piece) for each of the thread's pieces: kVector elements, or single ones where they are
  // not aligned or at the end.
  //
  // A thread has the same elements in the same order whether they are aligned or not: alignment
  // does not change a sum's bits.
  template <class F>
  __device__ __forceinline__ void for_each_piece(Team team, F f) const {
    const int width = team.width();
    const int apart = width * kSpan;
    const int lane = team.rank & (width - 1);
    const int first = (team.rank - lane) * kVector + lane * kSpan;
    bool is_aligned = param.is_aligned() && grad.is_aligned();
    for (const auto& memory : memories) is_aligned = is_aligned && memory.is_aligned();
    int slot = team.rank;
    for (int k = first; k < length; k += team.size * kVector, slot += team.size) {
      if (is_aligned && k + (kVector / kSpan - 1) * apart + kSpan <= length) {
        f(Piece<kSpan, kVector>{k, width, slot, 0});
      } else {
#pragma unroll 1
        for (int j = 0; j < kVector; ++j) {
          const int i = k + j / kSpan * apart + j % kSpan;
          if (i < length) f(Piece<1, 1>{i, width, slot, j});
        }
      }
    }
  }

  // Calls f(gradient, memories ..., parameter) for each of the thread's elements. Reads the
  // parameter only where kReadsParam; then writes it and so many of the memories.
  template <Use kUse, bool kReadsParam, int kWritten, class F>
  __device__ __forceinline__ void for_each(F f, Team team = whole_block()) const {
    for_each_piece(team, [&](auto piece) {
      constexpr int kCount = decltype(piece)::kCount;
      T g[kCount], m[kMemories][kCount], x[kCount] = {};
      load<kUse, kReadsParam>(piece, g, m, x);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if constexpr (kMemories == 2) {
          f(g[j], m[0][j], m[1][j], x[j]);
        } else {
          f(g[j], m[0][j], x[j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kWritten; ++i) memories[i].store(piece, m[i]);
      if (kWritten > 0) param.store(piece, x);
    });
  }

  template <Use kUse, bool kReadsParam, class Own, int kCount>
  __device__ __forceinline__ void load(Own piece, T (&g)[kCount], T (&m)[kMemories][kCount],
                                       T (&x)[kCount]) const {
    grad.template load<kUse>(piece, g);
#pragma unroll
    for (int i = 0; i < kMemories; ++i) memories[i].template load<kUse>(piece, m[i]);
    if (kReadsParam) param.template load<kUse>(piece, x);
  }
};

}  // namespace am::cuda

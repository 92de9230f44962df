// What a thread takes of a run of elements at a time, and wide access to it where alignment allows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "config.h"

namespace am::cuda {

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
  static constexpr bool kIsAligned = true;
  int k, width, slot, j;

  // The place of element j in the run, and whether it is there.
  __device__ int at(int j) const { return k + j / kSpan * (width * kSpan) + j % kSpan; }
  __device__ bool has(int) const { return true; }
};

// A piece that all lanes of a warp take together, or of a team that is a part of one, to the end of
// the run and beyond it. A thread has all of a span or nothing.
template <int kOwnSpan, int kOwnCount, bool kOwnAligned>
struct Spans : Piece<kOwnSpan, kOwnCount> {
  static constexpr bool kIsAligned = kOwnAligned;
  int length;

  __device__ bool has(int j) const { return this->at(j) < length; }
  // The mask of the lanes.
  __device__ unsigned lanes() const {
    if (this->width == kWarp) return 0xFFFFFFFFu;
    const int first = static_cast<int>(threadIdx.x) % kWarp & ~(this->width - 1);
    return ((1u << this->width) - 1u) << first;
  }
};

// 16 bytes, or fewer of a list whose elements have fewer than another's.
template <int kBytes>
using Word =
    std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;

// A piece as it is stored.
template <class S, class Own>
union Raw {
  static constexpr int kSpan = Own::kSpan, kCount = Own::kCount;
  using Span = Word<kSpan * sizeof(S)>;
  static_assert(kCount == 1 || sizeof(Span) == kSpan * sizeof(S));

  Span words[kCount / kSpan];
  S elements[kCount];

  __device__ Raw() {}

  // Each span in one access, if they are aligned. One element may lie anywhere.
  template <Use kUse>
  __device__ __forceinline__ void read(const S* data, Own piece) {
    if constexpr (kCount == 1) {
      elements[0] = data[piece.k];
    } else {
#pragma unroll
      for (int w = 0; w < kCount / kSpan; ++w) {
        const S* p = data + piece.at(w * kSpan);
        if (!piece.has(w * kSpan)) {
          words[w] = Span{};
        } else if constexpr (Own::kIsAligned) {
          const auto* word = reinterpret_cast<const Span*>(p);
          words[w] = kUse == Use::kLast ? __ldcs(word) : __ldcg(word);
        } else {
#pragma unroll
          for (int j = 0; j < kSpan; ++j) elements[w * kSpan + j] = p[j];
        }
      }
    }
  }

  __device__ __forceinline__ void write(S* data, Own piece) const {
    if constexpr (kCount == 1) {
      data[piece.k] = elements[0];
    } else {
#pragma unroll
      for (int w = 0; w < kCount / kSpan; ++w) {
        S* p = data + piece.at(w * kSpan);
        if (!piece.has(w * kSpan)) continue;
        if constexpr (Own::kIsAligned) {
          __stcs(reinterpret_cast<Span*>(p), words[w]);
        } else {
#pragma unroll
          for (int j = 0; j < kSpan; ++j) p[j] = elements[w * kSpan + j];
        }
      }
    }
  }
};

// Asks L2 for a piece's elements, if it has several.
template <class S, class Own>
__device__ __forceinline__ void prefetch([[maybe_unused]] const S* data,
                                         [[maybe_unused]] Own piece) {
#if defined(__CUDA_ARCH__)
  if constexpr (Own::kCount > 1) {
#pragma unroll
    for (int first = 0; first < Own::kCount; first += Own::kSpan)
      if (piece.has(first)) asm volatile("prefetch.global.L2 [%0];" ::"l"(data + piece.at(first)));
  }
#endif
}

__device__ inline bool is_multiple(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// A list's elements from a chunk's first one on, stored as S, computed with as T.
template <class T, class S>
struct Column;

}  // namespace am::cuda

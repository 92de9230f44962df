// A tensor's elements in memory: stored types, and what a thread takes of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "config.h"
#include "low.h"
#include "pieces.h"
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

template <class T, class S>
struct Column {
  static constexpr int kBytes = sizeof(S);

  S* data;

  static __device__ Column at(int64_t address, int64_t begin, int32_t) {
    return {reinterpret_cast<S*>(address) + begin};
  }

  __device__ bool is_aligned() const { return is_multiple(data, 16); }

  template <Use kUse, class Own>
  __device__ __forceinline__ void load(Own piece, T (&out)[Own::kCount]) const {
    Raw<S, Own> raw;
    raw.template read<kUse>(data, piece);
#pragma unroll
    for (int j = 0; j < Own::kCount; ++j) out[j] = widen<T>(raw.elements[j]);
  }

  template <class Own>
  __device__ __forceinline__ void prefetch(Own piece, int ahead) const {
    am::cuda::prefetch(data + ahead, piece);
  }

  template <class Own>
  __device__ __forceinline__ void store(Own piece, const T (&in)[Own::kCount]) const {
    Raw<S, Own> raw;
#pragma unroll
    for (int j = 0; j < Own::kCount; ++j) raw.elements[j] = narrow<S>(in[j]);
    raw.write(data, piece);
  }
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

  template <class Own>
  __device__ void prefetch(Own, int) const {}

  template <Use kUse, class Own>
  __device__ void load(Own piece, T (&out)[Own::kCount]) const {
    visit([&](auto* data) { out[0] = widen<T>(data[piece.k]); });
  }

  template <class Own>
  __device__ void store(Own piece, const T (&in)[Own::kCount]) const {
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

// A run of elements: those of param, grad and memories. kScales: the row of `addresses` that the
// scales of the memories are from on, and behind them the remainder.
template <class T, class Param, class Grad, class Memory, int kMemories, int kScales>
struct Elements {
  // How many elements a thread takes at a time: 16 bytes of the smallest of the stored types, or 8
  // where there are codes. Those of 16 bytes of the largest lie side by side. A warp's access to
  // any list then takes whole sectors of 32 bytes: were a thread's elements of float32 as many as
  // those of its bfloat16, each of two accesses would take half of every sector.
  static constexpr int kBytes[] = {Column<T, Param>::kBytes, Column<T, Grad>::kBytes,
                                   Column<T, Memory>::kBytes};
  static constexpr int least(int a, int b) { return a < b ? a : b; }
  static constexpr int kVector = 16 / least(least(kBytes[0], kBytes[1]), kBytes[2]);
  static constexpr int kSpan = least(least(16 / kBytes[0], 16 / kBytes[1]), 16 / kBytes[2]);

  static constexpr bool kHasCodes = std::is_same_v<Memory, Codes>;

  // The blocks that a multiprocessor is to hold.
  static constexpr bool kIsWide = sizeof(T) == 8 || std::is_same_v<Param, AnyType> || kHasCodes;
  static constexpr int kBlocks = kIsWide ? kBlocksWide : kVector > 4 ? kBlocks16Bit : kBlocksFloat;

  Column<T, Param> param;
  Column<T, Grad> grad;
  Column<T, Memory> memories[kMemories];
  int length;
  int64_t begin;
  const Rounding& rounding;

  // What the runs of a tensor share.
  struct Tensor {
    int64_t data[2 + kMemories], scales[kMemories], remainder, block;

    static __device__ Tensor of(const Step& s, int64_t unit) {
      const int64_t tensor = layout_at(s, kTensor, unit);
      const auto address = [&](int list) { return s.addresses[list * s.tensors + tensor]; };
      Tensor own = {};
#pragma unroll
      for (int list = 0; list < 2 + kMemories; ++list) own.data[list] = address(list);
      if constexpr (kHasCodes) {
#pragma unroll
        for (int m = 0; m < kMemories; ++m) own.scales[m] = address(kScales + m);
        own.block = layout_at(s, kBlock, unit);
      }
      if constexpr (std::is_same_v<Param, Param16>) own.remainder = address(kScales + kMemories);
      return own;
    }
  };

  __device__ Elements(const Tensor& tensor, const Bucket& b, const Rounding& own, int64_t first,
                      int count)
      : length(count), begin(first), rounding(own) {
    param = param.at(tensor.data[0], begin, b.dtypes[0]);
    grad = grad.at(tensor.data[1], begin, b.dtypes[1]);
#pragma unroll
    for (int m = 0; m < kMemories; ++m) {
      memories[m] = memories[m].at(tensor.data[2 + m], begin, b.dtypes[2 + m]);
      if constexpr (kHasCodes) memories[m].set_scales(tensor.scales[m], begin, tensor.block);
    }
    if constexpr (std::is_same_v<Param, Param16>) {
      if (tensor.remainder != 0)
        param.remainder = reinterpret_cast<int8_t*>(tensor.remainder) + begin;
    }
  }

  // Calls f(piece) for each of the thread's pieces: kVector elements, or single ones where they are
  // not aligned or at the end. Where there are codes, which lanes store together, all lanes of a
  // piece take it, with what they have of it.
  //
  // A thread has the same elements in the same order whether they are aligned or not: alignment
  // does not change a sum's bits.
  template <class F>
  __device__ __forceinline__ void for_each_piece(Team team, F f) const {
    const int width = team.width();
    const int lane = team.rank & (width - 1);
    const int apart = team.size * kVector;
    int first = (team.rank - lane) * kVector, slot = team.rank;
    bool is_aligned = param.is_aligned() && grad.is_aligned();
    for (const auto& memory : memories) is_aligned = is_aligned && memory.is_aligned();
    if constexpr (kHasCodes) {
      for (; first < length; first += apart, slot += team.size) {
        const Piece<kSpan, kVector> piece = {first + lane * kSpan, width, slot, 0};
        if (is_aligned) {
          f(Spans<kSpan, kVector, true>{piece, length});
        } else {
          f(Spans<kSpan, kVector, false>{piece, length});
        }
      }
    } else {
      for (int k = first + lane * kSpan; k < length; k += apart, slot += team.size) {
        const Piece<kSpan, kVector> piece = {k, width, slot, 0};
        if (is_aligned && piece.at(kVector - 1) < length) {
          f(piece);
        } else {
#pragma unroll 1
          for (int j = 0; j < kVector; ++j) {
            const int i = piece.at(j);
            if (i < length) f(Piece<1, 1>{i, width, slot, j});
          }
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
        if (!piece.has(j)) continue;
        if constexpr (kMemories == 2) {
          f(g[j], m[0][j], m[1][j], x[j]);
        } else {
          f(g[j], m[0][j], x[j]);
        }
      }
      if constexpr (kWritten > 0) {
        // In this order registers suffice.
        if constexpr (!kIsLow<Memory>) store_param(piece, x);
        const auto random = random_of_memories(piece);
#pragma unroll
        for (int i = kWritten - 1; i >= 0; --i) store_memory(piece, i, m[i], random);
        if constexpr (kIsLow<Memory>) store_param(piece, x);
      }
    });
  }

  template <Use kUse, bool kReadsParam, class Own, int kCount>
  __device__ __forceinline__ void load(Own piece, T (&g)[kCount], T (&m)[kMemories][kCount],
                                       T (&x)[kCount]) const {
    grad.template load<kUse>(piece, g);
#pragma unroll
    for (int i = 0; i < kMemories; ++i) {
      if constexpr (kHasCodes) {
        memories[i].template load<kUse>(piece, i == 1, m[i]);
      } else {
        memories[i].template load<kUse>(piece, m[i]);
      }
    }
    if (kReadsParam) param.template load<kUse>(piece, x);
  }

  // Asks for the elements that lie so many ahead of a piece's.
  template <class Own>
  __device__ __forceinline__ void prefetch(Own piece, int ahead) const {
    grad.prefetch(piece, ahead);
#pragma unroll
    for (const auto& memory : memories) memory.prefetch(piece, ahead);
    param.prefetch(piece, ahead);
  }

  // What store_memory takes.
  template <class Own>
  __device__ __forceinline__ Random<Own::kCount> random_of_memories(Own piece) const {
    if constexpr (kIsLow<Memory>) return random_of(rounding, rounding.keys.memories, begin, piece);
    return {};
  }

  template <class Own>
  __device__ __forceinline__ void store_memory(Own piece, int i, const T (&in)[Own::kCount],
                                               Random<Own::kCount> random) const {
    if constexpr (kIsLow<Memory>) {
      // exp_avg_sq's are the high ones.
#pragma unroll
      for (uint32_t& word : random.words) word = i == 1 ? word >> 16 : word;
    }
    if constexpr (kHasCodes) {
      memories[i].store(piece, i == 1, in, random);
    } else if constexpr (kIsLow<Memory>) {
      memories[i].store(piece, in, random);
    } else {
      memories[i].store(piece, in);
    }
  }

  template <class Own>
  __device__ __forceinline__ void store_param(Own piece, const T (&in)[Own::kCount]) const {
    if constexpr (std::is_same_v<Param, Param16>) {
      const bool rounds = rounding.rounds != 0;
      Random<Own::kCount> random = {};
      if (rounds) random = random_of(rounding, rounding.keys.param, begin, piece);
      param.store(piece, in, rounds, random);
    } else {
      param.store(piece, in);
    }
  }
};

}  // namespace am::cuda

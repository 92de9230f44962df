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

// How long what is read will be wanted. The sums' data is read again by the update, soon;
// what the update reads and writes is not, and had better leave its place in L2 to others.
enum class Use { kAgain, kLast };

// A list's elements from a chunk's first one on, stored as S, computed with as T.
template <class T, class S>
struct Column {
  static constexpr bool kIsVector = true;
  static constexpr int kBytes = sizeof(S);

  S* data;

  __device__ Column(int64_t address, int64_t begin, int32_t)
      : data(reinterpret_cast<S*>(address) + begin) {}

  __device__ bool is_aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  __device__ T load(int k) const { return widen<T>(data[k]); }
  __device__ void store(int k, T value) const { data[k] = narrow<S>(value); }

  // A thread's kCount elements from the k-th on: spans of kSpan that lie side by side, each in
  // one access, and a warp's width of spans apart.
  template <Use kUse, int kSpan, int kCount>
  __device__ void load_vector(int k, T (&out)[kCount]) const {
    Raw<kSpan, kCount> raw;
    const auto* p = reinterpret_cast<const Word<kSpan>*>(data + k);
#pragma unroll
    for (int w = 0; w < kCount / kSpan; ++w)
      raw.words[w] = kUse == Use::kLast ? __ldcs(p + kWarp * w) : __ldcg(p + kWarp * w);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = widen<T>(raw.elements[j]);
  }

  template <int kSpan, int kCount>
  __device__ void store_vector(int k, const T (&in)[kCount]) const {
    Raw<kSpan, kCount> raw;
#pragma unroll
    for (int j = 0; j < kCount; ++j) raw.elements[j] = narrow<S>(in[j]);
    auto* p = reinterpret_cast<Word<kSpan>*>(data + k);
#pragma unroll
    for (int w = 0; w < kCount / kSpan; ++w) __stcs(p + kWarp * w, raw.words[w]);
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

// A stored type that is known at run time only: for the rare combinations of dtypes.
struct AnyType {};

template <class T>
struct Column<T, AnyType> {
  static constexpr bool kIsVector = false;
  static constexpr int kBytes = 8;

  char* data;
  int32_t dtype;

  __device__ Column(int64_t address, int64_t begin, int32_t stored)
      : data(reinterpret_cast<char*>(address)), dtype(stored) {
    data += begin * bytes_of(dtype);
  }

  template <class S>
  __device__ S& at(int k) const {
    return reinterpret_cast<S*>(data)[k];
  }

  __device__ bool is_aligned() const { return false; }

  __device__ T load(int k) const {
    switch (dtype) {
      case kFloat64:
        return widen<T>(at<double>(k));
      case kBFloat16:
        return widen<T>(at<__nv_bfloat16>(k));
      case kFloat16:
        return widen<T>(at<__half>(k));
      default:
        return widen<T>(at<float>(k));
    }
  }

  __device__ void store(int k, T value) const {
    switch (dtype) {
      case kFloat64:
        at<double>(k) = narrow<double>(value);
        break;
      case kBFloat16:
        at<__nv_bfloat16>(k) = narrow<__nv_bfloat16>(value);
        break;
      case kFloat16:
        at<__half>(k) = narrow<__half>(value);
        break;
      default:
        at<float>(k) = narrow<float>(value);
    }
  }

  // Never called, as nothing is aligned; kept so that one walk serves every column.
  template <Use kUse, int kSpan, int kCount>
  __device__ void load_vector(int, T (&)[kCount]) const {}
  template <int kSpan, int kCount>
  __device__ void store_vector(int, const T (&)[kCount]) const {}
};

// How many elements a thread takes at a time: 16 bytes of the smallest of the stored types.
template <class... Columns>
constexpr int vector_of() {
  int bytes = 8;
  ((bytes = Columns::kBytes < bytes ? Columns::kBytes : bytes), ...);
  return 16 / bytes;
}

// How many of them lie side by side: 16 bytes of the largest. A warp's access to any list then
// takes whole sectors of 32 bytes: were a thread's elements of float32 as many as those of its
// bfloat16, each of two accesses would take half of every sector.
template <class... Columns>
constexpr int span_of() {
  int bytes = 2;
  ((bytes = Columns::kBytes > bytes ? Columns::kBytes : bytes), ...);
  return 16 / bytes;
}

// The blocks that a multiprocessor is to hold, for kernels of this type of arithmetic; and of
// the kernel that does a whole step.
template <class T, class Column>
struct Blocks {
  static constexpr bool kIsWide = sizeof(T) == 8 || !Column::kIsVector;
  static constexpr bool kIs16Bit = Column::kBytes == 2;
  static constexpr int kOf = kIsWide ? kBlocksWide : kIs16Bit ? kBlocks16Bit : kBlocksFloat;
  static constexpr int kOfStep = kIsWide    ? kStepBlocksWide
                                 : kIs16Bit ? kStepBlocks16Bit
                                            : kStepBlocksFloat;
};

}  // namespace am::cuda

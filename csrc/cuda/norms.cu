// The squared norms of gradients, which clip a step or leave it out: they are there before it.
//
//   squares        a block a chunk, whatever its unit: the sum of its gradients' squares.
//   squared_norms  a block a tensor: the sum over its chunks.
//
// The order of all sums is fixed by sizes alone, and no block waits for another.
#include "launches.h"

namespace am::cuda {
namespace {

// Accesses of 16 bytes that a thread has under way at a time.
constexpr int kAccesses = 2;

// Where the largest of a thread's gradients is in between, their squares are summed as they are in
// float: those that are below its range then add nothing.
constexpr float kLeast = 1e-15f;
constexpr float kMost = 1e17f;

// Which of a tensor's elements a chunk holds.
struct Run {
  int64_t tensor, begin;
  int length;

  __device__ Run(const Step& s, int64_t chunk) {
    const int64_t unit = s.chunk_units[chunk];
    tensor = layout_at(s, kTensor, unit);
    if (has_rows(s, unit)) {
      const RowsPlace place(s, chunk);
      begin = place.first * place.numel;
      length = place.count * place.numel;
    } else {
      const Place place(s, chunk);
      begin = place.begin;
      length = place.length;
    }
  }
};

// Calls f(gradient) for each of the thread's elements: the same in the same order, whether they are
// aligned or not.
template <class T, class S, class F>
__device__ __forceinline__ void for_each(const Column<T, S>& grads, int length, F f) {
  constexpr int kVector = 16 / sizeof(S);
  constexpr int kApart = kThreads * kVector;
  const auto take = [&](auto piece) {
    constexpr int kCount = decltype(piece)::kCount;
    T g[kCount];
    grads.template load<Use::kAgain>(piece, g);
#pragma unroll
    for (int j = 0; j < kCount; ++j) f(g[j]);
  };
  const bool is_aligned = grads.is_aligned();
  int k = static_cast<int>(threadIdx.x) * kVector;
  if (is_aligned) {
    constexpr int kLast = (kAccesses - 1) * kApart + kVector;
#pragma unroll 1
    for (; k + kLast <= length; k += kAccesses * kApart)
      take(Piece<kVector, kAccesses * kVector>{k, kThreads, 0, 0});
  }
#pragma unroll 1
  for (; k < length; k += kApart) {
    if (is_aligned && k + kVector <= length) {
      take(Piece<kVector, kVector>{k, kThreads, 0, 0});
    } else {
#pragma unroll 1
      for (int j = k; j < k + kVector && j < length; ++j) take(Piece<1, 1>{j, kThreads, 0, 0});
    }
  }
}

// The sum of the squares of a thread's elements.
template <class S>
__device__ double squares_of(const Column<double, S>& grads, int length) {
  double sum = 0.0;
  for_each(grads, length, [&](double g) { sum = fma(g, g, sum); });
  return sum;
}

template <class S>
__device__ double squares_of(const Column<float, S>& grads, int length) {
  float sum = 0.0f, largest = 0.0f;
  for_each(grads, length, [&](float g) {
    sum = fma(g, g, sum);
    largest = fmaxf(largest, fabsf(g));
  });
  const bool is_small = largest < kLeast && largest > 0.0f;
  const bool is_large = largest > kMost;
  if (!is_small && !is_large) return static_cast<double>(sum);
  // Once more, by a power of 2 that takes all that count into the middle of the range.
  const float factor = is_small ? 0x1p100f : 0x1p-100f;
  sum = 0.0f;
  for_each(grads, length, [&](float g) {
    g *= factor;
    sum = fma(g, g, sum);
  });
  return static_cast<double>(sum) * (is_small ? 0x1p-200 : 0x1p200);
}

// The sum over the block's threads, for thread 0.
__device__ double add_over_block(double sum) {
  __shared__ double warps[kThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (const double warp : warps) total += warp;
  return total;
}

// Backwards: the step begins with the first chunks, which are those that L2 then still holds.
template <class S>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Step step, int64_t first_chunk) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const int64_t chunk = first_chunk + gridDim.x - 1 - blockIdx.x;
  const Run run(step, chunk);
  const int64_t address = step.addresses[step.tensors + run.tensor];
  const auto grads = Column<T, S>::at(address, run.begin, 0);
  const double sum = add_over_block(squares_of(grads, run.length));
  if (threadIdx.x == 0) step.partials[chunk].num = sum;
}

// chunks: [2, tensors], each tensor's first one, and how many it has.
__global__ void __launch_bounds__(kThreads)
    squared_norms_kernel(const __grid_constant__ Step step, const int64_t* chunks, double* norms) {
  const int64_t tensor = blockIdx.x;
  const Sums* partials = step.partials + chunks[tensor];
  const int64_t count = chunks[step.tensors + tensor];
  double sum = 0.0;
#pragma unroll 8
  for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += partials[k].num;
  sum = add_over_block(sum);
  if (threadIdx.x == 0) norms[tensor] = sum;
}

// Calls f with the stored type.
template <class F>
auto dispatch(int dtype, F f) {
  switch (dtype) {
    case kFloat64:
      return f(double());
    case kBFloat16:
      return f(__nv_bfloat16());
    case kFloat16:
      return f(__half());
    default:
      return f(float());
  }
}

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

// Of chunks that lie side by side, whose gradients have one dtype.
int adamem_squares(const Step* step, int64_t first_chunk, int64_t chunks, int dtype, void* stream) {
  return dispatch(dtype, [&](auto stored) {
    return launch(squares_kernel<decltype(stored)>, chunks, *step, stream, *step, first_chunk);
  });
}

int adamem_squared_norms(const Step* step, const int64_t* chunks, double* norms, void* stream) {
  return launch(squared_norms_kernel, step->tensors, *step, stream, *step, chunks, norms);
}

int adamem_squares_load(int dtype, int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load(squared_norms_kernel);
  if (error != cudaSuccess) return error;
  return dispatch(dtype, [](auto stored) { return load(squares_kernel<decltype(stored)>); });
}

}  // extern "C"

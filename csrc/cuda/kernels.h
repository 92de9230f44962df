// The kernels, for an optimizer O of adamw.cu or sgd.cu. No block of any waits for another.
//
//   prepare  a thread a tensor: its Row, in float64; where all of a step is done at once, the beta
//            of a tensor without elements, which has no chunk.
//   begin    a block a chunk: its sums, and the update with the cap for beta where the tensor
//            guesses. The last of a tensor's blocks to get there adds the sums up, for the seam
//            or for beta; a tensor of one chunk is finished at once.
//   beta     a thread a tensor: beta from the seam's rows.
//   finish   what beta has left to do, chunk by chunk.
//
// All of a step and its two halves call the same functions in the same order, and so give the same
// bits.
#pragma once

#include <cuda/atomic>

#include "config.h"
#include "elements.h"
#include "tables.h"

namespace am::cuda {

// What begin does with a tensor, and what it or beta leaves for finish.
enum Begin : int64_t { kNothing, kSums, kGuess };
enum Rest : int64_t { kDone, kRepair, kUpdate };

// What begin and finish read of a tensor, in one place: a line of the table of coefficients.
template <class Coefficients>
struct Row {
  Begin begin;
  Rest rest;
  double amount[2];       // what finish takes, once beta is there
  double step, beta_max;  // the number of steps before this one
  double beta_prod;       // of AM-AdamW
  Coefficients coefficients;
};

// The coefficients in the type of the arithmetic.
template <class T, template <class> class C>
__device__ __forceinline__ C<T> narrow_all(const C<double>& wide) {
  C<T> result;
#pragma unroll
  for (size_t i = 0; i < sizeof(result) / sizeof(T); ++i)
    reinterpret_cast<T*>(&result)[i] = static_cast<T>(reinterpret_cast<const double*>(&wide)[i]);
  return result;
}

// ---- sums -------------------------------------------------------------------------

// The sum over the block's threads in a fixed order, for thread 0.
__device__ inline Sums add_over_block(Sums (&warps)[kThreads / kWarp], double num, double den) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    num += __shfl_down_sync(0xFFFFFFFFu, num, offset);
    den += __shfl_down_sync(0xFFFFFFFFu, den, offset);
  }
  __syncthreads();  // what the last call left was read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = {num, den};
  __syncthreads();
  Sums total = {0.0, 0.0};
  if (threadIdx.x == 0) {
    for (const Sums& warp : warps) {
      total.num += warp.num;
      total.den += warp.den;
    }
  }
  return total;
}

// A tensor's num and den, for thread 0.
__device__ inline Sums add_partials(const Step& s, const Place& place,
                                    Sums (&warps)[kThreads / kWarp]) {
  const Sums* partials = s.partials + layout_at(s, kFirstChunk, place.tensor);
  double num = 0.0, den = 0.0;
#pragma unroll 8
  for (int64_t k = threadIdx.x; k < place.chunks; k += kThreads) {
    num += partials[k].num;
    den += partials[k].den;
  }
  return add_over_block(warps, num, den);
}

// Counts a chunk whose sums were written. True for a tensor's last: all of them can be read then,
// and the counter is ready for the next step.
__device__ inline bool is_last_of_tensor(int32_t& arrived, int64_t chunks) {
  ::cuda::atomic_ref<int32_t, ::cuda::thread_scope_device> counter(arrived);
  if (counter.fetch_add(1, ::cuda::std::memory_order_acq_rel) + 1 < chunks) return false;
  counter.store(0, ::cuda::std::memory_order_relaxed);
  return true;
}

// ---- kernels ----------------------------------------------------------------------

template <class Tensor>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ Step step) {
  const int64_t tensor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tensor >= step.tensors) return;
  Tensor::prepare(step, tensor);
  if (step.rows != nullptr) {
    step.rows[tensor] = {0.0, 0.0};
  } else if (layout_at(step, kNumel, tensor) == 0 && Tensor::row(step, tensor).begin != kNothing) {
    Tensor::set_beta(step, tensor, {0.0, 0.0});
  }
}

template <class O>
__global__ void __launch_bounds__(kThreads, O::Chunk::kBlocks)
    begin_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket) {
  __shared__ Sums warps[kThreads / kWarp];
  __shared__ bool is_last;
  const int64_t k = bucket.first_chunk + blockIdx.x;
  const Place place(step, k);
  auto& row = O::row(step, place.tensor);
  if (row.begin == kNothing) return;
  const typename O::Chunk chunk(step, bucket, place);
  typename O::Compute num = 0, den = 0;
  O::begin(chunk, row, num, den);
  Sums sums = O::chunk_sums(row, add_over_block(warps, num, den));
  if (place.chunks > 1) {
    if (threadIdx.x == 0) {
      step.partials[k] = sums;
      is_last = is_last_of_tensor(step.arrived[place.tensor], place.chunks);
    }
    __syncthreads();
    if (!is_last) return;
    sums = add_partials(step, place, warps);
  }
  if (step.rows != nullptr) {
    if (threadIdx.x == 0) step.rows[place.tensor] = sums;
    return;
  }
  if (threadIdx.x == 0) O::set_beta(step, place.tensor, sums);
  if (place.chunks > 1) return;
  __syncthreads();
  O::finish(chunk, row);
  __syncthreads();
  if (threadIdx.x == 0) row.rest = kDone;
}

// Scalars are as they were when begin was prepared, so that the row is the same again.
template <class Tensor>
__global__ void __launch_bounds__(kThreads) beta_kernel(const __grid_constant__ Step step) {
  const int64_t tensor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tensor >= step.tensors) return;
  const Sums sums = step.rows[tensor];
  Tensor::prepare(step, tensor);
  if (Tensor::row(step, tensor).begin != kNothing) Tensor::set_beta(step, tensor, sums);
}

// Backwards, as the last chunks that begin has read are those that L2 still holds. Each thread
// looks at one of the block's chunks ahead of the work, so that one that is done costs next to
// nothing.
template <class O>
__global__ void __launch_bounds__(kThreads, O::Chunk::kBlocks)
    finish_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket) {
  __shared__ bool is_done[kThreads];
  const int64_t apart = gridDim.x;
  for (int64_t first = bucket.chunks - 1 - blockIdx.x; first >= 0; first -= kThreads * apart) {
    const int64_t own = first - apart * threadIdx.x;
    __syncthreads();
    if (own >= 0)
      is_done[threadIdx.x] =
          O::row(step, step.chunk_tensors[bucket.first_chunk + own]).rest == kDone;
    __syncthreads();
    for (int j = 0; j < kThreads && first - apart * j >= 0; ++j) {
      if (is_done[j]) continue;
      const Place place(step, bucket.first_chunk + first - apart * j);
      O::finish(typename O::Chunk(step, bucket, place), O::row(step, place.tensor));
    }
  }
}

// ---- launches ---------------------------------------------------------------------

// The runtime that is linked in here keeps a current device of its own beside torch's, so
// every launch sets it.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, const Step& step, void* stream,
                   Args... args) {
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(static_cast<int>(step.device));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// A thread a tensor.
inline cudaError_t launch_tensors(void (*kernel)(Step), const Step& step, void* stream) {
  return launch(kernel, (step.tensors + kThreads - 1) / kThreads, step, stream, step);
}

// As many blocks as there are chunks, and no more than the device holds at a time.
inline cudaError_t launch_resident(void (*kernel)(Step, Bucket), const Step& step,
                                   const Bucket& bucket, void* stream) {
  const int device = static_cast<int>(step.device);
  int multiprocessors = 0, each = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(multiprocessors) * each;
  return launch(kernel, bucket.chunks < blocks ? bucket.chunks : blocks, step, stream, step,
                bucket);
}

// Loads a kernel, which CUDA else does at its first launch: a launch that a graph captures must
// not be the first. Fails where the library has no code for the device, or the driver is too old.
template <class... Args>
cudaError_t load(void (*kernel)(Args...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// Calls f with the optimizer for a bucket's dtypes.
template <template <class, class, class, class> class O, class F>
auto dispatch(const Bucket& bucket, F f) {
  const int32_t* dtypes = bucket.dtypes;
  const auto is = [&](DType param, DType grad, DType memory) {
    return dtypes[0] == param && dtypes[1] == grad && dtypes[2] == memory && dtypes[3] == memory;
  };
  if (is(kFloat32, kFloat32, kFloat32)) return f(O<float, float, float, float>());
  if (is(kFloat64, kFloat64, kFloat64)) return f(O<double, double, double, double>());
  if (is(kBFloat16, kBFloat16, kFloat32)) return f(O<float, __nv_bfloat16, __nv_bfloat16, float>());
  if (is(kFloat16, kFloat16, kFloat32)) return f(O<float, __half, __half, float>());
  if (is(kBFloat16, kFloat32, kFloat32)) return f(O<float, __nv_bfloat16, float, float>());
  // Arithmetic in double where the parameter or its memory is.
  if (dtypes[0] == kFloat64 || dtypes[2] == kFloat64 || dtypes[3] == kFloat64)
    return f(O<double, AnyType, AnyType, AnyType>());
  return f(O<float, AnyType, AnyType, AnyType>());
}

template <template <class, class, class, class> class O>
cudaError_t launch_begin(const Step& step, const Bucket& bucket, void* stream) {
  return dispatch<O>(bucket, [&](auto optimizer) {
    return launch(begin_kernel<decltype(optimizer)>, bucket.chunks, step, stream, step, bucket);
  });
}

template <template <class, class, class, class> class O>
cudaError_t launch_finish(const Step& step, const Bucket& bucket, void* stream) {
  return dispatch<O>(bucket, [&](auto optimizer) {
    return launch_resident(finish_kernel<decltype(optimizer)>, step, bucket, stream);
  });
}

// Loads the kernels of a bucket's dtypes.
template <template <class, class, class, class> class O, class Tensor>
cudaError_t load_kernels(const Bucket& bucket, int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load(prepare_kernel<Tensor>);
  if (error == cudaSuccess) error = load(beta_kernel<Tensor>);
  if (error != cudaSuccess) return error;
  return dispatch<O>(bucket, [&](auto optimizer) {
    const cudaError_t error = load(begin_kernel<decltype(optimizer)>);
    return error == cudaSuccess ? load(finish_kernel<decltype(optimizer)>) : error;
  });
}

}  // namespace am::cuda

// The kernels, for an optimizer O of adamw.cu or sgd.cu: stats, beta and apply as launches of
// their own, with a seam between stats and beta, and step, which is all three in one launch.
// Both ways call the same functions in the same order, and so give the same bits.
#pragma once

#include "config.h"
#include "elements.h"
#include "schedule.h"
#include "tables.h"

namespace am::cuda {

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

__device__ inline int64_t chunks_of(const Step& s, int64_t tensor) {
  return (layout_at(s, kNumel, tensor) + kChunk - 1) / kChunk;
}

// A tensor's num and den, for thread 0.
__device__ inline Sums add_partials(const Step& s, int64_t tensor,
                                    Sums (&warps)[kThreads / kWarp]) {
  const int64_t count = chunks_of(s, tensor);
  const Sums* partials = s.partials + layout_at(s, kFirstChunk, tensor);
  double num = 0.0, den = 0.0;
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < count; k += kThreads) {
    num += partials[k].num;
    den += partials[k].den;
  }
  return add_over_block(warps, num, den);
}

// Calls vector(k) where a thread has kVector elements, in spans of kSpan from the k-th on
// that are a warp's width of spans apart; and element(k) for each of what is left, or of all
// where vectors are not aligned. A thread has the same elements in either case, in the same
// order: alignment does not change a sum's bits.
template <int kVector, int kSpan, class V, class E>
__device__ __forceinline__ void for_each_element(int length, bool is_aligned, V vector, E element) {
  constexpr int kApart = kWarp * kSpan;
  const int first = threadIdx.x / kWarp * (kWarp * kVector) + threadIdx.x % kWarp * kSpan;
  for (int k = first; k < length; k += kThreads * kVector) {
    if (is_aligned && k + (kVector / kSpan - 1) * kApart + kSpan <= length) {
      vector(k);
    } else {
#pragma unroll 1
      for (int j = 0; j < kVector; ++j) {
        const int i = k + j / kSpan * kApart + j % kSpan;
        if (i < length) element(i);
      }
    }
  }
}

// ---- a block at work --------------------------------------------------------------

// What a block does with one chunk or one tensor. The scalars of a tensor are worked out by
// one thread and kept as long as chunks of the same tensor follow.
template <class O>
class Worker {
 public:
  struct Shared {
    typename O::Model model;  // for sums, and the tensor that it is of
    int64_t summed;
    typename O::Update update;  // for updates, likewise
    int64_t updated;
    Sums warps[kThreads / kWarp];
  };

  __device__ Worker(const Step& step, const Bucket& bucket, Shared& shared)
      : step_(step), bucket_(bucket), shared_(shared) {
    if (threadIdx.x == 0) shared_.summed = shared_.updated = -1;
    __syncthreads();
  }

  __device__ void sum(int64_t tensor, int64_t chunk) {
    if (tensor != shared_.summed) {
      __syncthreads();
      if (threadIdx.x == 0) {
        O::set_model(step_, tensor, shared_.model);
        shared_.summed = tensor;
      }
      __syncthreads();
    }
    typename O::Compute num = 0, den = 0;
    O::add_sums(typename O::Chunk(step_, bucket_, tensor, chunk * kChunk), length_of(tensor, chunk),
                shared_.model, num, den);
    const Sums sums = add_over_block(shared_.warps, num, den);
    // A tensor without elements has no place in the table.
    if (threadIdx.x == 0 && layout_at(step_, kNumel, tensor) > 0)
      step_.partials[layout_at(step_, kFirstChunk, tensor) + chunk] = sums;
  }

  __device__ void update(int64_t tensor, int64_t chunk) {
    if (tensor != shared_.updated) {
      // The update's numbers are all of one type, as a row of the table is of doubles.
      __syncthreads();
      if (threadIdx.x < O::kColumns)
        reinterpret_cast<typename O::Compute*>(&shared_.update)[threadIdx.x] =
            static_cast<typename O::Compute>(
                step_.coefficients[tensor * O::kColumns + threadIdx.x]);
      if (threadIdx.x == 0) shared_.updated = tensor;
      __syncthreads();
    }
    O::update(typename O::Chunk(step_, bucket_, tensor, chunk * kChunk), length_of(tensor, chunk),
              shared_.update);
  }

 private:
  __device__ int length_of(int64_t tensor, int64_t chunk) const {
    const int64_t rest = layout_at(step_, kNumel, tensor) - chunk * kChunk;
    return static_cast<int>(rest < kChunk ? rest : kChunk);
  }

  const Step& step_;
  const Bucket& bucket_;
  Shared& shared_;
};

// A block of the one launch that does a whole step, see `walk`.
template <class O>
class StepBlock {
 public:
  struct Shared {
    typename Worker<O>::Shared worker;
    int64_t claimed;
    bool is_last;
  };

  __device__ StepBlock(const Step& step, const Bucket& bucket, const Schedule& schedule,
                       Shared& shared)
      : step_(step),
        schedule_(schedule),
        shared_(shared),
        worker_(step, bucket, shared.worker),
        launch_(launch_number(*schedule.control)) {
    if (threadIdx.x == 0) ahead_ = claim_item(*schedule_.control);
  }

  // The item that was claimed at the last call: the counter's answer comes while the item itself
  // is read.
  __device__ int64_t claim() {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.claimed = ahead_;
      ahead_ = claim_item(*schedule_.control);
    }
    __syncthreads();
    return shared_.claimed;
  }

  __device__ Item item(int64_t k) const { return schedule_.items[k]; }
  __device__ void sum(Item item) { worker_.sum(item.tensor, item.chunk); }
  __device__ void update(Item item) { worker_.update(item.tensor, item.chunk); }

  __device__ bool is_last(int32_t tensor) {
    if (threadIdx.x == 0) {
      const int64_t chunks = chunks_of(step_, tensor);
      shared_.is_last = is_last_of_tensor(schedule_.progress[tensor], chunks > 0 ? chunks : 1);
    }
    __syncthreads();
    return shared_.is_last;
  }

  __device__ void set_beta(int32_t tensor) {
    const Sums sums = add_partials(step_, tensor, shared_.worker.warps);
    if (threadIdx.x == 0) {
      O::set_beta(step_, tensor, sums);
      publish(schedule_.progress[tensor], launch_);
    }
  }

  __device__ void wait(int32_t tensor) {
    if (threadIdx.x == 0)
      while (!is_published(schedule_.progress[tensor], launch_)) __nanosleep(100);
    __syncthreads();
  }

  __device__ void leave() {
    if (threadIdx.x == 0) cuda::leave(*schedule_.control, gridDim.x, launch_);
  }

 private:
  const Step& step_;
  const Schedule& schedule_;
  Shared& shared_;
  Worker<O> worker_;
  uint32_t launch_;
  int64_t ahead_ = 0;
};

// ---- kernels ----------------------------------------------------------------------

template <class O>
__global__ void __launch_bounds__(kThreads, O::BlocksOf::kOf)
    stats_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket) {
  __shared__ typename Worker<O>::Shared shared;
  Worker<O> worker(step, bucket, shared);
  for (int64_t k = blockIdx.x; k < bucket.chunks; k += gridDim.x) {
    const int64_t tensor = step.chunk_tensors[bucket.first_chunk + k];
    worker.sum(tensor, bucket.first_chunk + k - layout_at(step, kFirstChunk, tensor));
  }
}

// Backwards, as the last chunks that stats has read are those that L2 still holds.
template <class O>
__global__ void __launch_bounds__(kThreads, O::BlocksOf::kOf)
    apply_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket) {
  __shared__ typename Worker<O>::Shared shared;
  if (is_skipped(step)) return;
  Worker<O> worker(step, bucket, shared);
  for (int64_t k = bucket.chunks - 1 - blockIdx.x; k >= 0; k -= gridDim.x) {
    const int64_t tensor = step.chunk_tensors[bucket.first_chunk + k];
    worker.update(tensor, bucket.first_chunk + k - layout_at(step, kFirstChunk, tensor));
  }
}

template <class O>
__global__ void __launch_bounds__(kThreads, O::BlocksOf::kOfStep)
    step_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket,
                const __grid_constant__ Schedule schedule) {
  __shared__ typename StepBlock<O>::Shared shared;
  if (is_skipped(step)) return;
  StepBlock<O> block(step, bucket, schedule, shared);
  walk(block, schedule.count);
  block.leave();
}

// One block a tensor, of all dtypes.
template <class Tensor>
__global__ void __launch_bounds__(kThreads) beta_kernel(const __grid_constant__ Step step) {
  __shared__ Sums warps[kThreads / kWarp];
  if (is_skipped(step)) return;
  const int64_t tensor = blockIdx.x;
  const Sums sums = step.rows != nullptr ? step.rows[tensor] : add_partials(step, tensor, warps);
  if (threadIdx.x == 0) Tensor::set_beta(step, tensor, sums);
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

// How many blocks of a kernel the device holds at a time.
template <class... Args>
cudaError_t resident_blocks(void (*kernel)(Args...), const Step& step, int64_t* blocks) {
  const int device = static_cast<int>(step.device);
  int multiprocessors = 0, each = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
  *blocks = static_cast<int64_t>(multiprocessors) * each;
  return error;
}

// Loads a kernel, which CUDA else does at its first launch: a launch that a graph captures must
// not be the first. Fails where the library has no code for the device, or the driver is too old.
template <class... Args>
cudaError_t load(void (*kernel)(Args...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// As many blocks as there are items for, and no more than the device holds at a time.
template <class... Args>
cudaError_t launch_resident(void (*kernel)(Args...), int64_t items, const Step& step, void* stream,
                            Args... args) {
  int64_t blocks = 0;
  const cudaError_t error = resident_blocks(kernel, step, &blocks);
  if (error != cudaSuccess) return error;
  return launch(kernel, items < blocks ? items : blocks, step, stream, args...);
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
cudaError_t launch_stats(const Step& step, const Bucket& bucket, void* stream) {
  return dispatch<O>(bucket, [&](auto optimizer) {
    return launch_resident(stats_kernel<decltype(optimizer)>, bucket.chunks, step, stream, step,
                           bucket);
  });
}

template <template <class, class, class, class> class O>
cudaError_t launch_apply(const Step& step, const Bucket& bucket, void* stream) {
  return dispatch<O>(bucket, [&](auto optimizer) {
    return launch_resident(apply_kernel<decltype(optimizer)>, bucket.chunks, step, stream, step,
                           bucket);
  });
}

template <template <class, class, class, class> class O>
cudaError_t launch_step(const Step& step, const Bucket& bucket, const Schedule& schedule,
                        void* stream) {
  return dispatch<O>(bucket, [&](auto optimizer) {
    return launch_resident(step_kernel<decltype(optimizer)>, schedule.count, step, stream, step,
                           bucket, schedule);
  });
}

// Loads the kernels of a bucket's dtypes.
template <template <class, class, class, class> class O, class Tensor>
cudaError_t load_kernels(const Bucket& bucket, int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load(beta_kernel<Tensor>);
  if (error != cudaSuccess) return error;
  return dispatch<O>(bucket, [&](auto optimizer) {
    using Optimizer = decltype(optimizer);
    cudaError_t error = load(stats_kernel<Optimizer>);
    if (error == cudaSuccess) error = load(apply_kernel<Optimizer>);
    if (error == cudaSuccess) error = load(step_kernel<Optimizer>);
    return error;
  });
}

// By how many chunks a bucket's sums are to be ahead of its updates: what takes its share of
// L2, and at least a chunk a block.
template <template <class, class, class, class> class O>
cudaError_t find_chunks_ahead(const Step& step, const Bucket& bucket, int64_t* ahead) {
  cudaError_t error = dispatch<O>(bucket, [&](auto optimizer) {
    return resident_blocks(step_kernel<decltype(optimizer)>, step, ahead);
  });
  int l2_bytes = 0;
  if (error == cudaSuccess)
    error =
        cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, static_cast<int>(step.device));
  int64_t element_bytes = 0;
  for (int list = 0; list < O<float, float, float, float>::kLists; ++list)
    element_bytes += bytes_of(bucket.dtypes[list]);
  const int64_t share = l2_bytes / kShareOfL2 / (kChunk * element_bytes);
  if (share > *ahead) *ahead = share;
  return error;
}

}  // namespace am::cuda

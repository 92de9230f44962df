// The launches, and what is done before the first.
#pragma once

#include "row_kernel.h"

namespace am::cuda {

// The runtime that is linked in here keeps a current device of its own beside torch's, so
// every launch sets it.
template <class... Args>
cudaError_t launch_blocks(void (*kernel)(Args...), int64_t blocks, int threads, size_t bytes,
                          const Step& step, void* stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(static_cast<int>(step.device));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, const Step& step, void* stream,
                   Args... args) {
  return launch_blocks(kernel, blocks, kThreads, 0, step, stream, args...);
}

// A thread a unit.
inline cudaError_t launch_units(void (*kernel)(Step), const Step& step, void* stream) {
  return launch(kernel, (step.units + kThreads - 1) / kThreads, step, stream, step);
}

// What a block on the device can hold of rows.
inline cudaError_t shared_bytes(int device, int* bytes) {
  const cudaError_t error =
      cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes -= 2 * kWarp * sizeof(Sums) + kMostShared;  // rows_kernel's own
  return error;
}

// A block for a row, or kThreads threads for several that a part of a warp takes each.
template <class O>
cudaError_t launch_rows(const Step& step, const Bucket& bucket, void* stream) {
  constexpr int kVector = O::Chunk::kVector;
  constexpr int kMost = most_threads(O::Chunk::kBlocks);
  RowsLaunch rows = {kLeastTeam, 1, 0};
  while (rows.team < kMost && rows.team * kElementsEach < bucket.row) rows.team *= 2;
  const int threads = rows.team > kWarp ? rows.team : kThreads;
  rows.teams = threads / rows.team;
  int bytes = 0;
  if (step.part == kWhole) {
    const cudaError_t error = shared_bytes(static_cast<int>(step.device), &bytes);
    if (error != cudaSuccess) return error;
    const int width = rows.team < kWarp ? rows.team : kWarp;
    const int wanted = (static_cast<int>(bucket.row) + kVector - 1) / kVector;
    const int most_slots = bytes / (rows.teams * HeldBy<O>::kSlotBytes);
    rows.slots = ((wanted < most_slots ? wanted : most_slots) + width - 1) / width * width;
    if (rows.slots > most_slots) rows.slots -= width;
    bytes = rows.teams * rows.slots * HeldBy<O>::kSlotBytes;
  }
  return launch_blocks(rows_kernel<O>, bucket.chunks, threads, bytes, step, stream, step, bucket,
                       rows);
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

// Loads a kernel that is to have as much shared memory as there is.
template <class O>
cudaError_t load_rows(int device) {
  int bytes = 0;
  cudaError_t error = load(rows_kernel<O>);
  if (error == cudaSuccess) error = shared_bytes(device, &bytes);
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(rows_kernel<O>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(rows_kernel<O>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  return error;
}

// Calls f with the optimizer for a bucket's dtypes.
template <template <class, class, class, class> class O, class F>
cudaError_t dispatch(const Bucket& bucket, F f) {
  const int32_t* dtypes = bucket.dtypes;
  const auto is = [&](DType param, DType grad, DType memory) {
    return dtypes[0] == param && dtypes[1] == grad && dtypes[2] == memory && dtypes[3] == memory;
  };
  if (bucket.low != 0) {
    if (is(kFloat32, kFloat32, kBFloat16)) return f(O<float, float, float, Rounded>());
    if (is(kFloat32, kFloat32, kCodes)) return f(O<float, float, float, Codes>());
    if (is(kBFloat16, kBFloat16, kFloat32)) return f(O<float, Param16, __nv_bfloat16, float>());
    if (is(kBFloat16, kBFloat16, kBFloat16)) return f(O<float, Param16, __nv_bfloat16, Rounded>());
    if (is(kBFloat16, kBFloat16, kCodes)) return f(O<float, Param16, __nv_bfloat16, Codes>());
    return cudaErrorInvalidValue;
  }
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
    using Own = decltype(optimizer);
    if (bucket.row > 0) return launch_rows<Own>(step, bucket, stream);
    return launch(begin_kernel<Own>, bucket.chunks, step, stream, step, bucket);
  });
}

// Nothing is left of rows where all of a step is done at once.
template <template <class, class, class, class> class O>
cudaError_t launch_finish(const Step& step, const Bucket& bucket, void* stream) {
  return dispatch<O>(bucket, [&](auto optimizer) {
    using Own = decltype(optimizer);
    if (bucket.row > 0) return launch_rows<Own>(step, bucket, stream);
    return launch_resident(finish_kernel<Own>, step, bucket, stream);
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
    using Own = decltype(optimizer);
    if (bucket.row > 0) return load_rows<Own>(device);
    const cudaError_t error = load(begin_kernel<Own>);
    return error == cudaSuccess ? load(finish_kernel<Own>) : error;
  });
}

}  // namespace am::cuda

// What both optimizers share: sums of tensors, and of tensors that share one beta; the order of
// items; errors.
#include "kernels.h"

namespace am::cuda {
namespace {

// One block a tensor.
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(Step step) {
  __shared__ Sums warps[kThreads / kWarp];
  const int64_t tensor = blockIdx.x;
  const Sums sums = add_partials(step, tensor, warps);
  if (threadIdx.x == 0) step.rows[tensor] = sums;
}

// Gives every tensor of a group that shares its beta the sums over all such tensors. One block.
__global__ void __launch_bounds__(kThreads) share_rows_kernel(Step step, int columns) {
  __shared__ Sums warps[kThreads / kWarp];
  __shared__ Sums total;
  // `shared` is a group's last hyperparameter.
  const auto is_shared = [&](int64_t tensor) {
    const int64_t group = layout_at(step, kGroup, tensor);
    return step.hypers[group * columns + columns - 1] != 0.0;
  };
  double num = 0.0, den = 0.0;
  for (int64_t tensor = threadIdx.x; tensor < step.tensors; tensor += kThreads) {
    if (!is_shared(tensor)) continue;
    num += step.rows[tensor].num;
    den += step.rows[tensor].den;
  }
  const Sums sums = add_over_block(warps, num, den);
  if (threadIdx.x == 0) total = sums;
  __syncthreads();
  for (int64_t tensor = threadIdx.x; tensor < step.tensors; tensor += kThreads)
    if (is_shared(tensor)) step.rows[tensor] = total;
}

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_sum_rows(const Step* step, void* stream) {
  return launch(sum_rows_kernel, step->tensors, *step, stream, *step);
}

int adamem_share_rows(const Step* step, int columns, void* stream) {
  return launch(share_rows_kernel, 1, *step, stream, *step, columns);
}

// Whether the library runs on a device, and the versions of CUDA that it was compiled with and
// that the driver has, as 1000 * major + 10 * minor.
int adamem_check(int device, int* compiled, int* driver) {
  cudaError_t error = cudaRuntimeGetVersion(compiled);
  if (error == cudaSuccess) error = cudaDriverGetVersion(driver);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load(sum_rows_kernel);
  if (error == cudaSuccess) error = load(share_rows_kernel);
  return error;
}

int adamem_chunk() { return kChunk; }

const char* adamem_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"

// What both optimizers share: the sums of tensors that share one beta; errors.
#include "kernels.h"

namespace am::cuda {
namespace {

// Gives every tensor of a group that shares its beta the sums over all such tensors. One block.
// lists, columns: rows of `addresses` before the scalars, and of hyperparameters.
__global__ void __launch_bounds__(kThreads) share_rows_kernel(Step step, int lists, int columns) {
  __shared__ Sums warps[kThreads / kWarp];
  __shared__ Sums total;
  // `shared` is a group's last hyperparameter.
  const auto is_shared = [&](int64_t tensor) {
    const int64_t group = layout_at(step, kGroup, tensor);
    return step.hypers[group * columns + columns - 1] != 0.0;
  };
  // A first step needs no sums but to see whether it is one, which it can be at eta = 0 alone.
  const auto keeps_its_own = [&](int64_t tensor) {
    return read_lr(step, layout_at(step, kGroup, tensor), columns) == 0.0 &&
           read_scalar(step, lists, 0, tensor) == 0.0;
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
    if (is_shared(tensor) && !keeps_its_own(tensor)) step.rows[tensor] = total;
}

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_share_rows(const Step* step, int lists, int columns, void* stream) {
  return launch(share_rows_kernel, 1, *step, stream, *step, lists, columns);
}

// Whether the library runs on a device, and the versions of CUDA that it was compiled with and
// that the driver has, as 1000 * major + 10 * minor.
int adamem_check(int device, int* compiled, int* driver) {
  cudaError_t error = cudaRuntimeGetVersion(compiled);
  if (error == cudaSuccess) error = cudaDriverGetVersion(driver);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load(share_rows_kernel);
  return error;
}

int adamem_chunk() { return kChunk; }

const char* adamem_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"

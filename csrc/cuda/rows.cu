// What both optimizers share: the sums of tensors that share one beta; errors.
#include "launches.h"

namespace am::cuda {
namespace {

// Gives every tensor of a group that shares its beta the sums over all such tensors. One block.
// Such a tensor is an ordinary unit. lists, columns: rows of `addresses` before the scalars, and of
// hyperparameters.
__global__ void __launch_bounds__(kThreads) share_rows_kernel(Step step, int lists, int columns) {
  __shared__ Sums warps[kThreads / kWarp];
  __shared__ Sums total;
  // `shared` is a group's last hyperparameter.
  const auto is_shared = [&](int64_t unit) {
    const int64_t group = layout_at(step, kGroup, unit);
    return step.hypers[group * columns + columns - 1] != 0.0;
  };
  // A first step needs no sums but to see whether it is one, which it can be at eta = 0 alone.
  const auto keeps_its_own = [&](int64_t unit) {
    return read_lr(step, layout_at(step, kGroup, unit), columns) == 0.0 &&
           Scalars<1>::of(step, lists, unit).read(0) == 0.0;
  };
  const auto own = [&](int64_t unit) -> Sums& {
    return step.rows[layout_at(step, kFirstSegment, unit)];
  };
  double num = 0.0, den = 0.0;
  for (int64_t unit = threadIdx.x; unit < step.units; unit += kThreads) {
    if (!is_shared(unit)) continue;
    num += own(unit).num;
    den += own(unit).den;
  }
  const Sums sums = add_over_block(warps, num, den);
  if (threadIdx.x == 0) total = sums;
  __syncthreads();
  for (int64_t unit = threadIdx.x; unit < step.units; unit += kThreads)
    if (is_shared(unit) && !keeps_its_own(unit)) own(unit) = total;
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

// How many elements of float32 a row may have whose terms a block on the device is to hold.
int adamem_longest_row(int device, int* longest) {
  int bytes = 0;
  const cudaError_t error = shared_bytes(device, &bytes);
  // By whole pieces of a warp, so that one bound holds for all dtypes.
  *longest = bytes / (kMostHeld * static_cast<int>(sizeof(float))) / kPiece * kPiece;
  return error;
}

const char* adamem_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"

// The kernels, for an optimizer O of adamw.cu or sgd.cu. No block of any waits for another.
//
//   prepare  a thread a unit: its Row, in float64; where all of a step is done at once, the beta
//            of an ordinary unit without elements, which has no chunk; the step of a unit of rows.
//   begin    a block a chunk: its sums, and the update with the cap for beta where the unit
//            guesses. The last of a unit's blocks to get there adds the sums up, for the seam
//            or for beta; a unit of one chunk is finished at once.
//   beta     a thread an ordinary unit: beta from the seam's rows.
//   finish   what beta has left to do, chunk by chunk.
//   rows     for units of rows, in place of the last three: see row_kernel.h.
//
// All of a step and its two halves call the same functions in the same order, and so give the same
// bits.
#pragma once

#include <cuda/atomic>

#include "config.h"
#include "elements.h"
#include "tables.h"

namespace am::cuda {

// What begin does with a unit (with one of rows, nothing or not), and what it or beta leaves for
// finish.
enum Begin : int64_t { kNothing, kSums, kGuess };
enum Rest : int64_t { kDone, kRepair, kUpdate };

// What begin and finish read of a unit, in one place: a line of the table of coefficients.
template <class Coefficients>
struct Row {
  Begin begin;
  Rest rest;
  double amount[2];       // what finish takes, once beta is there
  double step, beta_max;  // the number of steps before this one
  Rounding rounding;
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

// Whether the step may be none, if its sums say so: see is_idle.
template <class Coefficients>
__device__ inline bool may_be_none(const Row<Coefficients>& row) {
  return row.step == 0.0 && row.coefficients.lr == 0.0;
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

// A unit's num and den, for thread 0.
__device__ inline Sums add_partials(const Step& s, const Place& place,
                                    Sums (&warps)[kThreads / kWarp]) {
  const Sums* partials = s.partials + layout_at(s, kFirstChunk, place.unit);
  double num = 0.0, den = 0.0;
#pragma unroll 8
  for (int64_t k = threadIdx.x; k < place.chunks; k += kThreads) {
    num += partials[k].num;
    den += partials[k].den;
  }
  return add_over_block(warps, num, den);
}

// Counts a chunk whose sums were written. True for a unit's last: all of them can be read then,
// and the counter is ready for the next step.
__device__ inline bool is_last_of_unit(int32_t& arrived, int64_t chunks) {
  ::cuda::atomic_ref<int32_t, ::cuda::thread_scope_device> counter(arrived);
  if (counter.fetch_add(1, ::cuda::std::memory_order_acq_rel) + 1 < chunks) return false;
  counter.store(0, ::cuda::std::memory_order_relaxed);
  return true;
}

// ---- kernels ----------------------------------------------------------------------

template <class Tensor>
__global__ void __launch_bounds__(kThreads, 1) prepare_kernel(const __grid_constant__ Step step) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= step.units) return;
  Tensor::prepare(step, unit);
  auto& row = Tensor::row(step, unit);
  row.rounding = Rounding::of(step, unit, row.step);
  if (has_rows(step, unit)) {
    // No other unit reads this tensor's step. Where it may be none, its rows know.
    if (step.part != kBegin && row.begin != kNothing && !may_be_none(row))
      Tensor::write_step(Tensor::scalars(step, unit), row);
  } else if (step.part == kFinish) {
    return;
  } else if (step.rows != nullptr) {
    step.rows[layout_at(step, kFirstSegment, unit)] = {0.0, 0.0};
  } else if (layout_at(step, kNumel, unit) == 0 && row.begin != kNothing) {
    Tensor::set_beta(step, unit, {0.0, 0.0});
  }
}

template <class O>
__global__ void __launch_bounds__(kThreads, O::Chunk::kBlocks)
    begin_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket) {
  __shared__ Sums warps[kThreads / kWarp];
  __shared__ bool is_last;
  const int64_t k = bucket.first_chunk + blockIdx.x;
  const Place place(step, k);
  auto& row = O::row(step, place.unit);
  if (row.begin == kNothing) return;
  const typename O::Chunk chunk(O::Chunk::Tensor::of(step, place.unit), bucket, row.rounding,
                                place.begin, place.length);
  typename O::Compute num = 0, den = 0;
  O::begin(chunk, row, num, den);
  Sums sums = O::chunk_sums(row, add_over_block(warps, num, den));
  if (place.chunks > 1) {
    if (threadIdx.x == 0) {
      step.partials[k] = sums;
      is_last = is_last_of_unit(step.arrived[place.unit], place.chunks);
    }
    __syncthreads();
    if (!is_last) return;
    sums = add_partials(step, place, warps);
  }
  if (step.rows != nullptr) {
    if (threadIdx.x == 0) step.rows[layout_at(step, kFirstSegment, place.unit)] = sums;
    return;
  }
  if (threadIdx.x == 0) O::set_beta(step, place.unit, sums);
  if (place.chunks > 1) return;
  __syncthreads();
  O::finish(chunk, row);
  __syncthreads();
  if (threadIdx.x == 0) row.rest = kDone;
}

// After prepare: a tensor's step is written here, and has been read for all of its units.
template <class Tensor>
__global__ void __launch_bounds__(kThreads) beta_kernel(const __grid_constant__ Step step) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= step.units || has_rows(step, unit)) return;
  if (Tensor::row(step, unit).begin != kNothing)
    Tensor::set_beta(step, unit, step.rows[layout_at(step, kFirstSegment, unit)]);
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
      is_done[threadIdx.x] = O::row(step, step.chunk_units[bucket.first_chunk + own]).rest == kDone;
    __syncthreads();
    for (int j = 0; j < kThreads && first - apart * j >= 0; ++j) {
      if (is_done[j]) continue;
      const Place place(step, bucket.first_chunk + first - apart * j);
      const auto& row = O::row(step, place.unit);
      const typename O::Chunk chunk(O::Chunk::Tensor::of(step, place.unit), bucket, row.rounding,
                                    place.begin, place.length);
      O::finish(chunk, row);
    }
  }
}

}  // namespace am::cuda

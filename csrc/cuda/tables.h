// The tables through which the kernels find a step's tensors, in device memory. They are laid
// out by adamem_fused/backends/tables.py, one column a tensor, and read by the Triton kernels too
// (triton_kernels/tables.py). Everything is found by 64-bit offsets.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../am_math.h"
#include "config.h"

namespace am::cuda {

enum DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

struct Sums {
  double num, den;
};

// What all launches of a step share. adamem_fused/backends/cuda.py holds the same struct.
struct Step {
  const int64_t* addresses;      // [lists, tensors]: param, grad, the memories, the scalars
  const int64_t* layout;         // [5, tensors], rows below
  const double* hypers;          // [groups, columns]
  const int64_t* lrs;            // [groups]: twice the address of a group's lr on the device,
                                 // plus 1 for float64; 0: it is in hypers
  const int32_t* chunk_tensors;  // [chunks]: each chunk's tensor
  Sums* partials;                // [chunks]
  int32_t* arrived;              // [tensors]: chunks whose partials are there; 0 between steps
  Sums* rows;                    // [tensors] of the seam, or null: all of a step at once
  double* coefficients;          // [tensors, columns]: a Row for each, see kernels.h
  const float* grad_scale;       // or null
  const float* found_inf;        // or null; not 0: nothing is written but rows and scratch
  int64_t tensors;
  int64_t device;  // that all of them are on
};

// Tensors of one combination of dtypes; their chunks lie side by side.
struct Bucket {
  int64_t first_chunk, chunks;
  int32_t dtypes[4];  // DType of param, grad and the memories
};

// Rows of `layout`. Bit k of kDoubles: scalar k of the tensor is float64, and not float32. kExact:
// whether parameter and memories are stored in the type of the arithmetic.
enum LayoutRow { kNumel, kGroup, kFirstChunk, kDoubles, kExact };

__device__ inline int64_t layout_at(const Step& s, LayoutRow row, int64_t tensor) {
  return s.layout[row * s.tensors + tensor];
}

// Which elements a chunk holds, and of how many chunks its tensor has it is one.
struct Place {
  int64_t tensor, begin, chunks;
  int length;

  __device__ Place(const Step& s, int64_t chunk) : tensor(s.chunk_tensors[chunk]) {
    const int64_t numel = layout_at(s, kNumel, tensor);
    begin = (chunk - layout_at(s, kFirstChunk, tensor)) * kChunk;
    length = static_cast<int>(numel - begin < kChunk ? numel - begin : kChunk);
    chunks = (numel + kChunk - 1) / kChunk;
  }
};

__device__ inline double read_number(int64_t address, bool is_double) {
  return is_double ? *reinterpret_cast<const double*>(address)
                   : static_cast<double>(*reinterpret_cast<const float*>(address));
}

// Scalar k of a tensor's state; the scalars' rows of `addresses` start at `first`.
__device__ inline double read_scalar(const Step& s, int first, int k, int64_t tensor) {
  return read_number(s.addresses[(first + k) * s.tensors + tensor],
                     layout_at(s, kDoubles, tensor) >> k & 1);
}

__device__ inline void write_scalar(const Step& s, int first, int k, int64_t tensor, double value) {
  const int64_t address = s.addresses[(first + k) * s.tensors + tensor];
  if (layout_at(s, kDoubles, tensor) >> k & 1) {
    *reinterpret_cast<double*>(address) = value;
  } else {
    *reinterpret_cast<float*>(address) = static_cast<float>(value);
  }
}

__device__ inline double read_lr(const Step& s, int64_t group, int columns) {
  const int64_t tagged = s.lrs[group];
  return tagged == 0 ? s.hypers[group * columns] : read_number(tagged >> 1, tagged & 1);
}

__device__ inline double read_grad_scale(const Step& s) {
  return s.grad_scale == nullptr ? 1.0 : static_cast<double>(*s.grad_scale);
}

__device__ inline bool is_skipped(const Step& s) {
  return s.found_inf != nullptr && *s.found_inf != 0.0f;
}

}  // namespace am::cuda

// The tables through which the kernels find a step's tensors, in device memory. They are laid
// out by adamem_fused/backends/tables.py, one column a unit, and read by the Triton kernels too
// (triton_kernels/tables.py). Everything is found by 64-bit offsets.
//
// A unit is what has coefficients of its own: an ordinary one, which is one segment (a tensor, or a
// row of one whose rows are long), or a unit of rows, which is a tensor whose rows are short.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../am_math.h"
#include "config.h"

namespace am::cuda {

enum DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kCodes };

constexpr int64_t bytes_of(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

struct Sums {
  double num, den;
};

// What of a step is done: all of it, or a half. With all of it rows are there where tensors share a
// beta, and units of rows do not look at them.
enum Part : int64_t { kWhole, kBegin, kFinish };

// What all launches of a step share. adamem_fused/backends/cuda.py holds the same struct.
struct Step {
  const int64_t* addresses;  // [lists, tensors]: param, grad, the memories, the scalars, and where
                             // something is packed scales of each memory and remainders
  const int64_t* layout;     // [15, units], rows below
  const double* hypers;      // [groups, columns]
  const int64_t* lrs;        // [groups]: twice the address of a group's lr on the device,
                             // plus 1 for float64; 0: it is in hypers
  const int32_t* chunk_units;  // [chunks]: each chunk's unit
  Sums* partials;              // [chunks]
  int32_t* arrived;            // [units]: chunks whose partials are there; 0 between steps
  Sums* rows;                  // [segments] of the seam, or null
  double* coefficients;        // [units, columns]: a Row for each, see kernels.h
  int64_t grad_scale;          // as a group's lr; 0: there is none
  const float* found_inf;      // or null; not 0: nothing is written but rows and scratch
  int64_t tensors, units;
  int64_t device;  // that all of them are on
  Part part;
};

// Units of one combination of dtypes; their chunks lie side by side.
struct Bucket {
  int64_t first_chunk, chunks;
  int64_t row;        // a power of 2 that the longest of their rows has at most; 0: ordinary units
  int64_t low;        // whether something of them is stored in few bits
  int32_t dtypes[4];  // DType of param, grad and the memories
};

// Rows of `layout`. kNumel: elements of the segment, or of a row. Bit k of kDoubles: scalar k of
// the tensor is float64, and not float32. kExact: whether parameter and memories are stored in the
// type of the arithmetic, or a guess may be made all the same (Packed.may_guess). kRow: of an
// ordinary unit, which of its tensor's rows it is; 0 where it is all of it. kRows: how many a unit
// of rows has. kFirstSegment: its place in the seam's rows. kKey to kRounds: the tensor's column of
// Packed.rounding (adamem_fused/backends/batch.py), kBlock: the elements that share a scale; 0
// where nothing is packed.
enum LayoutRow {
  kNumel,
  kGroup,
  kFirstChunk,
  kDoubles,
  kExact,
  kTensor,
  kRow,
  kRows,
  kFirstSegment,
  kKey,
  kOffset,
  kStretch,
  kSkip,
  kRounds,
  kBlock
};

constexpr int64_t kNoRows = -1;

__device__ inline int64_t layout_at(const Step& s, LayoutRow row, int64_t unit) {
  return s.layout[row * s.units + unit];
}

__device__ inline bool has_rows(const Step& s, int64_t unit) {
  return layout_at(s, kRows, unit) != kNoRows;
}

// Which elements of its tensor a chunk of an ordinary unit holds, and of how many chunks it is one.
struct Place {
  int64_t unit, begin, chunks;
  int length;

  __device__ Place(const Step& s, int64_t chunk) : unit(s.chunk_units[chunk]) {
    const int64_t numel = layout_at(s, kNumel, unit);
    const int64_t own = (chunk - layout_at(s, kFirstChunk, unit)) * kChunk;
    begin = layout_at(s, kRow, unit) * numel + own;
    length = static_cast<int>(numel - own < kChunk ? numel - own : kChunk);
    chunks = (numel + kChunk - 1) / kChunk;
  }
};

// Which rows a chunk of a unit of rows holds, and how long they are.
struct RowsPlace {
  int64_t unit, first;
  int count, numel;

  __device__ RowsPlace(const Step& s, int64_t chunk) : unit(s.chunk_units[chunk]) {
    numel = static_cast<int>(layout_at(s, kNumel, unit));
    count = numel > kChunk ? 1 : kChunk / (numel > 0 ? numel : 1);
    first = (chunk - layout_at(s, kFirstChunk, unit)) * count;
    const int64_t left = layout_at(s, kRows, unit) - first;
    if (left < count) count = static_cast<int>(left);
  }
};

__device__ inline double read_number(int64_t address, bool is_double, int64_t index = 0) {
  return is_double ? reinterpret_cast<const double*>(address)[index]
                   : static_cast<double>(reinterpret_cast<const float*>(address)[index]);
}

// The scalars of the state of a unit's tensor, or of each of the tensor's rows; their rows of
// `addresses` start at `first`.
template <int kCount>
struct Scalars {
  int64_t addresses[kCount], doubles;

  static __device__ Scalars of(const Step& s, int first, int64_t unit) {
    Scalars own;
    const int64_t tensor = layout_at(s, kTensor, unit);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      own.addresses[k] = s.addresses[(first + k) * s.tensors + tensor];
    own.doubles = layout_at(s, kDoubles, unit);
    return own;
  }

  __device__ double read(int k, int64_t row = 0) const {
    return read_number(addresses[k], doubles >> k & 1, row);
  }

  __device__ void write(int k, double value, int64_t row = 0) const {
    if (doubles >> k & 1) {
      reinterpret_cast<double*>(addresses[k])[row] = value;
    } else {
      reinterpret_cast<float*>(addresses[k])[row] = static_cast<float>(value);
    }
  }
};

__device__ inline double read_lr(const Step& s, int64_t group, int columns) {
  const int64_t tagged = s.lrs[group];
  return tagged == 0 ? s.hypers[group * columns] : read_number(tagged >> 1, tagged & 1);
}

__device__ inline double read_grad_scale(const Step& s) {
  return s.grad_scale == 0 ? 1.0 : read_number(s.grad_scale >> 1, s.grad_scale & 1);
}

__device__ inline bool is_skipped(const Step& s) {
  return s.found_inf != nullptr && *s.found_inf != 0.0f;
}

}  // namespace am::cuda

// The CPU kernels' interface: free of torch, one table of functions for each
// instruction set. A call works on one chunk, a contiguous piece of one tensor.
#pragma once

#include <cstdint>

#include "../am_math.h"

namespace am::cpu {

// As AM_INLINE.
#define AM_MEMBER inline __attribute__((always_inline))

// Type of parameter and gradient. The memory's type is double for float64 and float
// for the others, and the arithmetic is done in it.
enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kNumDTypes };

struct AdamWChunk {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t numel;
};

struct SGDChunk {
  void* param;
  const void* grad;
  void* momentum_buffer;
  int64_t numel;
};

struct Sums {
  double num, den;
};

// Numbers of a tensor's state, float or double: one, or one a row.
struct Column {
  void* data = nullptr;
  bool is_double = false;

  AM_MEMBER double read(int64_t i = 0) const {
    return is_double ? static_cast<double*>(data)[i] : static_cast<float*>(data)[i];
  }
  AM_MEMBER void write(double value, int64_t i = 0) const {
    if (is_double) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
};

// Rows that lie one behind the other, of which each has a beta.
struct AdamWRows {
  AdamWChunk first;  // its numel is that of a row
  int64_t rows;
  Column beta_prods, betas;
  int64_t index;  // of the first row, in these
  double beta_max, step;
  void* scratch;  // for two rows, kRowScratch numbers for each element, and room for a pack
};

// What a row's update takes that its sums have worked out is kept: two numbers an element.
constexpr int64_t kRowScratch = 2;

struct Kernels {
  Sums (*adamw_sums[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&);
  // The sums, and the update with the cap for beta.
  Sums (*adamw_guess[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&);
  void (*adamw_update[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&,
                                   double take);
  // All of a step of rows, with coefficients that are not yet corrected for beta_prod.
  void (*adamw_rows[kNumDTypes])(const AdamWRows&, const AdamWCoefficients<double>&);
  // Of the guess. miss: (beta_max - beta) / beta_max.
  void (*adamw_repair[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&,
                                   double miss);
  Sums (*sgd_sums[kNumDTypes])(const SGDChunk&, const SGDCoefficients<double>&);
  void (*sgd_update[kNumDTypes])(const SGDChunk&, const SGDCoefficients<double>&, double keep,
                                 double take);
  // The sum of the elements' squares.
  double (*squares[kNumDTypes])(const void* data, int64_t numel);
};

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Those that torch would choose, so that ATEN_CPU_CAPABILITY rules this package too.
const Kernels& kernels();

}  // namespace am::cpu

// The CPU kernels' interface: free of torch, one table of functions for each
// instruction set. A call works on one chunk, a contiguous piece of one tensor.
#pragma once

#include <cstdint>

#include "../am_math.h"

namespace am::cpu {

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

struct Kernels {
  Sums (*adamw_sums[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&);
  // The sums, and the update with the cap for beta.
  Sums (*adamw_guess[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&);
  void (*adamw_update[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&,
                                   double take);
  // Of the guess. miss: (beta_max - beta) / beta_max.
  void (*adamw_repair[kNumDTypes])(const AdamWChunk&, const AdamWCoefficients<double>&,
                                   double miss);
  Sums (*sgd_sums[kNumDTypes])(const SGDChunk&, const SGDCoefficients<double>&);
  void (*sgd_update[kNumDTypes])(const SGDChunk&, const SGDCoefficients<double>&, double keep,
                                 double take);
};

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace am::cpu

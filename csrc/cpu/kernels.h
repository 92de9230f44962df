// The CPU kernels' interface: free of torch, one table of functions for each
// instruction set. A call works on one chunk, a contiguous piece of one tensor.
#pragma once

#include <cstdint>

#include "../am_math.h"
#include "../formats.h"
#include "library.h"

namespace am::cpu {

// As AM_INLINE.
#define AM_MEMBER inline __attribute__((always_inline))

constexpr int64_t bytes_of(DType dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

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
  void* scratch;  // for two rows, kRowScratch numbers for each element, and room for two packs;
                  // begins with a line of the cache
};

// What a row's update takes that its sums have worked out is kept: two numbers an element.
constexpr int64_t kRowScratch = 2;

// What is stored in few bits, as adamem_fused/formats.py says.

struct LowMemory {
  void* data = nullptr;
  Format format = kFloats;
  float* scales = nullptr;
  int64_t block = 0;  // elements of each scale
};

// A tensor, float32 or bfloat16, of which something is stored so.
struct LowTensor {
  DType dtype;  // of parameter and gradient
  void* param;
  const void* grad;
  LowMemory memories[2];
  uint8_t* remainder;             // of int8
  bool rounds;                    // the parameter, stochastically
  bool may_guess;                 // see Packed.may_guess of adamem_fused/backends/batch.py
  int64_t offset, stretch, skip;  // where it lies in the whole tensor, see formats.places
  StepKeys keys;

  // Whether the kernels are not to work on parameter and gradient in their place.
  AM_MEMBER bool is_param_staged() const { return rounds || remainder != nullptr; }
  AM_MEMBER DType kernel_dtype() const { return is_param_staged() ? kFloat32 : dtype; }
};

// From an element on, which is the first of a block.
struct LowChunk {
  const LowTensor* tensor;
  int64_t begin, numel;
};

struct LowAdamWRows {
  LowChunk first;   // its numel is that of a row
  AdamWRows rows;   // without their data
  int64_t at_once;  // as many rows are in float32 at a time
  float* room;      // for them: kLowRoom numbers for each element, and room for a pack of each
};

constexpr int64_t kLowRoom = 4;

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
  // Of what is stored in few bits.
  Sums (*low_adamw_sums)(const LowChunk&, const AdamWCoefficients<double>&);
  Sums (*low_adamw_guess)(const LowChunk&, const AdamWCoefficients<double>&);
  void (*low_adamw_update)(const LowChunk&, const AdamWCoefficients<double>&, double take);
  void (*low_adamw_repair)(const LowChunk&, const AdamWCoefficients<double>&, double miss);
  void (*low_adamw_rows)(const LowAdamWRows&, const AdamWCoefficients<double>&);
  Sums (*low_sgd_sums)(const LowChunk&, const SGDCoefficients<double>&);
  void (*low_sgd_update)(const LowChunk&, const SGDCoefficients<double>&, double keep, double take);
  // The sum of the elements' squares.
  double (*squares[kNumDTypes])(const void* data, int64_t numel);
};

#if defined(__aarch64__)
extern const Kernels kernels_neon;
#else
extern const Kernels kernels_default;
#endif
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Those that were chosen.
const Kernels& kernels();

}  // namespace am::cpu

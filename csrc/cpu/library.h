// The CPU kernels as a library of their own, _cpu.so, which knows no torch: a step is handed over
// as tables of pointers. Two callers: csrc/torch, and Python through ctypes
// (adamem_fused/backends/cpu_library.py), which writes the tables as words of 8 bytes; hence
// int64_t for whatever is no pointer and no double.
//
// Nothing is checked here. A tensor's elements lie densely, in one order for all that it has.
#pragma once

#include <cstdint>

namespace am::cpu {

// Other layouts of these tables, or other functions, have another number.
constexpr int64_t kInterface = 1;

// Type of parameter and gradient. The memory's type is double for float64 and float
// for the others, and the arithmetic is done in it.
enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kNumDTypes };

// How a memory is stored where it may be in few bits: float32, bfloat16, or the codes of
// adamem_fused/formats.py, int8 and uint8.
enum Format { kFloats, kShorts, kSignedCodes, kSquareCodes };

// The scalars of a tensor's state, in the bits of StepTensor.doubles.
enum Scalar { kStep, kPrevLr, kBeta, kBetaProd };

constexpr int64_t kNoRows = -1;

// What a tensor has beside where something of it is stored in few bits: Packed of
// adamem_fused/backends/batch.py. It is then float32 or bfloat16.
struct PackedTensor {
  int64_t formats[2];  // of the memories, Format
  float* scales[2];    // of codes, one for each block
  int64_t blocks[2];   // elements of a block
  uint8_t* remainder;  // int8, or null
  int64_t rounds;      // whether the parameter is rounded stochastically
  int64_t key, offset, stretch, skip;
};

struct StepTensor {
  void* param;
  const void* grad;
  void* memories[2];  // exp_avg and exp_avg_sq, or momentum_buffer
  void* scalars[4];   // by Scalar, float32 or float64; beta_prod only of AM-AdamW
  int64_t doubles;    // bit k: whether scalar k is float64
  int64_t numel;
  int64_t rows;   // each of which has a beta and beta_prod for itself; or kNoRows
  int64_t dtype;  // DType
  // Whether memory and parameter are of one type and the gradient is another tensor: then a guess
  // can be repaired. Not looked at where `packed` is there.
  int64_t may_guess;
  const PackedTensor* packed;  // or null
};

// Runs f(context, part) for the parts 0 ... parts - 1, each once, on any number of threads.
using ParallelFor = void (*)(int64_t parts, void (*f)(void* context, int64_t part), void* context);

struct Threads {
  int64_t count;
  ParallelFor parallel_for;  // null: the threads of an OpenMP in the process, or else new ones
};

struct Step {
  const StepTensor* tensors;
  int64_t size;                // of them
  const int64_t* group_sizes;  // how many of them belong to each group, in order
  const double* lrs;           // of the groups
  const double* hypers;        // their other hyperparameters, as adamem_fused/backends/ops.py says
  int64_t groups;
  double grad_scale;
  Threads threads;
};

// Some memory, of which the sum of squares is asked for.
struct Elements {
  const void* data;
  int64_t dtype, numel;
};

}  // namespace am::cpu

// All else in the library is hidden.
#pragma GCC visibility push(default)

extern "C" {

int64_t adamem_cpu_interface();

// Which kernels run from now on, by torch.backends.cpu.get_cpu_capability().
void adamem_cpu_choose(const char* capability);

// The two halves of a step. rows: num and den of every segment; null where `finish` is to do all of
// the step, in which tensors of groups that are `shared` then take the sums over all of them.
// guessed, counted: of each tensor, a byte: whether `begin` has updated it, and whether the step
// counts as one of its: else nothing of it has changed.
void adamem_cpu_adamw_begin(const am::cpu::Step* step, double* rows, uint8_t* guessed);
void adamem_cpu_adamw_finish(const am::cpu::Step* step, const double* rows, uint8_t* counted);
void adamem_cpu_sgd_begin(const am::cpu::Step* step, double* rows);
void adamem_cpu_sgd_finish(const am::cpu::Step* step, const double* rows, uint8_t* counted);

// The sum of each one's squares. The same bits with any number of threads.
void adamem_cpu_squares(const am::cpu::Elements* elements, int64_t size,
                        const am::cpu::Threads* threads, double* squares);

}  // extern "C"

#pragma GCC visibility pop

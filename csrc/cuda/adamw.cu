// AM-AdamW. Rows of `addresses`: param, grad, exp_avg, exp_avg_sq, step, beta_prod, prev_lr,
// beta.
#include "kernels.h"

namespace am::cuda {
namespace {

// What does not depend on the dtypes.
struct AdamWTensor {
  using TensorRow = Row<AdamWCoefficients<double>>;
  static constexpr int kLists = 4;
  static constexpr int kColumns = sizeof(TensorRow) / sizeof(double);
  enum Scalar { kStep, kBetaProd, kPrevLr, kBeta };

  // The order of a group's hyperparameters is that of adamem_fused/backends/tables.py.
  static constexpr int kHypers = 11;

  static __device__ TensorRow& row(const Step& s, int64_t tensor) {
    return *reinterpret_cast<TensorRow*>(s.coefficients + tensor * kColumns);
  }

  static __device__ void prepare(const Step& s, int64_t tensor) {
    const int64_t group = layout_at(s, kGroup, tensor);
    const double* h = s.hypers + group * kHypers;
    // h[3] is log(beta2), h[10] whether the group shares its beta.
    const AdamWHyper hyper = {read_lr(s, group, kHypers),
                              h[1],
                              h[2],
                              h[4],
                              h[5],
                              h[6],
                              h[7] != 0.0,
                              h[8] != 0.0,
                              h[9] != 0.0};
    TensorRow& r = row(s, tensor);
    r.step = read_scalar(s, kLists, kStep, tensor);
    r.beta_prod = read_scalar(s, kLists, kBetaProd, tensor);
    r.beta_max = hyper.beta_max;
    r.coefficients = adamw_corrected(
        adamw_coefficients<double>(hyper, r.step, read_scalar(s, kLists, kPrevLr, tensor),
                                   read_grad_scale(s)),
        hyper.beta_max, r.beta_prod);
    // A repair reads the gradient once more: it may not be what was written.
    const bool exact =
        layout_at(s, kExact, tensor) != 0 && s.addresses[tensor] != s.addresses[s.tensors + tensor];
    const bool guesses = adamw_guesses(hyper, r.step, exact);
    r.begin = is_skipped(s) ? kNothing : guesses ? kGuess : kSums;
    r.rest = kDone;
  }

  // The beta of a tensor, the next values of its scalars, and what is left for finish.
  static __device__ void set_beta(const Step& s, int64_t tensor, Sums sums) {
    TensorRow& r = row(s, tensor);
    const double lr = r.coefficients.lr;
    if (is_idle(r.step, lr, sums.den)) return;
    const double beta = adamw_beta(sums.num, sums.den, r.beta_max, r.step);
    if (r.begin == kSums) {
      r.rest = kUpdate;
      r.amount[0] = 1.0 - beta;
    } else if (adamw_missed(beta, sums.den, r.beta_max)) {
      r.rest = kRepair;
      r.amount[0] = (r.beta_max - beta) / r.beta_max;
    }
    write_scalar(s, kLists, kStep, tensor, r.step + 1.0);
    write_scalar(s, kLists, kBetaProd, tensor, r.beta_prod * beta);
    write_scalar(s, kLists, kPrevLr, tensor, lr);
    write_scalar(s, kLists, kBeta, tensor, beta);
  }
};

// T: the type of the arithmetic. Param, Grad, Memory: stored types.
template <class T, class Param, class Grad, class Memory>
struct AdamW : AdamWTensor {
  using Compute = T;
  using Chunk = Elements<T, Param, Grad, Memory, 2>;

  static __device__ Sums chunk_sums(const TensorRow&, Sums sums) { return sums; }

  static __device__ void begin(const Chunk& chunk, const TensorRow& row, T& num, T& den) {
    if (row.coefficients.weight_decay != 0.0) {
      begin<true>(chunk, row, num, den);
    } else {
      begin<false>(chunk, row, num, den);
    }
  }

  template <bool Decay>
  static __device__ void begin(const Chunk& chunk, const TensorRow& row, T& num, T& den) {
    const AdamWCoefficients<T> c = narrow_all<T>(row.coefficients);
    if (row.begin == kGuess) {
      chunk.template for_each<Use::kLast, true, 2>([&](T g, T& d, T& v, T& x) {
        const T root = adamw_root<true>(g, v, c);
        adamw_guess<true, Decay>(g, d, root, x, c, num, den);
      });
    } else {
      chunk.template for_each<Use::kAgain, Decay, 0>([&](T g, T d, T v, T x) {
        const T root = adamw_root<true>(g, v, c);
        adamw_sums<true, Decay>(g, d, root, x, c, num, den);
      });
    }
  }

  static __device__ void finish(const Chunk& chunk, const TensorRow& row) {
    const AdamWCoefficients<T> c = narrow_all<T>(row.coefficients);
    const T amount = static_cast<T>(row.amount[0]);
    if (row.rest == kRepair) {
      chunk.template for_each<Use::kLast, true, 1>(
          [&](T g, T& d, T v, T& x) { adamw_repair<true>(g, d, sqrt(v), x, amount, c); });
    } else if (row.rest == kUpdate) {
      chunk.template for_each<Use::kLast, true, 2>([&](T g, T& d, T& v, T& x) {
        const T root = adamw_root<true>(g, v, c);
        adamw_update<true>(g, d, root, x, amount, c);
      });
    }
  }
};

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_adamw_prepare(const Step* step, void* stream) {
  return launch_tensors(prepare_kernel<AdamWTensor>, *step, stream);
}

int adamem_adamw_begin(const Step* step, const Bucket* bucket, void* stream) {
  return launch_begin<AdamW>(*step, *bucket, stream);
}

int adamem_adamw_beta(const Step* step, void* stream) {
  return launch_tensors(beta_kernel<AdamWTensor>, *step, stream);
}

int adamem_adamw_finish(const Step* step, const Bucket* bucket, void* stream) {
  return launch_finish<AdamW>(*step, *bucket, stream);
}

int adamem_adamw_load(const Bucket* bucket, int device) {
  return load_kernels<AdamW, AdamWTensor>(*bucket, device);
}

int adamem_adamw_columns() { return AdamWTensor::kColumns; }

}  // extern "C"

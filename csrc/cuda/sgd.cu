// AM-SGD. Rows of `addresses`: param, grad, momentum_buffer, step, prev_lr, beta.
#include "kernels.h"

namespace am::cuda {
namespace {

// What does not depend on the dtypes.
struct SGDTensor {
  using TensorRow = Row<SGDCoefficients<double>>;
  static constexpr int kLists = 3;
  static constexpr int kColumns = sizeof(TensorRow) / sizeof(double);
  enum Scalar { kStep, kPrevLr, kBeta };

  // The order of a group's hyperparameters is that of adamem_fused/backends/tables.py.
  static constexpr int kHypers = 8;

  static __device__ TensorRow& row(const Step& s, int64_t tensor) {
    return *reinterpret_cast<TensorRow*>(s.coefficients + tensor * kColumns);
  }

  static __device__ void prepare(const Step& s, int64_t tensor) {
    const int64_t group = layout_at(s, kGroup, tensor);
    const double* h = s.hypers + group * kHypers;
    // h[7] is whether the group shares its beta.
    const SGDHyper hyper = {
        read_lr(s, group, kHypers), h[1], h[2], h[3], h[4] != 0.0, h[5] != 0.0, h[6] != 0.0};
    TensorRow& r = row(s, tensor);
    r.step = read_scalar(s, kLists, kStep, tensor);
    r.beta_max = hyper.beta_max;
    r.coefficients = sgd_coefficients<double>(hyper, read_scalar(s, kLists, kPrevLr, tensor),
                                              read_grad_scale(s));
    r.begin = is_skipped(s) ? kNothing : kSums;
    r.rest = kDone;
  }

  // The beta of a tensor, the next values of its scalars, and what is left for finish.
  static __device__ void set_beta(const Step& s, int64_t tensor, Sums sums) {
    TensorRow& r = row(s, tensor);
    const double lr = r.coefficients.lr;
    if (is_idle(r.step, lr, sums.den)) return;
    const double beta = sgd_beta(sums.num, sums.den, r.beta_max, r.step);
    r.rest = kUpdate;
    sgd_mixture(beta, r.coefficients.memory_lambda, r.step, &r.amount[0], &r.amount[1]);
    write_scalar(s, kLists, kStep, tensor, r.step + 1.0);
    write_scalar(s, kLists, kPrevLr, tensor, lr);
    write_scalar(s, kLists, kBeta, tensor, beta);
  }
};

// T: the type of the arithmetic. Param, Grad, Memory: stored types.
template <class T, class Param, class Grad, class Memory>
struct SGD : SGDTensor {
  using Compute = T;
  using Chunk = Elements<T, Param, Grad, Memory, 1>;

  static __device__ Sums chunk_sums(const TensorRow& row, Sums sums) {
    return row.step == 0.0 ? Sums{0.0, sgd_first_den(sums.den)} : sums;
  }

  // A first step has no memory: d = g, and both sums are 0, or next to it.
  static __device__ void begin(const Chunk& chunk, const TensorRow& row, T& num, T& den) {
    const SGDCoefficients<T> c = narrow_all<T>(row.coefficients);
    if (row.step == 0.0 && c.lr != T(0)) return;
    if (row.step != 0.0 && c.weight_decay != T(0)) {
      chunk.template for_each<Use::kAgain, true, 0>(
          [&](T g, T d, T x) { sgd_sums<true, true>(g, d, x, c, num, den); });
    } else {
      chunk.template for_each<Use::kAgain, false, 0>(
          [&](T g, T d, T x) { sgd_sums<true, false>(g, d, x, c, num, den); });
    }
  }

  static __device__ void finish(const Chunk& chunk, const TensorRow& row) {
    if (row.rest == kDone) return;
    const SGDCoefficients<T> c = narrow_all<T>(row.coefficients);
    const T keep = static_cast<T>(row.amount[0]), take = static_cast<T>(row.amount[1]);
    if (c.weight_decay != T(0)) {
      chunk.template for_each<Use::kLast, true, 1>(
          [&](T g, T& d, T& x) { sgd_update<true, true>(g, d, x, keep, take, c); });
    } else {
      chunk.template for_each<Use::kLast, true, 1>(
          [&](T g, T& d, T& x) { sgd_update<true, false>(g, d, x, keep, take, c); });
    }
  }
};

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_sgd_prepare(const Step* step, void* stream) {
  return launch_tensors(prepare_kernel<SGDTensor>, *step, stream);
}

int adamem_sgd_begin(const Step* step, const Bucket* bucket, void* stream) {
  return launch_begin<SGD>(*step, *bucket, stream);
}

int adamem_sgd_beta(const Step* step, void* stream) {
  return launch_tensors(beta_kernel<SGDTensor>, *step, stream);
}

int adamem_sgd_finish(const Step* step, const Bucket* bucket, void* stream) {
  return launch_finish<SGD>(*step, *bucket, stream);
}

int adamem_sgd_load(const Bucket* bucket, int device) {
  return load_kernels<SGD, SGDTensor>(*bucket, device);
}

int adamem_sgd_columns() { return SGDTensor::kColumns; }

}  // extern "C"

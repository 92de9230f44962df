// AM-SGD. Rows of `addresses`: param, grad, momentum_buffer, step, prev_lr, beta.
#include "launches.h"

namespace am::cuda {
namespace {

// What does not depend on the dtypes.
struct SGDTensor {
  using TensorRow = Row<SGDCoefficients<double>>;
  static constexpr int kLists = 3;
  static constexpr int kColumns = sizeof(TensorRow) / sizeof(double);
  enum Scalar { kStep, kPrevLr, kBeta, kScalars };

  // The order of a group's hyperparameters is that of adamem_fused/backends/tables.py.
  static constexpr int kHypers = 8;

  static __device__ TensorRow& row(const Step& s, int64_t unit) {
    return *reinterpret_cast<TensorRow*>(s.coefficients + unit * kColumns);
  }

  static __device__ Scalars<kScalars> scalars(const Step& s, int64_t unit) {
    return Scalars<kScalars>::of(s, kLists, unit);
  }

  static __device__ void prepare(const Step& s, int64_t unit) {
    const int64_t group = layout_at(s, kGroup, unit);
    const double* h = s.hypers + group * kHypers;
    // h[7] is whether the group shares its beta.
    const SGDHyper hyper = {
        read_lr(s, group, kHypers), h[1], h[2], h[3], h[4] != 0.0, h[5] != 0.0, h[6] != 0.0};
    const Scalars<kScalars> own = scalars(s, unit);
    TensorRow& r = row(s, unit);
    r.step = own.read(kStep);
    r.beta_max = hyper.beta_max;
    r.coefficients = sgd_coefficients<double>(hyper, own.read(kPrevLr), read_grad_scale(s));
    r.begin = is_skipped(s) ? kNothing : kSums;
    r.rest = kDone;
  }

  static __device__ double beta_of(const TensorRow& r, Sums sums) {
    return sgd_beta(sums.num, sums.den, r.beta_max, r.step);
  }

  // The beta of an ordinary unit, the next values of its scalars, and what is left for finish.
  static __device__ void set_beta(const Step& s, int64_t unit, Sums sums) {
    TensorRow& r = row(s, unit);
    if (is_idle(r.step, r.coefficients.lr, sums.den)) return;
    const double beta = beta_of(r, sums);
    r.rest = kUpdate;
    sgd_mixture(beta, r.coefficients.memory_lambda, r.step, &r.amount[0], &r.amount[1]);
    const Scalars<kScalars> own = scalars(s, unit);
    write_segment(own, beta, layout_at(s, kRow, unit));
    write_step(own, r);
  }

  static __device__ void write_segment(const Scalars<kScalars>& own, double beta, int64_t row) {
    own.write(kBeta, beta, row);
  }

  static __device__ void write_step(const Scalars<kScalars>& own, const TensorRow& r) {
    own.write(kStep, r.step + 1.0);
    own.write(kPrevLr, r.coefficients.lr);
  }
};

// T: the type of the arithmetic. Param, Grad, Memory: stored types.
template <class T, class Param, class Grad, class Memory>
struct SGD : SGDTensor {
  using Compute = T;
  using Coefficients = SGDCoefficients<T>;
  static constexpr int kMemories = 1;
  using Chunk = Elements<T, Param, Grad, Memory, kMemories, kLists + kScalars>;

  // What the new d takes of the old one and of the gradient.
  struct Amount {
    T keep, take;
  };

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
    update(chunk, whole_block(), narrow_all<T>(row.coefficients),
           {static_cast<T>(row.amount[0]), static_cast<T>(row.amount[1])});
  }

  static __device__ __forceinline__ void update(const Chunk& chunk, Team team,
                                                const Coefficients& c, Amount amount) {
    const T keep = amount.keep, take = amount.take;
    if (c.weight_decay != T(0)) {
      chunk.template for_each<Use::kLast, true, 1>(
          [&](T g, T& d, T& x) { sgd_update<true, true>(g, d, x, keep, take, c); }, team);
    } else {
      chunk.template for_each<Use::kLast, true, 1>(
          [&](T g, T& d, T& x) { sgd_update<true, false>(g, d, x, keep, take, c); }, team);
    }
  }

  // ---- rows, see row_kernel.h

  static constexpr int kHeld = 3;

  // The coefficients of a row are its tensor's.
  static __device__ void correct(Coefficients&, const Scalars<kScalars>&, const TensorRow&,
                                 int64_t) {}

  static __device__ Amount amount_of(const TensorRow& r, double beta) {
    double keep, take;
    sgd_mixture(beta, r.coefficients.memory_lambda, r.step, &keep, &take);
    return {static_cast<T>(keep), static_cast<T>(take)};
  }

  static __device__ bool has_sums(const TensorRow& r) {
    return r.step != 0.0 || r.coefficients.lr == 0.0;
  }

  static __device__ __forceinline__ void add(const TensorRow& r, const Coefficients& c, T g, T d,
                                             T&, T x, T& num, T& den, T (&held)[kHeld]) {
    if (r.step != 0.0 && c.weight_decay != T(0)) {
      sgd_sums<true, true>(g, d, x, c, num, den);
    } else {
      sgd_sums<true, false>(g, d, x, c, num, den);
    }
    held[0] = g;
    held[1] = d;
    held[2] = x;
  }

  static __device__ __forceinline__ void move(const Coefficients& c, Amount amount,
                                              const T (&held)[kHeld], T& d, T& x) {
    d = held[1];
    x = held[2];
    if (c.weight_decay != T(0)) {
      sgd_update<true, true>(held[0], d, x, amount.keep, amount.take, c);
    } else {
      sgd_update<true, false>(held[0], d, x, amount.keep, amount.take, c);
    }
  }
};

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_sgd_prepare(const Step* step, void* stream) {
  return launch_units(prepare_kernel<SGDTensor>, *step, stream);
}

int adamem_sgd_begin(const Step* step, const Bucket* bucket, void* stream) {
  return launch_begin<SGD>(*step, *bucket, stream);
}

int adamem_sgd_beta(const Step* step, void* stream) {
  return launch_units(beta_kernel<SGDTensor>, *step, stream);
}

int adamem_sgd_finish(const Step* step, const Bucket* bucket, void* stream) {
  return launch_finish<SGD>(*step, *bucket, stream);
}

int adamem_sgd_load(const Bucket* bucket, int device) {
  return load_kernels<SGD, SGDTensor>(*bucket, device);
}

int adamem_sgd_columns() { return SGDTensor::kColumns; }

}  // extern "C"

// AM-AdamW. Rows of `addresses`: param, grad, exp_avg, exp_avg_sq, step, beta_prod, prev_lr,
// beta.
#include "launches.h"

namespace am::cuda {
namespace {

// What does not depend on the dtypes.
struct AdamWTensor {
  using TensorRow = Row<AdamWCoefficients<double>>;
  static constexpr int kLists = 4;
  static constexpr int kColumns = sizeof(TensorRow) / sizeof(double);
  enum Scalar { kStep, kBetaProd, kPrevLr, kBeta, kScalars };

  // The order of a group's hyperparameters is that of adamem_fused/backends/tables.py.
  static constexpr int kHypers = 11;

  static __device__ TensorRow& row(const Step& s, int64_t unit) {
    return *reinterpret_cast<TensorRow*>(s.coefficients + unit * kColumns);
  }

  static __device__ Scalars<kScalars> scalars(const Step& s, int64_t unit) {
    return Scalars<kScalars>::of(s, kLists, unit);
  }

  static __device__ void prepare(const Step& s, int64_t unit) {
    const int64_t group = layout_at(s, kGroup, unit), tensor = layout_at(s, kTensor, unit);
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
    const Scalars<kScalars> own = scalars(s, unit);
    TensorRow& r = row(s, unit);
    r.step = own.read(kStep);
    r.beta_max = hyper.beta_max;
    r.coefficients =
        adamw_coefficients<double>(hyper, r.step, own.read(kPrevLr), read_grad_scale(s));
    r.begin = is_skipped(s) ? kNothing : kSums;
    r.rest = kDone;
    if (has_rows(s, unit)) return;
    r.coefficients = corrected(own, r, layout_at(s, kRow, unit));
    // A repair reads the gradient once more: it may not be what was written.
    const bool exact =
        layout_at(s, kExact, unit) != 0 && s.addresses[tensor] != s.addresses[s.tensors + tensor];
    if (r.begin == kSums && adamw_guesses(hyper, r.step, exact)) r.begin = kGuess;
  }

  // The coefficients of a segment. r: its unit's, as they were prepared.
  static __device__ AdamWCoefficients<double> corrected(const Scalars<kScalars>& own,
                                                        const TensorRow& r, int64_t row) {
    return adamw_corrected(r.coefficients, r.beta_max, own.read(kBetaProd, row));
  }

  static __device__ double beta_of(const TensorRow& r, Sums sums) {
    return adamw_beta(sums.num, sums.den, r.beta_max, r.step);
  }

  // The beta of an ordinary unit, the next values of its scalars, and what is left for finish.
  static __device__ void set_beta(const Step& s, int64_t unit, Sums sums) {
    TensorRow& r = row(s, unit);
    if (is_idle(r.step, r.coefficients.lr, sums.den)) return;
    const double beta = beta_of(r, sums);
    if (r.begin == kSums) {
      r.rest = kUpdate;
      r.amount[0] = 1.0 - beta;
    } else if (adamw_missed(beta, sums.den, r.beta_max)) {
      r.rest = kRepair;
      r.rounding.set_repaired();
      r.amount[0] = (r.beta_max - beta) / r.beta_max;
    }
    const Scalars<kScalars> own = scalars(s, unit);
    write_segment(own, beta, layout_at(s, kRow, unit));
    write_step(own, r);
  }

  static __device__ void write_segment(const Scalars<kScalars>& own, double beta, int64_t row) {
    own.write(kBetaProd, own.read(kBetaProd, row) * beta, row);
    own.write(kBeta, beta, row);
  }

  static __device__ void write_step(const Scalars<kScalars>& own, const TensorRow& r) {
    own.write(kStep, r.step + 1.0);
    own.write(kPrevLr, r.coefficients.lr);
  }
};

// T: the type of the arithmetic. Param, Grad, Memory: stored types.
template <class T, class Param, class Grad, class Memory>
struct AdamW : AdamWTensor {
  using Compute = T;
  static constexpr int kMemories = 2;
  using Chunk = Elements<T, Param, Grad, Memory, kMemories, kLists + kScalars>;

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
          [&](T g, T& d, T v, T& x) { adamw_repair<true>(g, d, root_of(v), x, amount, c); });
    } else if (row.rest == kUpdate) {
      chunk.template for_each<Use::kLast, true, 2>([&](T g, T& d, T& v, T& x) {
        const T root = adamw_root<true>(g, v, c);
        adamw_update<true>(g, d, root, x, amount, c);
      });
    }
  }

  // ---- rows, see row_kernel.h

  using Coefficients = AdamWCoefficients<T>;
  static constexpr int kHeld = 4;

  struct Amount {
    T take;
  };

  // Gives the coefficients of a tensor what is a row's own.
  static __device__ void correct(Coefficients& c, const Scalars<kScalars>& own, const TensorRow& r,
                                 int64_t row) {
    const AdamWCoefficients<double> wide = corrected(own, r, row);
    c.root_scale = static_cast<T>(wide.root_scale);
    c.eps = static_cast<T>(wide.eps);
  }

  static __device__ Amount amount_of(const TensorRow&, double beta) {
    return {static_cast<T>(1.0 - beta)};
  }

  static __device__ bool has_sums(const TensorRow&) { return true; }

  static __device__ __forceinline__ void add(const TensorRow&, const Coefficients& c, T g, T d,
                                             T& v, T x, T& num, T& den, T (&held)[kHeld]) {
    const T root = adamw_root<true>(g, v, c);
    g = gradient<true>(g, c);
    const AdamWTerms<T> t = adamw_terms(g, d, root, c);
    if (c.weight_decay != T(0)) {
      adamw_add<true>(g, x, t, c, num, den);
    } else {
      adamw_add<false>(g, x, t, c, num, den);
    }
    held[0] = t.p;
    held[1] = t.weighted;
    held[2] = t.slope;
    held[3] = x;
  }

  static __device__ __forceinline__ void move(const Coefficients& c, Amount amount,
                                              const T (&held)[kHeld], T& d, T& x) {
    x = held[3];
    adamw_move(held[0], held[1], held[2], amount.take, c, d, x);
  }

  static __device__ __forceinline__ void update(const Chunk& row, Team team, const Coefficients& c,
                                                Amount amount) {
    row.template for_each<Use::kLast, true, 2>(
        [&](T g, T& d, T& v, T& x) {
          const T root = adamw_root<true>(g, v, c);
          adamw_update<true>(g, d, root, x, amount.take, c);
        },
        team);
  }
};

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_adamw_prepare(const Step* step, void* stream) {
  return launch_units(prepare_kernel<AdamWTensor>, *step, stream);
}

int adamem_adamw_begin(const Step* step, const Bucket* bucket, void* stream) {
  return launch_begin<AdamW>(*step, *bucket, stream);
}

int adamem_adamw_beta(const Step* step, void* stream) {
  return launch_units(beta_kernel<AdamWTensor>, *step, stream);
}

int adamem_adamw_finish(const Step* step, const Bucket* bucket, void* stream) {
  return launch_finish<AdamW>(*step, *bucket, stream);
}

int adamem_adamw_load(const Bucket* bucket, int device) {
  return load_kernels<AdamW, AdamWTensor>(*bucket, device);
}

int adamem_adamw_columns() { return AdamWTensor::kColumns; }

}  // extern "C"

// AM-AdamW. Rows of `addresses`: param, grad, exp_avg, exp_avg_sq, step, beta_prod, prev_lr,
// beta.
#include "kernels.h"

namespace am::cuda {
namespace {

// What the update reads, all of it of one type: a row of the table of coefficients.
template <class T>
struct AdamWUpdate {
  AdamWCoefficients<T> coefficients;
  T beta, take;  // take = 1 - beta
};

// What does not depend on the dtypes.
struct AdamWTensor {
  static constexpr int kLists = 4;
  static constexpr int kColumns = sizeof(AdamWUpdate<double>) / sizeof(double);
  enum Scalar { kStep, kBetaProd, kPrevLr, kBeta };

  // The order of a group's hyperparameters is that of adamem_fused/backends/tables.py.
  static constexpr int kHypers = 11;

  static __device__ AdamWHyper hyper(const Step& s, int64_t tensor) {
    const int64_t group = layout_at(s, kGroup, tensor);
    const double* h = s.hypers + group * kHypers;
    // h[3] is log(beta2), h[10] whether the group shares its beta.
    return {read_lr(s, group, kHypers),
            h[1],
            h[2],
            h[4],
            h[5],
            h[6],
            h[7] != 0.0,
            h[8] != 0.0,
            h[9] != 0.0};
  }

  template <class T>
  static __device__ AdamWCoefficients<T> coefficients(const Step& s, int64_t tensor) {
    return adamw_coefficients<T>(hyper(s, tensor), read_scalar(s, kLists, kStep, tensor),
                                 read_scalar(s, kLists, kBetaProd, tensor),
                                 read_scalar(s, kLists, kPrevLr, tensor), read_grad_scale(s));
  }

  // The beta of a tensor, the next values of its scalars, and what the update reads.
  static __device__ __noinline__ void set_beta(const Step& s, int64_t tensor, Sums sums) {
    const AdamWHyper h = hyper(s, tensor);
    const double step = read_scalar(s, kLists, kStep, tensor);
    const double beta = adamw_beta(sums.num, sums.den, h.beta_max, step);
    AdamWUpdate<double> update;
    update.coefficients = coefficients<double>(s, tensor);
    update.beta = beta;
    update.take = 1.0 - beta;
    *reinterpret_cast<AdamWUpdate<double>*>(s.coefficients + tensor * kColumns) = update;
    write_scalar(s, kLists, kBetaProd, tensor, read_scalar(s, kLists, kBetaProd, tensor) * beta);
    write_scalar(s, kLists, kStep, tensor, step + 1.0);
    write_scalar(s, kLists, kPrevLr, tensor, h.lr);
    write_scalar(s, kLists, kBeta, tensor, beta);
  }
};

// T: the type of the arithmetic. Param, Grad, Memory: stored types.
template <class T, class Param, class Grad, class Memory>
struct AdamW : AdamWTensor {
  using Compute = T;
  using Model = AdamWCoefficients<T>;
  using Update = AdamWUpdate<T>;
  using BlocksOf = Blocks<T, Column<T, Param>>;
  static constexpr int kVector = vector_of<Column<T, Param>, Column<T, Grad>, Column<T, Memory>>();
  static constexpr int kSpan = span_of<Column<T, Param>, Column<T, Grad>, Column<T, Memory>>();
  static_assert(sizeof(Update) == kColumns * sizeof(T));

  struct Chunk {
    Column<T, Param> x;
    Column<T, Grad> g;
    Column<T, Memory> d, v;

    __device__ Chunk(const Step& s, const Bucket& b, int64_t tensor, int64_t begin)
        : x(s.addresses[tensor], begin, b.dtypes[0]),
          g(s.addresses[s.tensors + tensor], begin, b.dtypes[1]),
          d(s.addresses[2 * s.tensors + tensor], begin, b.dtypes[2]),
          v(s.addresses[3 * s.tensors + tensor], begin, b.dtypes[3]) {}

    __device__ bool is_aligned() const {
      return x.is_aligned() && g.is_aligned() && d.is_aligned() && v.is_aligned();
    }
  };

  static __device__ __noinline__ void set_model(const Step& s, int64_t tensor, Model& model) {
    model = coefficients<T>(s, tensor);
  }

  template <bool Decay>
  static __device__ void add_sums(const Chunk& chunk, int length, const Model c, T& num, T& den) {
    for_each_element<kVector, kSpan>(
        length, chunk.is_aligned(),
        [&](int k) {
          T g[kVector], d[kVector], v[kVector], x[kVector] = {};
          chunk.g.template load_vector<Use::kAgain, kSpan>(k, g);
          chunk.d.template load_vector<Use::kAgain, kSpan>(k, d);
          chunk.v.template load_vector<Use::kAgain, kSpan>(k, v);
          if (Decay) chunk.x.template load_vector<Use::kAgain, kSpan>(k, x);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            adamw_sums<true, Decay>(g[j], d[j], adamw_root<true>(g[j], v[j], c), x[j], c, num, den);
        },
        [&](int k) {
          const T g = chunk.g.load(k);
          T v = chunk.v.load(k);
          adamw_sums<true, Decay>(g, chunk.d.load(k), adamw_root<true>(g, v, c),
                                  Decay ? chunk.x.load(k) : T(0), c, num, den);
        });
  }

  static __device__ void add_sums(const Chunk& chunk, int length, const Model& c, T& num, T& den) {
    if (c.weight_decay != T(0)) {
      add_sums<true>(chunk, length, c, num, den);
    } else {
      add_sums<false>(chunk, length, c, num, den);
    }
  }

  static __device__ void update(const Chunk& chunk, int length, const Update u) {
    for_each_element<kVector, kSpan>(
        length, chunk.is_aligned(),
        [&](int k) {
          T g[kVector], d[kVector], v[kVector], x[kVector];
          chunk.g.template load_vector<Use::kLast, kSpan>(k, g);
          chunk.d.template load_vector<Use::kLast, kSpan>(k, d);
          chunk.v.template load_vector<Use::kLast, kSpan>(k, v);
          chunk.x.template load_vector<Use::kLast, kSpan>(k, x);
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            const T root = adamw_root<true>(g[j], v[j], u.coefficients);
            adamw_update<true>(g[j], d[j], root, x[j], u.beta, u.take, u.coefficients);
          }
          chunk.d.template store_vector<kSpan>(k, d);
          chunk.v.template store_vector<kSpan>(k, v);
          chunk.x.template store_vector<kSpan>(k, x);
        },
        [&](int k) {
          const T g = chunk.g.load(k);
          T d = chunk.d.load(k), v = chunk.v.load(k), x = chunk.x.load(k);
          const T root = adamw_root<true>(g, v, u.coefficients);
          adamw_update<true>(g, d, root, x, u.beta, u.take, u.coefficients);
          chunk.d.store(k, d);
          chunk.v.store(k, v);
          chunk.x.store(k, x);
        });
  }
};

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_adamw_stats(const Step* step, const Bucket* bucket, void* stream) {
  return launch_stats<AdamW>(*step, *bucket, stream);
}

int adamem_adamw_beta(const Step* step, void* stream) {
  return launch(beta_kernel<AdamWTensor>, step->tensors, *step, stream, *step);
}

int adamem_adamw_apply(const Step* step, const Bucket* bucket, void* stream) {
  return launch_apply<AdamW>(*step, *bucket, stream);
}

int adamem_adamw_step(const Step* step, const Bucket* bucket, const Schedule* schedule,
                      void* stream) {
  return launch_step<AdamW>(*step, *bucket, *schedule, stream);
}

int adamem_adamw_chunks_ahead(const Step* step, const Bucket* bucket, int64_t* ahead) {
  return find_chunks_ahead<AdamW>(*step, *bucket, ahead);
}

int adamem_adamw_load(const Bucket* bucket, int device) {
  return load_kernels<AdamW, AdamWTensor>(*bucket, device);
}

int adamem_adamw_columns() { return AdamWTensor::kColumns; }

}  // extern "C"

// AM-SGD. Rows of `addresses`: param, grad, momentum_buffer, step, prev_lr, beta.
#include "kernels.h"

namespace am::cuda {
namespace {

// What the update reads, all of it of one type: a row of the table of coefficients.
template <class T>
struct SGDUpdate {
  SGDCoefficients<T> coefficients;
  T keep, take;
};

// What does not depend on the dtypes.
struct SGDTensor {
  static constexpr int kLists = 3;
  static constexpr int kColumns = sizeof(SGDUpdate<double>) / sizeof(double);
  enum Scalar { kStep, kPrevLr, kBeta };

  // The order of a group's hyperparameters is that of adamem_fused/backends/tables.py.
  static constexpr int kHypers = 8;

  static __device__ SGDHyper hyper(const Step& s, int64_t tensor) {
    const int64_t group = layout_at(s, kGroup, tensor);
    const double* h = s.hypers + group * kHypers;
    // h[7] is whether the group shares its beta.
    return {read_lr(s, group, kHypers), h[1], h[2], h[3], h[4] != 0.0, h[5] != 0.0, h[6] != 0.0};
  }

  template <class T>
  static __device__ SGDCoefficients<T> coefficients(const Step& s, int64_t tensor) {
    return sgd_coefficients<T>(hyper(s, tensor), read_scalar(s, kLists, kPrevLr, tensor),
                               read_grad_scale(s));
  }

  // The beta of a tensor, the next values of its scalars, and what the update reads.
  static __device__ __noinline__ void set_beta(const Step& s, int64_t tensor, Sums sums) {
    const SGDHyper h = hyper(s, tensor);
    const double step = read_scalar(s, kLists, kStep, tensor);
    const double beta = sgd_beta(sums.num, sums.den, h.beta_max, step);
    SGDUpdate<double> update;
    update.coefficients = coefficients<double>(s, tensor);
    sgd_mixture(beta, h.memory_lambda, step, &update.keep, &update.take);
    *reinterpret_cast<SGDUpdate<double>*>(s.coefficients + tensor * kColumns) = update;
    write_scalar(s, kLists, kStep, tensor, step + 1.0);
    write_scalar(s, kLists, kPrevLr, tensor, h.lr);
    write_scalar(s, kLists, kBeta, tensor, beta);
  }
};

// T: the type of the arithmetic. Param, Grad, Memory: stored types.
template <class T, class Param, class Grad, class Memory>
struct SGD : SGDTensor {
  using Compute = T;
  struct Model {
    SGDCoefficients<T> coefficients;
    bool is_first;
  };
  using Update = SGDUpdate<T>;
  using BlocksOf = Blocks<T, Column<T, Param>>;
  static constexpr int kVector = vector_of<Column<T, Param>, Column<T, Grad>, Column<T, Memory>>();
  static constexpr int kSpan = span_of<Column<T, Param>, Column<T, Grad>, Column<T, Memory>>();
  static_assert(sizeof(Update) == kColumns * sizeof(T));

  struct Chunk {
    Column<T, Param> x;
    Column<T, Grad> g;
    Column<T, Memory> d;

    __device__ Chunk(const Step& s, const Bucket& b, int64_t tensor, int64_t begin)
        : x(s.addresses[tensor], begin, b.dtypes[0]),
          g(s.addresses[s.tensors + tensor], begin, b.dtypes[1]),
          d(s.addresses[2 * s.tensors + tensor], begin, b.dtypes[2]) {}

    __device__ bool is_aligned() const {
      return x.is_aligned() && g.is_aligned() && d.is_aligned();
    }
  };

  static __device__ __noinline__ void set_model(const Step& s, int64_t tensor, Model& model) {
    model = {coefficients<T>(s, tensor), read_scalar(s, kLists, kStep, tensor) == 0.0};
  }

  template <bool Decay>
  static __device__ void add_sums(const Chunk& chunk, int length, const SGDCoefficients<T> c,
                                  T& num, T& den) {
    for_each_element<kVector, kSpan>(
        length, chunk.is_aligned(),
        [&](int k) {
          T g[kVector], d[kVector], x[kVector] = {};
          chunk.g.template load_vector<Use::kAgain, kSpan>(k, g);
          chunk.d.template load_vector<Use::kAgain, kSpan>(k, d);
          if (Decay) chunk.x.template load_vector<Use::kAgain, kSpan>(k, x);
#pragma unroll
          for (int j = 0; j < kVector; ++j) sgd_sums<true, Decay>(g[j], d[j], x[j], c, num, den);
        },
        [&](int k) {
          sgd_sums<true, Decay>(chunk.g.load(k), chunk.d.load(k), Decay ? chunk.x.load(k) : T(0), c,
                                num, den);
        });
  }

  // A first step has no memory: d = g, and both sums are 0.
  static __device__ void add_sums(const Chunk& chunk, int length, const Model& model, T& num,
                                  T& den) {
    if (model.is_first) return;
    if (model.coefficients.weight_decay != T(0)) {
      add_sums<true>(chunk, length, model.coefficients, num, den);
    } else {
      add_sums<false>(chunk, length, model.coefficients, num, den);
    }
  }

  template <bool Decay>
  static __device__ void update(const Chunk& chunk, int length, const Update u) {
    for_each_element<kVector, kSpan>(
        length, chunk.is_aligned(),
        [&](int k) {
          T g[kVector], d[kVector], x[kVector];
          chunk.g.template load_vector<Use::kLast, kSpan>(k, g);
          chunk.d.template load_vector<Use::kLast, kSpan>(k, d);
          chunk.x.template load_vector<Use::kLast, kSpan>(k, x);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            sgd_update<true, Decay>(g[j], d[j], x[j], u.keep, u.take, u.coefficients);
          chunk.d.template store_vector<kSpan>(k, d);
          chunk.x.template store_vector<kSpan>(k, x);
        },
        [&](int k) {
          T d = chunk.d.load(k), x = chunk.x.load(k);
          sgd_update<true, Decay>(chunk.g.load(k), d, x, u.keep, u.take, u.coefficients);
          chunk.d.store(k, d);
          chunk.x.store(k, x);
        });
  }

  static __device__ void update(const Chunk& chunk, int length, const Update& u) {
    if (u.coefficients.weight_decay != T(0)) {
      update<true>(chunk, length, u);
    } else {
      update<false>(chunk, length, u);
    }
  }
};

}  // namespace
}  // namespace am::cuda

using namespace am::cuda;

extern "C" {

int adamem_sgd_stats(const Step* step, const Bucket* bucket, void* stream) {
  return launch_stats<SGD>(*step, *bucket, stream);
}

int adamem_sgd_beta(const Step* step, void* stream) {
  return launch(beta_kernel<SGDTensor>, step->tensors, *step, stream, *step);
}

int adamem_sgd_apply(const Step* step, const Bucket* bucket, void* stream) {
  return launch_apply<SGD>(*step, *bucket, stream);
}

int adamem_sgd_step(const Step* step, const Bucket* bucket, const Schedule* schedule,
                    void* stream) {
  return launch_step<SGD>(*step, *bucket, *schedule, stream);
}

int adamem_sgd_chunks_ahead(const Step* step, const Bucket* bucket, int64_t* ahead) {
  return find_chunks_ahead<SGD>(*step, *bucket, ahead);
}

int adamem_sgd_load(const Bucket* bucket, int device) {
  return load_kernels<SGD, SGDTensor>(*bucket, device);
}

int adamem_sgd_columns() { return SGDTensor::kColumns; }

}  // extern "C"

// The chunk walk around am_math.h, compiled once for each instruction set by the
// kernels_*.cpp beside it, which define AM_KERNELS, the name of the table.
#include <type_traits>

#include "kernels.h"
#include "pack.h"

namespace {

using namespace am;
using namespace am::cpu;

// Else a lambda that is called twice is not inlined.
#define AM_INLINE_LAMBDA __attribute__((always_inline))

// Sums run in float lanes for this many elements and are then added to double lanes,
// so that a float32 sum's rounding error does not grow with the tensor.
constexpr int64_t kBlock = 1024;

template <class T>
struct LaneSums {
  Pack<T> num = Pack<T>(T(0)), den = Pack<T>(T(0));
};

template <class T>
struct Accumulator {
  static constexpr int kLanes = Pack<T>::kLanes;
  double num[kLanes] = {}, den[kLanes] = {};

  void add(const LaneSums<T>& sums, int64_t lanes = kLanes) {
    T lane_num[kLanes], lane_den[kLanes];
    store(lane_num, sums.num);
    store(lane_den, sums.den);
    for (int64_t l = 0; l < lanes; ++l) {
      num[l] += lane_num[l];
      den[l] += lane_den[l];
    }
  }

  Sums total() {
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) {
        num[l] += num[l + width];
        den[l] += den[l + width];
      }
    }
    return {num[0], den[0]};
  }
};

// The sums only read, and four streams of it: the processor's own prefetching starts anew at
// every page. Asking this many bytes ahead gave 6 % on tensors larger than the caches (two
// cores, AVX2) and cost nothing on smaller ones; in the update it gave nothing.
constexpr int64_t kPrefetchBytes = 512;

template <class... P>
AM_INLINE void prefetch(const P*... p) {
  (__builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes), ...);
}

// Calls finish(i, start(i)) for every pack of numel elements from begin on, with start() one pack
// ahead: while a square root is being taken the processor finds other work to do, of which it
// sees only some hundred instructions ahead. 10 to 13 % of a step in cache (two cores, AVX2).
template <int64_t kLanes, class Start, class Finish>
AM_INLINE void one_ahead(int64_t begin, int64_t numel, Start start, Finish finish) {
  if (numel == 0) return;
  const int64_t last = begin + numel - kLanes;
  auto started = start(begin);
  for (int64_t i = begin; i < last; i += kLanes) {
    const auto next = start(i + kLanes);
    finish(i, started);
    started = next;
  }
  finish(last, started);
}

// Calls f with what the coefficients leave out: no scaling, no weight decay.
template <class Coefficients, class F>
AM_INLINE auto specialize(const Coefficients& c, F f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (c.grad_factor != 1) return c.weight_decay != 0 ? f(Yes{}, Yes{}) : f(Yes{}, No{});
  return c.weight_decay != 0 ? f(No{}, Yes{}) : f(No{}, No{});
}

// Up to a pack's worth of elements, copied so that a full pack can be read or written.
template <class S, int kLanes>
struct Tail {
  S lanes[kLanes] = {};
  Tail(const S* p, int64_t n) {
    if (p != nullptr) std::memcpy(lanes, p, n * sizeof(S));
  }
  void write(S* p, int64_t n) const { std::memcpy(p, lanes, n * sizeof(S)); }
};

// S: stored type of parameter and gradient; T: type of the memory and the arithmetic.
template <class S, class T>
struct AdamW {
  using Coefficients = AdamWCoefficients<T>;
  static constexpr int kLanes = Pack<T>::kLanes;

  static Coefficients cast(const AdamWCoefficients<double>& c) {
    return {T(c.grad_factor),   T(c.beta2),        T(c.one_minus_beta2), T(c.root_scale), T(c.eps),
            T(c.memory_lambda), T(c.weight_decay), T(c.gap_grad),        T(c.gap_memory), T(c.lr),
            T(c.decay)};
  }

  template <bool Scaled>
  AM_INLINE Pack<T> sum_root(const S* g, const T* v, const Coefficients& c) {
    Pack<T> new_v = load(v);
    return adamw_root<Scaled>(load(g), new_v, c);
  }

  template <bool Scaled, bool Decay>
  AM_INLINE void sum_pack(const S* x, const S* g, const T* d, Pack<T> root, const Coefficients& c,
                          LaneSums<T>& sums) {
    adamw_sums<Scaled, Decay>(load(g), load(d), root, Decay ? load(x) : Pack<T>(T(0)), c, sums.num,
                              sums.den);
  }

  template <bool Scaled, bool Decay>
  static Sums sum_chunk(const AdamWChunk& chunk, const Coefficients c) {
    const S* x = static_cast<const S*>(chunk.param);
    const S* g = static_cast<const S*>(chunk.grad);
    const T* d = static_cast<const T*>(chunk.exp_avg);
    const T* v = static_cast<const T*>(chunk.exp_avg_sq);
    const int64_t whole = chunk.numel - chunk.numel % kLanes;
    Accumulator<T> accumulator;
    for (int64_t begin = 0; begin < whole; begin += kBlock) {
      const int64_t numel = begin + kBlock < whole ? kBlock : whole - begin;
      LaneSums<T> sums;
      one_ahead<kLanes>(
          begin, numel,
          [&](int64_t i) AM_INLINE_LAMBDA {
            prefetch(g + i, v + i);
            return sum_root<Scaled>(g + i, v + i, c);
          },
          [&](int64_t i, Pack<T> root) AM_INLINE_LAMBDA {
            prefetch(d + i);
            if constexpr (Decay) prefetch(x + i);
            sum_pack<Scaled, Decay>(x + i, g + i, d + i, root, c, sums);
          });
      accumulator.add(sums);
    }
    if (const int64_t rest = chunk.numel - whole) {
      const Tail<S, kLanes> tail_x(x + whole, rest), tail_g(g + whole, rest);
      const Tail<T, kLanes> tail_d(d + whole, rest), tail_v(v + whole, rest);
      LaneSums<T> sums;
      sum_pack<Scaled, Decay>(tail_x.lanes, tail_g.lanes, tail_d.lanes,
                              sum_root<Scaled>(tail_g.lanes, tail_v.lanes, c), c, sums);
      accumulator.add(sums, rest);
    }
    return accumulator.total();
  }

  static Sums sums(const AdamWChunk& chunk, const AdamWCoefficients<double>& c) {
    return specialize(
        cast(c), [&](auto scaled, auto decay) { return sum_chunk<scaled, decay>(chunk, cast(c)); });
  }

  // Stores the new v.
  template <bool Scaled>
  AM_INLINE Pack<T> update_root(const S* g, T* v, const Coefficients& c) {
    Pack<T> new_v = load(v);
    const Pack<T> root = adamw_root<Scaled>(load(g), new_v, c);
    store(v, new_v);
    return root;
  }

  template <bool Scaled>
  AM_INLINE void update_pack(S* x, const S* g, T* d, Pack<T> root, const Coefficients& c, T beta,
                             T take) {
    Pack<T> new_d = load(d), new_x = load(x);
    adamw_update<Scaled>(load(g), new_d, root, new_x, beta, take, c);
    store(d, new_d);
    store(x, new_x);
  }

  template <bool Scaled>
  static void update_chunk(const AdamWChunk& chunk, const Coefficients c, T beta, T take) {
    S* x = static_cast<S*>(chunk.param);
    const S* g = static_cast<const S*>(chunk.grad);
    T* d = static_cast<T*>(chunk.exp_avg);
    T* v = static_cast<T*>(chunk.exp_avg_sq);
    const int64_t whole = chunk.numel - chunk.numel % kLanes;
    one_ahead<kLanes>(
        0, whole, [&](int64_t i) AM_INLINE_LAMBDA { return update_root<Scaled>(g + i, v + i, c); },
        [&](int64_t i, Pack<T> root)
            AM_INLINE_LAMBDA { update_pack<Scaled>(x + i, g + i, d + i, root, c, beta, take); });
    if (const int64_t rest = chunk.numel - whole) {
      Tail<S, kLanes> tail_x(x + whole, rest);
      const Tail<S, kLanes> tail_g(g + whole, rest);
      Tail<T, kLanes> tail_d(d + whole, rest), tail_v(v + whole, rest);
      const Pack<T> root = update_root<Scaled>(tail_g.lanes, tail_v.lanes, c);
      update_pack<Scaled>(tail_x.lanes, tail_g.lanes, tail_d.lanes, root, c, beta, take);
      tail_x.write(x + whole, rest);
      tail_d.write(d + whole, rest);
      tail_v.write(v + whole, rest);
    }
  }

  static void update(const AdamWChunk& chunk, const AdamWCoefficients<double>& c, double beta) {
    specialize(cast(c), [&](auto scaled, auto) {
      update_chunk<scaled>(chunk, cast(c), T(beta), T(1.0 - beta));
    });
  }
};

template <class S, class T>
struct SGD {
  using Coefficients = SGDCoefficients<T>;
  static constexpr int kLanes = Pack<T>::kLanes;

  static Coefficients cast(const SGDCoefficients<double>& c) {
    return {T(c.grad_factor), T(c.memory_lambda), T(c.weight_decay),
            T(c.gap_grad),    T(c.gap_memory),    T(c.lr)};
  }

  template <bool Scaled, bool Decay>
  AM_INLINE void sum_pack(const S* x, const S* g, const T* d, const Coefficients& c,
                          LaneSums<T>& sums) {
    sgd_sums<Scaled, Decay>(load(g), load(d), Decay ? load(x) : Pack<T>(T(0)), c, sums.num,
                            sums.den);
  }

  template <bool Scaled, bool Decay>
  static Sums sum_chunk(const SGDChunk& chunk, const Coefficients c) {
    const S* x = static_cast<const S*>(chunk.param);
    const S* g = static_cast<const S*>(chunk.grad);
    const T* d = static_cast<const T*>(chunk.momentum_buffer);
    const int64_t whole = chunk.numel - chunk.numel % kLanes;
    Accumulator<T> accumulator;
    for (int64_t begin = 0; begin < whole; begin += kBlock) {
      const int64_t end = begin + kBlock < whole ? begin + kBlock : whole;
      LaneSums<T> sums;
      for (int64_t i = begin; i < end; i += kLanes) {
        prefetch(g + i, d + i);
        if constexpr (Decay) prefetch(x + i);
        sum_pack<Scaled, Decay>(x + i, g + i, d + i, c, sums);
      }
      accumulator.add(sums);
    }
    if (const int64_t rest = chunk.numel - whole) {
      const Tail<S, kLanes> tail_x(x + whole, rest), tail_g(g + whole, rest);
      const Tail<T, kLanes> tail_d(d + whole, rest);
      LaneSums<T> sums;
      sum_pack<Scaled, Decay>(tail_x.lanes, tail_g.lanes, tail_d.lanes, c, sums);
      accumulator.add(sums, rest);
    }
    return accumulator.total();
  }

  static Sums sums(const SGDChunk& chunk, const SGDCoefficients<double>& c) {
    return specialize(
        cast(c), [&](auto scaled, auto decay) { return sum_chunk<scaled, decay>(chunk, cast(c)); });
  }

  template <bool Scaled, bool Decay>
  AM_INLINE void update_pack(S* x, const S* g, T* d, T keep, T take, const Coefficients& c) {
    Pack<T> new_d = load(d), new_x = load(x);
    sgd_update<Scaled, Decay>(load(g), new_d, new_x, keep, take, c);
    store(d, new_d);
    store(x, new_x);
  }

  template <bool Scaled, bool Decay>
  static void update_chunk(const SGDChunk& chunk, const Coefficients c, T keep, T take) {
    S* x = static_cast<S*>(chunk.param);
    const S* g = static_cast<const S*>(chunk.grad);
    T* d = static_cast<T*>(chunk.momentum_buffer);
    const int64_t whole = chunk.numel - chunk.numel % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
      update_pack<Scaled, Decay>(x + i, g + i, d + i, keep, take, c);
    if (const int64_t rest = chunk.numel - whole) {
      Tail<S, kLanes> tail_x(x + whole, rest);
      const Tail<S, kLanes> tail_g(g + whole, rest);
      Tail<T, kLanes> tail_d(d + whole, rest);
      update_pack<Scaled, Decay>(tail_x.lanes, tail_g.lanes, tail_d.lanes, keep, take, c);
      tail_x.write(x + whole, rest);
      tail_d.write(d + whole, rest);
    }
  }

  static void update(const SGDChunk& chunk, const SGDCoefficients<double>& c, double keep,
                     double take) {
    specialize(cast(c), [&](auto scaled, auto decay) {
      update_chunk<scaled, decay>(chunk, cast(c), T(keep), T(take));
    });
  }
};

}  // namespace

namespace am::cpu {

// In the order of DType.
extern const Kernels AM_KERNELS = {
    {AdamW<float, float>::sums, AdamW<double, double>::sums, AdamW<BFloat16, float>::sums,
     AdamW<Float16, float>::sums},
    {AdamW<float, float>::update, AdamW<double, double>::update, AdamW<BFloat16, float>::update,
     AdamW<Float16, float>::update},
    {SGD<float, float>::sums, SGD<double, double>::sums, SGD<BFloat16, float>::sums,
     SGD<Float16, float>::sums},
    {SGD<float, float>::update, SGD<double, double>::update, SGD<BFloat16, float>::update,
     SGD<Float16, float>::update},
};

}  // namespace am::cpu

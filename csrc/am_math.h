// The update of one element, and the scalars that go into it: the only place in
// C++ that holds the formulas. Plain C++17 without dependencies, so that the CPU
// kernels (V = a pack of lanes) and a CUDA kernel (V = float or double, one
// element a thread) compile the same text.
//
// Notation, as in docs/algorithm.md:
//   g gradient, d memory (exp_avg or momentum_buffer), v exp_avg_sq, x parameter,
//   P Adam's denominator, M = 1 / (P (1 + lambda P)), e = g - d,
//   eta learning rate, mu weight decay, kappa = 1 for the "anchored" plane.
#pragma once

#include <cmath>

// Internal linkage: the CPU compiles this header once for each instruction set, and
// a linker that merged the copies would run AVX-512 code on a machine without it.
#if defined(__CUDACC__)
#define AM_INLINE static __host__ __device__ __forceinline__
#else
#define AM_INLINE static inline __attribute__((always_inline))
#endif

namespace am {

// For float and double; a pack of lanes brings its own.
using std::fma;
using std::sqrt;

// Square roots and quotients. On a GPU those of float32 are right to a unit or two in the last
// place: the exact ones branch to a slow path, and so take one element after the other.
template <class V>
AM_INLINE V root_of(V v) {
  return sqrt(v);
}
template <class V>
AM_INLINE V quotient(V a, V b) {
  return a / b;
}
#if defined(__CUDA_ARCH__)
AM_INLINE float root_of(float v) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v));
  return root;
}
AM_INLINE float quotient(float a, float b) {
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
#endif

// What a parameter group sets, in double as Python gives it.
struct AdamWHyper {
  double lr, beta_max, beta2, eps, weight_decay, memory_lambda;
  bool anchored;  // memory plane through (x_{t-1}, f(x_{t-1})): kappa = 1
  bool loss_gap;  // the gap's difference of losses comes from outside the kernels
  bool maximize;
};

struct SGDHyper {
  double lr, beta_max, weight_decay, memory_lambda;
  bool anchored, loss_gap, maximize;
};

// What the element functions read, in the type T of the arithmetic.
template <class T>
struct AdamWCoefficients {
  T grad_factor;  // -1 for maximize, over grad_scale
  T beta2, one_minus_beta2;
  T root_scale;  // bias_correction1 / sqrt(bias_correction2)
  T eps;         // times bias_correction1
  T memory_lambda, weight_decay;
  T gap_grad, gap_memory;       // c_g - c_d and c_d, times (1 + mu eta) / eta
  T lr, decay;                  // decay = 1 - eta mu
  T cap_take, lambda_over_cap;  // 1 - beta_max, rounded once, and lambda / beta_max
};

template <class T>
struct SGDCoefficients {
  T grad_factor, memory_lambda, weight_decay;
  T gap_grad, gap_memory;  // c_g - c_d and c_d, times (1 + lambda) / eta
  T lr;
};

// c_g - c_d and c_d, times scale / eta, or zeros at eta = 0 (or a scheduler's rounding below),
// where the gap term is left out.
// So the gap's c_g g - c_d d is (c_g - c_d) g + c_d e, which does not take the difference of
// two products: d may be near g, and with the "anchored" plane c_g is c_d.
AM_INLINE void gap_factors(double prev_lr, double lr, double scale, bool anchored, bool loss_gap,
                           double* gap_grad, double* gap_memory) {
  // A schedule may end at 1e-51 where 0 was meant. From here on beta is at a bound, and float32 not
  // yet at its end.
  constexpr double kMost = 1e30;
  const double quotient = lr <= 0.0 ? 0.0 : scale * (prev_lr / lr);
  const double ratio = quotient > kMost ? kMost : quotient;
  *gap_memory = anchored ? ratio : 0.0;
  *gap_grad = (loss_gap ? 0.0 : ratio) - *gap_memory;
}

// step: the number of steps before this one. prev_lr: the state's. Without bias_correction1, which
// is the segment's: see adamw_corrected.
template <class T>
AM_INLINE AdamWCoefficients<T> adamw_coefficients(const AdamWHyper& h, double step, double prev_lr,
                                                  double grad_scale) {
  double gap_grad, gap_memory;
  gap_factors(prev_lr, h.lr, 1.0 + h.weight_decay * h.lr, h.anchored, h.loss_gap, &gap_grad,
              &gap_memory);
  AdamWCoefficients<T> c;
  c.grad_factor = static_cast<T>((h.maximize ? -1.0 : 1.0) / grad_scale);
  c.beta2 = static_cast<T>(h.beta2);
  c.one_minus_beta2 = static_cast<T>(1.0 - h.beta2);
  const double bias_correction2 = 1.0 - std::pow(h.beta2, step + 1.0);
  c.root_scale = static_cast<T>(1.0 / std::sqrt(bias_correction2));
  c.eps = static_cast<T>(h.eps);
  c.memory_lambda = static_cast<T>(h.memory_lambda);
  c.weight_decay = static_cast<T>(h.weight_decay);
  c.gap_grad = static_cast<T>(gap_grad);
  c.gap_memory = static_cast<T>(gap_memory);
  c.lr = static_cast<T>(h.lr);
  c.decay = static_cast<T>(1.0 - h.lr * h.weight_decay);
  c.cap_take = static_cast<T>(1.0 - h.beta_max);
  c.lambda_over_cap = static_cast<T>(h.beta_max > 0.0 ? h.memory_lambda / h.beta_max : 0.0);
  return c;
}

// The coefficients, of doubles, with the bias_correction1 of a segment with this beta_prod.
AM_INLINE AdamWCoefficients<double> adamw_corrected(AdamWCoefficients<double> c, double beta_max,
                                                    double beta_prod) {
  const double bias_correction1 = 1.0 - beta_max * beta_prod;
  c.root_scale *= bias_correction1;
  c.eps *= bias_correction1;
  return c;
}

template <class T>
AM_INLINE SGDCoefficients<T> sgd_coefficients(const SGDHyper& h, double prev_lr,
                                              double grad_scale) {
  double gap_grad, gap_memory;
  gap_factors(prev_lr, h.lr, 1.0 + h.memory_lambda, h.anchored, h.loss_gap, &gap_grad, &gap_memory);
  SGDCoefficients<T> c;
  c.grad_factor = static_cast<T>((h.maximize ? -1.0 : 1.0) / grad_scale);
  c.memory_lambda = static_cast<T>(h.memory_lambda);
  c.weight_decay = static_cast<T>(h.weight_decay);
  c.gap_grad = static_cast<T>(gap_grad);
  c.gap_memory = static_cast<T>(gap_memory);
  c.lr = static_cast<T>(h.lr);
  return c;
}

// beta = clip(num / den, 0, beta_max); 0 where den = 0 (d equals g), and where it has overflowed:
// with beta = 0 the new d is as finite as g. NaN stays NaN.
AM_INLINE double clipped_beta(double num, double den, double beta_max) {
  if (den == 0.0 || std::isinf(den)) return 0.0;
  const double beta = num / den;
  return beta < 0.0 ? 0.0 : beta > beta_max ? beta_max : beta;
}

// The first step has no earlier iterate: AM-AdamW takes the cap, so that with
// lambda = 0 it is AdamW's bias-corrected first step; AM-SGD takes d = g.
AM_INLINE double adamw_beta(double num, double den, double beta_max, double step) {
  return step == 0.0 ? beta_max : clipped_beta(num, den, beta_max);
}

AM_INLINE double sgd_beta(double num, double den, double beta_max, double step) {
  return step == 0.0 ? 0.0 : clipped_beta(num, den, beta_max);
}

// Whether the update is done with the cap for beta while the sums are taken, and repaired where
// beta turns out to be another: what has come of the "level" plane for most tensors at most steps.
// The types have to hold what the arithmetic gives: `exact`. A step that may be none is not begun,
// and a cap of 0 has nothing to repair, nor to guess from.
AM_INLINE bool adamw_guesses(const AdamWHyper& h, double step, bool exact) {
  return exact && !h.anchored && h.beta_max > 0.0 && !(step == 0.0 && h.lr == 0.0);
}

// Whether the guess has missed. Where den = 0, d equals g, and any beta gives the same.
AM_INLINE bool adamw_missed(double beta, double den, double beta_max) {
  return beta != beta_max && den != 0.0;
}

// Whether a step is none: at eta = 0 and without a gradient, before any other. Checkpoint tools
// make state by such steps, so nothing of them stays. den is that of the segment alone; the step of
// a tensor of many counts where that of one does.
AM_INLINE bool is_idle(double step, double lr, double den) {
  return step == 0.0 && lr == 0.0 && den == 0.0;
}

// AM-SGD's first step takes no sums. For is_idle, den tells whether there is a gradient (weight
// decay left out, so that den is sum(g^2)) by a number that adds nothing to any other.
AM_INLINE double sgd_first_den(double den) { return den != 0.0 ? 1e-300 : 0.0; }

// What AM-SGD's new d takes of the old one and of the gradient.
AM_INLINE void sgd_mixture(double beta, double memory_lambda, double step, double* keep,
                           double* take) {
  const bool first = step == 0.0;
  *keep = first ? 0.0 : (beta + memory_lambda) / (1.0 + memory_lambda);
  *take = first ? 1.0 : (1.0 - beta) / (1.0 + memory_lambda);
}

// The element functions. g is the gradient as stored; it is multiplied with grad_factor
// where Scaled, and elsewhere that is 1. Multiply-adds are written out, so that no compiler
// has a choice to make; V(c) is the constant in every lane.

template <bool Scaled, class V, class C>
AM_INLINE V gradient(V g, const C& c) {
  return Scaled ? g * V(c.grad_factor) : g;
}

// g is weighted before it is squared, as in AdamW: g^2 overflows float32 from 1.8e19 on.

// Replaces v by the new one, and gives its square root. A function of its own, as the CPU kernels
// call it ahead of the rest.
template <bool Scaled, class V, class T>
AM_INLINE V adamw_root(V g, V& v, const AdamWCoefficients<T>& c) {
  g = gradient<Scaled>(g, c);
  v = fma(g * V(c.one_minus_beta2), g, v * V(c.beta2));
  return root_of(v);
}

// P = bias_correction1 (sqrt(v / bias_correction2) + eps)
template <class V, class T>
AM_INLINE V adamw_denominator(V root, const AdamWCoefficients<T>& c) {
  return fma(root, V(c.root_scale), V(c.eps));
}

// What the sums and the update of an element take of it. With M = 1 / (P (1 + lambda P)),
// D = (1 + lambda P) d and e = g - d: P, e, e M and D M.
template <class V>
struct AdamWTerms {
  V p, e, weighted, slope;
};

// g: with grad_factor.
template <class V, class T>
AM_INLINE AdamWTerms<V> adamw_terms(V g, V d, V root, const AdamWCoefficients<T>& c) {
  const V p = adamw_denominator(root, c);
  const V damping = fma(p, V(c.memory_lambda), V(T(1)));
  const V m = quotient(V(T(1)), p * damping);
  const V e = g - d;
  return {p, e, e * m, d * damping * m};
}

// Adds one element's part of num (the gap included) and den. With u = c_g g - c_d d + e, what the
// terms have in common is taken out:
//   1 / P = M (1 + lambda P)     g + lambda P d = D + e
//   num = (c_g g - c_d d) (d / P + mu x) + e (g + lambda P d) M + mu x e
//       = u (M D + mu x) + e^2 M
// e is weighted before it is squared, which overflows later. x is read only where Decay. Level:
// gap_memory is 0.
template <bool Decay, bool Level = false, class V, class T>
AM_INLINE void adamw_add(V g, V x, const AdamWTerms<V>& t, const AdamWCoefficients<T>& c, V& num,
                         V& den) {
  const V u = fma(g, V(c.gap_grad), Level ? t.e : fma(t.e, V(c.gap_memory), t.e));
  const V e2 = t.weighted * t.e;
  num = fma(u, Decay ? fma(x, V(c.weight_decay), t.slope) : t.slope, num + e2);
  den = den + e2;
}

// The new d and x of one element. With the new d before its division,
// n = (1 - beta) g + (beta + lambda P) d = D + (1 - beta) e: d / P = n M, d = n / (1 + lambda P).
// take: 1 - beta, rounded once; beta may be near 1.
template <class V, class T>
AM_INLINE void adamw_move(V p, V weighted, V slope, T take, const AdamWCoefficients<T>& c, V& d,
                          V& x) {
  const V step = fma(weighted, V(take), slope);
  d = step * p;
  x = fma(step, V(-c.lr), x * V(c.decay));
}

template <bool Scaled, bool Decay, class V, class T>
AM_INLINE void adamw_sums(V g, V d, V root, V x, const AdamWCoefficients<T>& c, V& num, V& den) {
  g = gradient<Scaled>(g, c);
  adamw_add<Decay>(g, x, adamw_terms(g, d, root, c), c, num, den);
}

// Updates one element's d and x with the beta of its segment.
template <bool Scaled, class V, class T>
AM_INLINE void adamw_update(V g, V& d, V root, V& x, T take, const AdamWCoefficients<T>& c) {
  const AdamWTerms<V> t = adamw_terms(gradient<Scaled>(g, c), d, root, c);
  adamw_move(t.p, t.weighted, t.slope, take, c, d, x);
}

// The sums, for the "level" plane, and the update with the cap, with one division.
template <bool Scaled, bool Decay, class V, class T>
AM_INLINE void adamw_guess(V g, V& d, V root, V& x, const AdamWCoefficients<T>& c, V& num, V& den) {
  g = gradient<Scaled>(g, c);
  const AdamWTerms<V> t = adamw_terms(g, d, root, c);
  adamw_add<Decay, true>(g, x, t, c, num, den);
  adamw_move(t.p, t.weighted, t.slope, c.cap_take, c, d, x);
}

// From the d and x of a step with the cap those of a step with beta:
//   r = (c - beta) / (c + lambda P)     d = d_c + r (g - d_c)     x = x_c - eta r (g - d_c) / P
// root: of the new v. miss: (c - beta) / c.
template <bool Scaled, class V, class T>
AM_INLINE void adamw_repair(V g, V& d, V root, V& x, T miss, const AdamWCoefficients<T>& c) {
  g = gradient<Scaled>(g, c);
  const V p = adamw_denominator(root, c);
  const V step = quotient(V(miss), p * fma(p, V(c.lambda_over_cap), V(T(1)))) * (g - d);
  d = fma(step, p, d);
  x = fma(step, V(-c.lr), x);
}

template <bool Scaled, bool Decay, class V, class T>
AM_INLINE V sgd_gradient(V g, V x, const SGDCoefficients<T>& c) {
  g = gradient<Scaled>(g, c);
  return Decay ? fma(x, V(c.weight_decay), g) : g;
}

// num = (c_g g - c_d d) d + e (g + lambda d) with the decayed g.
// e is g - (d - mu x), where the parenthesis is rounded once: where mu x is larger than the
// gradient, g + mu x would lose the digits that are left in the difference.
template <bool Scaled, bool Decay, class V, class T>
AM_INLINE void sgd_sums(V g, V d, V x, const SGDCoefficients<T>& c, V& num, V& den) {
  const V e = gradient<Scaled>(g, c) - (Decay ? fma(x, V(-c.weight_decay), d) : d);
  g = sgd_gradient<Scaled, Decay>(g, x, c);
  const V slope = fma(g, V(c.gap_grad), e * V(c.gap_memory));
  num = fma(slope, d, num);
  num = fma(e, fma(d, V(c.memory_lambda), g), num);
  den = fma(e, e, den);
}

// d = keep d + take g
template <bool Scaled, bool Decay, class V, class T>
AM_INLINE void sgd_update(V g, V& d, V& x, T keep, T take, const SGDCoefficients<T>& c) {
  g = sgd_gradient<Scaled, Decay>(g, x, c);
  d = fma(g, V(take), d * V(keep));
  x = fma(d, V(-c.lr), x);
}

}  // namespace am

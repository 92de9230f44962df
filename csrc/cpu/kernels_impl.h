// The chunk walk around am_math.h, compiled once for each instruction set by the
// kernels_*.cpp beside it, which define AM_KERNELS, the name of the table.
#include <algorithm>
#include <cmath>
#include <limits>
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

  // Takes over the sums of so many lanes, and leaves zeros.
  void take(LaneSums<T>& sums, int64_t lanes) {
    T lane_num[kLanes], lane_den[kLanes];
    store(lane_num, sums.num);
    store(lane_den, sums.den);
    for (int64_t l = 0; l < lanes; ++l) {
      num[l] += lane_num[l];
      den[l] += lane_den[l];
    }
    sums = LaneSums<T>();
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

// Four streams are read while the sums are taken, and the processor's own prefetching starts anew
// at every page. Asking this many bytes ahead makes tensors larger than the caches 8 to 14 %
// faster, and costs 10 % in them, where there is time to spare (Zen 4, AVX-512; half as far gives
// half). The second half, which divides less, gains nothing by it.
constexpr int64_t kPrefetchBytes = 2048;
// Beside the sums of a row the one before it is updated, and half as far is better: 2 to 4 % of a
// step of rows of 768 to 16,384 elements (Zen 5, AVX-512).
constexpr int64_t kRowPrefetchBytes = 1024;

// Where a pack of a chunk lies. S: stored type of parameter and gradient; T: type of the memory
// and the arithmetic. kHasV: not AM-SGD.
template <class S, class T, bool kHasV>
struct Place {
  S* x;
  const S* g;
  T *d, *v;

  AM_INLINE Place at(const Place& p, int64_t i) {
    return {p.x + i, p.g + i, p.d + i, kHasV ? p.v + i : nullptr};
  }
};

// The same of a pack of which there are fewer elements.
template <class S, class T, bool kHasV>
struct LastPlace {
  First<S> x;
  First<const S> g;
  First<T> d, v;

  AM_INLINE LastPlace of(const Place<S, T, kHasV>& p, int64_t n) {
    return {{p.x, n}, {p.g, n}, {p.d, n}, {p.v, n}};
  }
};

template <int64_t kBytes, class P>
AM_INLINE void prefetch_one(const P* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kBytes);
}
template <int64_t kBytes, class P>
AM_INLINE void prefetch_one(First<P>) {}

template <int64_t kBytes = kPrefetchBytes, class... P>
AM_INLINE void prefetch(P... p) {
  (prefetch_one<kBytes>(p), ...);
}

// What is stored in few bits is worked on piece by piece, and its kernels ask for the next piece
// beside a pack of this one. Others ask for what is ahead of them themselves.
struct Stream {
  const char* next;
  int64_t bytes;  // an element
};

template <int kStreams>
struct Beside {
  Stream streams[kStreams];

  AM_MEMBER void operator()(int64_t i) const {
    for (const Stream& s : streams) __builtin_prefetch(s.next + i * s.bytes);
  }
};

struct Alone {
  AM_MEMBER void operator()(int64_t) const {}
};

template <class B>
constexpr bool kIsAlone = std::is_same_v<B, Alone>;

// Calls finish(place, start(place), i) for every pack, which begins with element i, with start()
// one pack ahead: while a square root is being taken the processor finds other work to do, of which
// it sees only some hundred instructions ahead. 10 to 13 % of a step in cache (two cores, AVX2).
// And end(lanes) after each `block` elements, with how many lanes were theirs.
template <class S, class T, bool kHasV, class Start, class Finish, class End>
AM_INLINE void walk(const Place<S, T, kHasV>& p, int64_t numel, int64_t block, Start start,
                    Finish finish, End end) {
  constexpr int kLanes = Pack<T>::kLanes;
  const int64_t whole = numel - numel % kLanes;
  for (int64_t begin = 0; begin < whole; begin += block) {
    const int64_t last = std::min(begin + block, whole) - kLanes;
    auto started = start(p.at(p, begin));
    for (int64_t i = begin; i < last; i += kLanes) {
      const auto next = start(p.at(p, i + kLanes));
      finish(p.at(p, i), started, i);
      started = next;
    }
    finish(p.at(p, last), started, last);
    end(kLanes);
  }
  if (const int64_t rest = numel - whole) {
    const auto tail = LastPlace<S, T, kHasV>::of(p.at(p, whole), rest);
    finish(tail, start(tail), whole);
    end(rest);
  }
}

// Calls f with what the coefficients leave out: no scaling, no weight decay.
template <class Coefficients, class F>
AM_INLINE auto specialize(const Coefficients& c, F f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (c.grad_factor != 1) return c.weight_decay != 0 ? f(Yes{}, Yes{}) : f(Yes{}, No{});
  return c.weight_decay != 0 ? f(No{}, Yes{}) : f(No{}, No{});
}

template <class S, class T>
struct AdamW {
  using Coefficients = AdamWCoefficients<T>;
  using Place = ::Place<S, T, true>;

  static Coefficients cast(const AdamWCoefficients<double>& c) {
    return {T(c.grad_factor),   T(c.beta2),        T(c.one_minus_beta2), T(c.root_scale), T(c.eps),
            T(c.memory_lambda), T(c.weight_decay), T(c.gap_grad),        T(c.gap_memory), T(c.lr),
            T(c.decay),         T(c.cap_take),     T(c.lambda_over_cap)};
  }

  static Place place(const AdamWChunk& chunk) {
    return {static_cast<S*>(chunk.param), static_cast<const S*>(chunk.grad),
            static_cast<T*>(chunk.exp_avg), static_cast<T*>(chunk.exp_avg_sq)};
  }

  template <bool Scaled, bool kStores, class P>
  AM_INLINE Pack<T> new_root(const P& p, const Coefficients& c) {
    Pack<T> v = load(p.v);
    const Pack<T> root = adamw_root<Scaled>(load(p.g), v, c);
    if (kStores) store(p.v, v);
    return root;
  }

  template <bool Scaled, bool Decay, bool Guess, class B = Alone>
  static void begin_chunk(const AdamWChunk& chunk, const Coefficients c,
                          Accumulator<T>& accumulator, const B beside = {}) {
    LaneSums<T> sums;
    walk(
        place(chunk), chunk.numel, kBlock,
        [&](const auto& p) AM_INLINE_LAMBDA {
          if constexpr (kIsAlone<B>) prefetch(p.g, p.v);
          return new_root<Scaled, Guess>(p, c);
        },
        [&](const auto& p, Pack<T> root, int64_t i) AM_INLINE_LAMBDA {
          beside(i);
          if constexpr (kIsAlone<B>) prefetch(p.d);
          if constexpr (kIsAlone<B> && (Guess || Decay)) prefetch(p.x);
          Pack<T> d = load(p.d), x = Guess || Decay ? load(p.x) : Pack<T>(T(0));
          if constexpr (Guess) {
            adamw_guess<Scaled, Decay>(load(p.g), d, root, x, c, sums.num, sums.den);
            store(p.d, d);
            store(p.x, x);
          } else {
            adamw_sums<Scaled, Decay>(load(p.g), d, root, x, c, sums.num, sums.den);
          }
        },
        [&](int64_t lanes) { accumulator.take(sums, lanes); });
  }

  static Sums sums(const AdamWChunk& chunk, const AdamWCoefficients<double>& c) {
    Accumulator<T> accumulator;
    specialize(cast(c), [&](auto scaled, auto decay) {
      begin_chunk<scaled, decay, false>(chunk, cast(c), accumulator);
    });
    return accumulator.total();
  }

  static Sums guess(const AdamWChunk& chunk, const AdamWCoefficients<double>& c) {
    Accumulator<T> accumulator;
    specialize(cast(c), [&](auto scaled, auto decay) {
      begin_chunk<scaled, decay, true>(chunk, cast(c), accumulator);
    });
    return accumulator.total();
  }

  // A row whose sums are there, and what its update takes: 1 - beta, and P and the weighted
  // difference of each element. Its d is the slope.
  struct BegunRow {
    Place first;
    const T* scratch;
    T take;

    AM_MEMBER Place at(const Place&, int64_t i) const { return first.at(first, i); }
    AM_MEMBER LastPlace<S, T, true> at(const LastPlace<S, T, true>& p, int64_t i) const {
      return LastPlace<S, T, true>::of(first.at(first, i), p.x.n);
    }
    // The update of the pack that begins with element i. like: a place of as many elements.
    template <class P>
    AM_MEMBER void finish(const P& like, int64_t i, const Coefficients& c) const {
      const auto p = at(like, i);
      const T* kept = scratch + kRowScratch * i;
      Pack<T> d, x = load(p.x);
      adamw_move(load(kept), load(kept + Pack<T>::kLanes), load(p.d), take, c, d, x);
      store(p.d, d);
      store(p.x, x);
    }
  };

  // A row is updated beside the sums of the next one, where it finds time while a square root or a
  // quotient is being taken: 13 % of a step in cache, rows of 816 elements (Zen 5). With sixteen
  // registers, half as large, there is no room for both: one after the other, 13 % of a step in
  // cache, rows of 768 and 1,024 (Zen 3).
  static constexpr bool kUpdatesBeside = kRegisterBytes == 64;

  // The sums of a row, and beside them, where kFinishes, the update of the one before.
  template <bool Scaled, bool Decay, bool kFinishes, class B>
  static Sums begin_row(const Place& row, int64_t numel, const Coefficients& c, T* scratch,
                        const BegunRow& before, int64_t first, const B& beside) {
    LaneSums<T> sums;
    Accumulator<T> accumulator;
    walk(
        row, numel, kBlock,
        [&](const auto& p) AM_INLINE_LAMBDA {
          if constexpr (kIsAlone<B>) prefetch<kRowPrefetchBytes>(p.g, p.v);
          return new_root<Scaled, true>(p, c);
        },
        [&](const auto& p, Pack<T> root, int64_t i) AM_INLINE_LAMBDA {
          beside(first + i);
          if constexpr (kIsAlone<B>) prefetch<kRowPrefetchBytes>(p.d, p.x);
          const Pack<T> g = gradient<Scaled>(load(p.g), c);
          const Pack<T> x = Decay ? load(p.x) : Pack<T>(T(0));
          const auto terms = adamw_terms(g, load(p.d), root, c);
          if constexpr (kFinishes) before.finish(p, i, c);
          adamw_add<Decay>(g, x, terms, c, sums.num, sums.den);
          store(p.d, terms.slope);
          store(scratch + kRowScratch * i, terms.p);
          store(scratch + kRowScratch * i + Pack<T>::kLanes, terms.weighted);
        },
        [&](int64_t lanes) { accumulator.take(sums, lanes); });
    return accumulator.total();
  }

  template <bool Scaled, bool Decay, class B>
  static void step_rows(const AdamWRows& run, const AdamWCoefficients<double>& base,
                        const B& beside) {
    const int64_t numel = run.first.numel;
    // That of each other row: their packs begin with a line of the cache, as `run`'s does.
    const int64_t size = kRowScratch * (numel / Pack<T>::kLanes + 1) * Pack<T>::kLanes;
    T* const scratch = static_cast<T*>(run.scratch);
    Coefficients c = cast(base);
    BegunRow begun{};
    Place row = place(run.first);
    for (int64_t k = 0; k < run.rows; ++k, row = row.at(row, numel)) {
      const double beta_prod = run.beta_prods.read(run.index + k);
      const auto corrected = adamw_corrected(base, run.beta_max, beta_prod);
      c.root_scale = T(corrected.root_scale);
      c.eps = T(corrected.eps);
      T* const own = scratch + (kUpdatesBeside ? k % 2 * size : 0);
      const int64_t first = k * numel;
      const Sums sums =
          kUpdatesBeside && k > 0
              ? begin_row<Scaled, Decay, kUpdatesBeside>(row, numel, c, own, begun, first, beside)
              : begin_row<Scaled, Decay, false>(row, numel, c, own, begun, first, beside);
      const double beta = adamw_beta(sums.num, sums.den, run.beta_max, run.step);
      run.beta_prods.write(beta_prod * beta, run.index + k);
      run.betas.write(beta, run.index + k);
      begun = {row, own, T(1.0 - beta)};
      if (kUpdatesBeside && k + 1 < run.rows) continue;
      walk(
          row, numel, numel, [](const auto&) { return 0; },
          [&](const auto& p, int, int64_t i) AM_INLINE_LAMBDA { begun.finish(p, i, c); },
          [](int64_t) {});
    }
  }

  template <class B>
  static void rows_beside(const AdamWRows& run, const AdamWCoefficients<double>& c,
                          const B& beside) {
    specialize(cast(c), [&](auto scaled, auto decay) { step_rows<scaled, decay>(run, c, beside); });
  }

  static void rows(const AdamWRows& run, const AdamWCoefficients<double>& c) {
    rows_beside(run, c, Alone());
  }

  // amount: 1 - beta, or, for a repair, what the guess has missed by.
  template <bool Scaled, bool Repair, class B = Alone>
  static void finish_chunk(const AdamWChunk& chunk, const Coefficients c, T amount,
                           const B beside = {}) {
    walk(
        place(chunk), chunk.numel, chunk.numel,
        [&](const auto& p)
            AM_INLINE_LAMBDA { return Repair ? sqrt(load(p.v)) : new_root<Scaled, true>(p, c); },
        [&](const auto& p, Pack<T> root, int64_t i) AM_INLINE_LAMBDA {
          beside(i);
          Pack<T> d = load(p.d), x = load(p.x);
          if constexpr (Repair) {
            adamw_repair<Scaled>(load(p.g), d, root, x, amount, c);
          } else {
            adamw_update<Scaled>(load(p.g), d, root, x, amount, c);
          }
          store(p.d, d);
          store(p.x, x);
        },
        [](int64_t) {});
  }

  template <class B>
  static void update_beside(const AdamWChunk& chunk, const AdamWCoefficients<double>& c,
                            double take, const B& beside) {
    specialize(cast(c), [&](auto scaled, auto) {
      finish_chunk<scaled, false>(chunk, cast(c), T(take), beside);
    });
  }

  static void update(const AdamWChunk& chunk, const AdamWCoefficients<double>& c, double take) {
    update_beside(chunk, c, take, Alone());
  }

  template <class B>
  static void repair_beside(const AdamWChunk& chunk, const AdamWCoefficients<double>& c,
                            double miss, const B& beside) {
    specialize(cast(c), [&](auto scaled, auto) {
      finish_chunk<scaled, true>(chunk, cast(c), T(miss), beside);
    });
  }

  static void repair(const AdamWChunk& chunk, const AdamWCoefficients<double>& c, double miss) {
    repair_beside(chunk, c, miss, Alone());
  }
};

template <class S, class T>
struct SGD {
  using Coefficients = SGDCoefficients<T>;
  using Place = ::Place<S, T, false>;

  static Coefficients cast(const SGDCoefficients<double>& c) {
    return {T(c.grad_factor), T(c.memory_lambda), T(c.weight_decay),
            T(c.gap_grad),    T(c.gap_memory),    T(c.lr)};
  }

  static Place place(const SGDChunk& chunk) {
    return {static_cast<S*>(chunk.param), static_cast<const S*>(chunk.grad),
            static_cast<T*>(chunk.momentum_buffer), nullptr};
  }

  template <bool Scaled, bool Decay, class B = Alone>
  static void sum_chunk(const SGDChunk& chunk, const Coefficients c, Accumulator<T>& accumulator,
                        const B beside = {}) {
    LaneSums<T> sums;
    walk(
        place(chunk), chunk.numel, kBlock, [](const auto&) { return 0; },
        [&](const auto& p, int, int64_t i) AM_INLINE_LAMBDA {
          beside(i);
          if constexpr (kIsAlone<B>) prefetch(p.g, p.d);
          if constexpr (kIsAlone<B> && Decay) prefetch(p.x);
          const Pack<T> x = Decay ? load(p.x) : Pack<T>(T(0));
          sgd_sums<Scaled, Decay>(load(p.g), load(p.d), x, c, sums.num, sums.den);
        },
        [&](int64_t lanes) { accumulator.take(sums, lanes); });
  }

  static Sums sums(const SGDChunk& chunk, const SGDCoefficients<double>& c) {
    Accumulator<T> accumulator;
    specialize(cast(c), [&](auto scaled, auto decay) {
      sum_chunk<scaled, decay>(chunk, cast(c), accumulator);
    });
    return accumulator.total();
  }

  template <bool Scaled, bool Decay, class B>
  static void update_chunk(const SGDChunk& chunk, const Coefficients c, T keep, T take,
                           const B beside) {
    walk(
        place(chunk), chunk.numel, chunk.numel, [](const auto&) { return 0; },
        [&](const auto& p, int, int64_t i) AM_INLINE_LAMBDA {
          beside(i);
          Pack<T> d = load(p.d), x = load(p.x);
          sgd_update<Scaled, Decay>(load(p.g), d, x, keep, take, c);
          store(p.d, d);
          store(p.x, x);
        },
        [](int64_t) {});
  }

  template <class B>
  static void update_beside(const SGDChunk& chunk, const SGDCoefficients<double>& c, double keep,
                            double take, const B& beside) {
    specialize(cast(c), [&](auto scaled, auto decay) {
      update_chunk<scaled, decay>(chunk, cast(c), T(keep), T(take), beside);
    });
  }

  static void update(const SGDChunk& chunk, const SGDCoefficients<double>& c, double keep,
                     double take) {
    update_beside(chunk, c, keep, take, Alone());
  }
};

// The norm of gradients.
template <class S, class T>
struct Norm {
  static constexpr int kLanes = Pack<T>::kLanes;

  AM_INLINE Pack<T> load_first(const S* g, int64_t numel) {
    return load(First<const S>{g, std::min<int64_t>(kLanes, numel)});
  }

  AM_INLINE void add_square(Pack<T> g, Pack<T>& sum) { sum = fma(g, g, sum); }

  // By blocks, in sums of their own so that no addition waits for the last one: memory is all that
  // is waited for.
  static double by_blocks(const S* g, int64_t numel) {
    double lanes[kLanes] = {};
    for (const S* const end = g + numel; g < end;) {
      Pack<T> a(T(0)), b(T(0)), c(T(0)), d(T(0));
      const S* const last = g + std::min<int64_t>(kBlock, end - g);
      for (; last - g >= 4 * kLanes; g += 4 * kLanes) {
        prefetch(g, g + kLanes, g + 2 * kLanes, g + 3 * kLanes);
        add_square(load(g), a);
        add_square(load(g + kLanes), b);
        add_square(load(g + 2 * kLanes), c);
        add_square(load(g + 3 * kLanes), d);
      }
      for (; g < last; g += std::min<int64_t>(kLanes, last - g))
        add_square(load_first(g, last - g), a);
      add(lanes, (a + b) + (c + d), [](double lane) { return lane; });
    }
    return total(lanes);
  }

  // A float's square has neither rounding, overflow nor underflow.
  static double in_double(const S* g, int64_t numel) {
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < numel; i += kLanes)
      add(lanes, load_first(g + i, numel - i), [](double lane) { return lane * lane; });
    return total(lanes);
  }

  template <class F>
  AM_INLINE void add(double (&lanes)[kLanes], Pack<T> pack, F f) {
    T values[kLanes];
    store(values, pack);
    for (int l = 0; l < kLanes; ++l) lanes[l] += f(static_cast<double>(values[l]));
  }

  static double total(const double (&lanes)[kLanes]) {
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }

  static double squares(const void* data, int64_t numel) {
    const S* g = static_cast<const S*>(data);
    if constexpr (std::is_same_v<T, float>) {
      // A square may be beyond float's range, on either side. One below it is lost in a sum that is
      // larger than this.
      constexpr double kSmallest = 1e-24;
      const double sum = by_blocks(g, numel);
      return sum > kSmallest && !std::isinf(sum) ? sum : in_double(g, numel);
    } else {
      return by_blocks(g, numel);
    }
  }
};

}  // namespace

#include "formats_impl.h"

namespace {

// ---- what is stored in few bits: piece by piece in float32 --------------------------------

// Calls f(staged, n, next) for pieces of a chunk, with their elements in float32; next: the first
// element behind them.
template <Stores kStores, class F>
AM_INLINE void for_pieces(const LowChunk& chunk, bool reads_param, F f) {
  alignas(64) float room[kLowRoom * (kPiece + kEach)];
  for (int64_t done = 0; done < chunk.numel; done += kPiece) {
    const int64_t begin = chunk.begin + done, n = std::min(kPiece, chunk.numel - done);
    const Staged staged = stage(*chunk.tensor, begin, n, reads_param, room);
    f(staged, n, begin + n);
    if constexpr (kStores != Stores::kNone)
      store_piece<kStores>(*chunk.tensor, begin, n, staged, begin + n);
  }
}

template <int kMemories>
AM_INLINE Beside<kMemories> memories_beside(const LowTensor& t, int64_t next) {
  Beside<kMemories> result;
  for (int k = 0; k < kMemories; ++k) result.streams[k] = memory_stream(t.memories[k], next);
  return result;
}

template <int kMemories, bool kWithParam>
AM_INLINE auto all_beside(const LowTensor& t, int64_t next) {
  Beside<kMemories + 1 + kWithParam> result;
  for (int k = 0; k < kMemories; ++k) result.streams[k] = memory_stream(t.memories[k], next);
  result.streams[kMemories] = stream(t, t.grad, next);
  if constexpr (kWithParam) result.streams[kMemories + 1] = stream(t, t.param, next);
  return result;
}

// Calls f with the optimizer's kernels that take what is staged.
template <template <class, class> class Optimizer, class F>
AM_INLINE void with_kernels(const LowTensor& tensor, F f) {
  if (tensor.kernel_dtype() == kBFloat16) {
    f(Optimizer<BFloat16, float>{});
  } else {
    f(Optimizer<float, float>{});
  }
}

AM_INLINE AdamWChunk adamw_chunk(const Staged& staged, int64_t n) {
  return {staged.param, staged.grad, staged.memories[0], staged.memories[1], n};
}

AM_INLINE SGDChunk sgd_chunk(const Staged& staged, int64_t n) {
  return {staged.param, staged.grad, staged.memories[0], n};
}

Sums low_adamw_sums(const LowChunk& chunk, const AdamWCoefficients<double>& c) {
  Accumulator<float> accumulator;
  with_kernels<AdamW>(*chunk.tensor, [&](auto kernels) {
    using Own = decltype(kernels);
    specialize(Own::cast(c), [&](auto scaled, auto decay) {
      for_pieces<Stores::kNone>(chunk, decay, [&](const Staged& staged, int64_t n, int64_t next) {
        Own::template begin_chunk<scaled, decay, false>(adamw_chunk(staged, n), Own::cast(c),
                                                        accumulator,
                                                        all_beside<2, decay>(*chunk.tensor, next));
      });
    });
  });
  return accumulator.total();
}

// What may be guessed is float32 where the kernels work.
using GuessedAdamW = AdamW<float, float>;

Sums low_adamw_guess(const LowChunk& chunk, const AdamWCoefficients<double>& c) {
  const auto own = GuessedAdamW::cast(c);
  Accumulator<float> accumulator;
  specialize(own, [&](auto scaled, auto decay) {
    for_pieces<Stores::kAll>(chunk, true, [&](const Staged& staged, int64_t n, int64_t next) {
      const auto beside = memories_beside<2>(*chunk.tensor, next);
      GuessedAdamW::begin_chunk<scaled, decay, true>(adamw_chunk(staged, n), own, accumulator,
                                                     beside);
    });
  });
  return accumulator.total();
}

void low_adamw_update(const LowChunk& chunk, const AdamWCoefficients<double>& c, double take) {
  with_kernels<AdamW>(*chunk.tensor, [&](auto kernels) {
    for_pieces<Stores::kAll>(chunk, true, [&](const Staged& staged, int64_t n, int64_t next) {
      const auto beside = memories_beside<2>(*chunk.tensor, next);
      decltype(kernels)::update_beside(adamw_chunk(staged, n), c, take, beside);
    });
  });
}

void low_adamw_repair(const LowChunk& chunk, const AdamWCoefficients<double>& c, double miss) {
  for_pieces<Stores::kRepair>(chunk, true, [&](const Staged& staged, int64_t n, int64_t next) {
    const auto beside = memories_beside<2>(*chunk.tensor, next);
    GuessedAdamW::repair_beside(adamw_chunk(staged, n), c, miss, beside);
  });
}

void low_adamw_rows(const LowAdamWRows& run, const AdamWCoefficients<double>& c) {
  const LowTensor& tensor = *run.first.tensor;
  const int64_t numel = run.first.numel;
  with_kernels<AdamW>(tensor, [&](auto kernels) {
    AdamWRows own = run.rows;
    for (int64_t done = 0; done < run.rows.rows; done += own.rows) {
      own.rows = std::min(run.at_once, run.rows.rows - done);
      own.index = run.rows.index + done;
      const int64_t begin = run.first.begin + done * numel, n = own.rows * numel;
      const Staged staged = stage(tensor, begin, n, true, run.room);
      own.first = adamw_chunk(staged, numel);
      decltype(kernels)::rows_beside(own, c, memories_beside<2>(tensor, begin + n));
      store_staged(tensor, begin, n, staged);
    }
  });
}

Sums low_sgd_sums(const LowChunk& chunk, const SGDCoefficients<double>& c) {
  Accumulator<float> accumulator;
  with_kernels<SGD>(*chunk.tensor, [&](auto kernels) {
    using Own = decltype(kernels);
    specialize(Own::cast(c), [&](auto scaled, auto decay) {
      for_pieces<Stores::kNone>(chunk, decay, [&](const Staged& staged, int64_t n, int64_t next) {
        Own::template sum_chunk<scaled, decay>(sgd_chunk(staged, n), Own::cast(c), accumulator,
                                               all_beside<1, decay>(*chunk.tensor, next));
      });
    });
  });
  return accumulator.total();
}

void low_sgd_update(const LowChunk& chunk, const SGDCoefficients<double>& c, double keep,
                    double take) {
  with_kernels<SGD>(*chunk.tensor, [&](auto kernels) {
    for_pieces<Stores::kAll>(chunk, true, [&](const Staged& staged, int64_t n, int64_t next) {
      const auto beside = memories_beside<1>(*chunk.tensor, next);
      decltype(kernels)::update_beside(sgd_chunk(staged, n), c, keep, take, beside);
    });
  });
}

}  // namespace

namespace am::cpu {

// A function for each DType, in their order.
#define AM_FOR_DTYPES(Optimizer, function)                                 \
  {Optimizer<float, float>::function, Optimizer<double, double>::function, \
   Optimizer<BFloat16, float>::function, Optimizer<Float16, float>::function}

extern const Kernels AM_KERNELS = {
    AM_FOR_DTYPES(AdamW, sums),
    AM_FOR_DTYPES(AdamW, guess),
    AM_FOR_DTYPES(AdamW, update),
    AM_FOR_DTYPES(AdamW, rows),
    AM_FOR_DTYPES(AdamW, repair),
    AM_FOR_DTYPES(SGD, sums),
    AM_FOR_DTYPES(SGD, update),
    low_adamw_sums,
    low_adamw_guess,
    low_adamw_update,
    low_adamw_repair,
    low_adamw_rows,
    low_sgd_sums,
    low_sgd_update,
    AM_FOR_DTYPES(Norm, squares),
};

}  // namespace am::cpu

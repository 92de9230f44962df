// Work in parts, on the caller's threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "library.h"

namespace am::cpu {

// On the threads of an OpenMP that is in the process, or else on new ones, of which each takes 20
// us to make. parts: no more than there are to be threads.
void run_in_parallel(int64_t parts, void (*f)(void* context, int64_t part), void* context);

// Calls f(0) ... f(parts - 1), each once.
template <class F>
void parallel_for(const Threads& threads, int64_t parts, const F& f) {
  if (parts <= 1) {
    if (parts == 1) f(0);
    return;
  }
  const auto run = threads.parallel_for != nullptr ? threads.parallel_for : run_in_parallel;
  run(
      parts, [](void* context, int64_t part) { (*static_cast<const F*>(context))(part); },
      const_cast<F*>(&f));
}

// Calls f(i) for i below n, in a run of at least `least` for each thread.
template <class F>
void for_each(const Threads& threads, int64_t n, int64_t least, const F& f) {
  const int64_t parts = std::min(n, std::max<int64_t>(1, std::min(threads.count, n / least)));
  parallel_for(threads, parts, [&](int64_t part) {
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) f(i);
  });
}

// For every tensor. With thousands of them, looking each one up in memory is most of a step's
// time, so that is shared among the threads too.
template <class F>
void for_each_tensor(const Threads& threads, int64_t tensors, const F& f) {
  for_each(threads, tensors, 256, f);
}

}  // namespace am::cpu

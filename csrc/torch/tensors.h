// What the step and the norm ask of tensors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include "../cpu/library.h"

namespace am::cpu {

inline DType dtype_of(const at::Tensor& t, const char* name, size_t i) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " ", i, " has dtype ", t.scalar_type(),
                       "; the cpu backend takes float32, float64, bfloat16 and float16");
  }
}

// torch's threads, as the kernels take them.
inline Threads torch_threads() {
  const auto parallel_for = [](int64_t parts, void (*f)(void* context, int64_t part),
                               void* context) {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) f(context, part);
    });
  };
  return {at::get_num_threads(), parallel_for};
}

// Calls f(i) for every tensor. With thousands of them, looking each one up in memory is
// most of a step's time, so that is shared among the threads too.
template <class F>
void for_each_tensor(size_t tensors, F f) {
  at::parallel_for(0, static_cast<int64_t>(tensors), 256, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;  // the other threads do not have the caller's
    for (int64_t i = begin; i < end; ++i) f(static_cast<size_t>(i));
  });
}

}  // namespace am::cpu

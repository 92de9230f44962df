// A step on CPU tensors. Two callers: the operators (ops_cpu.cpp), and Python without
// torch's dispatcher in between (calls.cpp). Arguments are those of the operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "tensor_refs.h"

namespace am::cpu {

using OptionalTensor = std::optional<at::Tensor>;

// One entry a tensor in every list, but for `packed`.
struct AdamWTensors {
  TensorRefs params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas, packed;
};

struct SGDTensors {
  TensorRefs params, grads, momentum_buffers, steps, prev_lrs, betas, packed;
};

struct Options {
  const at::Tensor& lrs;
  at::IntArrayRef group_sizes;
  at::ArrayRef<double> hypers;
  const OptionalTensor &grad_scale, &found_inf, &rounding;
};

at::Tensor adamw_begin_(const AdamWTensors& tensors, const Options& options);
void adamw_finish_(const AdamWTensors& tensors, const Options& options, const OptionalTensor& rows);
at::Tensor sgd_begin(const SGDTensors& tensors, const Options& options);
void sgd_finish_(const SGDTensors& tensors, const Options& options, const OptionalTensor& rows);

}  // namespace am::cpu

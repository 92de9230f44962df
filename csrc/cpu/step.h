// A step on CPU tensors. Two callers: the operators (ops_cpu.cpp), and Python without
// torch's dispatcher in between (../python.cpp). Arguments are those of ../ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../tensor_refs.h"

namespace am::cpu {

using OptionalTensor = std::optional<at::Tensor>;

// One entry a tensor in every list; stats is given no betas.
struct AdamWTensors {
  TensorRefs params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas;
};

struct SGDTensors {
  TensorRefs params, grads, momentum_buffers, steps, prev_lrs, betas;
};

struct Groups {
  const at::Tensor& lrs;
  at::IntArrayRef sizes;
  at::ArrayRef<double> hypers;
};

at::Tensor adamw_stats(const AdamWTensors& tensors, const Groups& groups,
                       const OptionalTensor& grad_scale);
void adamw_apply_(const AdamWTensors& tensors, const OptionalTensor& rows, const Groups& groups,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf);
at::Tensor sgd_stats(const SGDTensors& tensors, const Groups& groups,
                     const OptionalTensor& grad_scale);
void sgd_apply_(const SGDTensors& tensors, const OptionalTensor& rows, const Groups& groups,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf);

}  // namespace am::cpu

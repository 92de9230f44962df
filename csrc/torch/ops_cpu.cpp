// The operators' kernels for CPU tensors.
#include <torch/library.h>

#include "norms.h"
#include "step.h"

namespace am::cpu {
namespace {

using at::Tensor;
using at::TensorList;

Tensor adamw_begin_op(TensorList params, TensorList grads, TensorList exp_avgs,
                      TensorList exp_avg_sqs, TensorList steps, TensorList beta_prods,
                      TensorList prev_lrs, TensorList betas, const Tensor& lrs,
                      at::IntArrayRef group_sizes, at::ArrayRef<double> hypers,
                      const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                      TensorList packed, const OptionalTensor& rounding) {
  return adamw_begin_({TensorRefs(params), TensorRefs(grads), TensorRefs(exp_avgs),
                       TensorRefs(exp_avg_sqs), TensorRefs(steps), TensorRefs(beta_prods),
                       TensorRefs(prev_lrs), TensorRefs(betas), TensorRefs(packed)},
                      {lrs, group_sizes, hypers, grad_scale, found_inf, rounding});
}

void adamw_finish_op(TensorList params, TensorList grads, TensorList exp_avgs,
                     TensorList exp_avg_sqs, TensorList steps, TensorList beta_prods,
                     TensorList prev_lrs, TensorList betas, const Tensor& lrs,
                     at::IntArrayRef group_sizes, at::ArrayRef<double> hypers,
                     const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                     TensorList packed, const OptionalTensor& rounding,
                     const OptionalTensor& rows) {
  adamw_finish_({TensorRefs(params), TensorRefs(grads), TensorRefs(exp_avgs),
                 TensorRefs(exp_avg_sqs), TensorRefs(steps), TensorRefs(beta_prods),
                 TensorRefs(prev_lrs), TensorRefs(betas), TensorRefs(packed)},
                {lrs, group_sizes, hypers, grad_scale, found_inf, rounding}, rows);
}

Tensor sgd_begin_op(TensorList params, TensorList grads, TensorList momentum_buffers,
                    TensorList steps, TensorList prev_lrs, TensorList betas, const Tensor& lrs,
                    at::IntArrayRef group_sizes, at::ArrayRef<double> hypers,
                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                    TensorList packed, const OptionalTensor& rounding) {
  return sgd_begin({TensorRefs(params), TensorRefs(grads), TensorRefs(momentum_buffers),
                    TensorRefs(steps), TensorRefs(prev_lrs), TensorRefs(betas), TensorRefs(packed)},
                   {lrs, group_sizes, hypers, grad_scale, found_inf, rounding});
}

void sgd_finish_op(TensorList params, TensorList grads, TensorList momentum_buffers,
                   TensorList steps, TensorList prev_lrs, TensorList betas, const Tensor& lrs,
                   at::IntArrayRef group_sizes, at::ArrayRef<double> hypers,
                   const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                   TensorList packed, const OptionalTensor& rounding, const OptionalTensor& rows) {
  sgd_finish_({TensorRefs(params), TensorRefs(grads), TensorRefs(momentum_buffers),
               TensorRefs(steps), TensorRefs(prev_lrs), TensorRefs(betas), TensorRefs(packed)},
              {lrs, group_sizes, hypers, grad_scale, found_inf, rounding}, rows);
}

Tensor squared_norms_op(TensorList grads) { return squared_norms(TensorRefs(grads)); }

}  // namespace

TORCH_LIBRARY_IMPL(adamem_fused, CPU, m) {
  m.impl("adamw_begin_", adamw_begin_op);
  m.impl("adamw_finish_", adamw_finish_op);
  m.impl("sgd_begin", sgd_begin_op);
  m.impl("sgd_finish_", sgd_finish_op);
  m.impl("squared_norms", squared_norms_op);
}

}  // namespace am::cpu

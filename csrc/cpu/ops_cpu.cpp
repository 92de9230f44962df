// The operators' kernels for CPU tensors.
#include <torch/library.h>

#include "step.h"

namespace am::cpu {
namespace {

using at::Tensor;
using at::TensorList;

Tensor adamw_stats_op(TensorList params, TensorList grads, TensorList exp_avgs,
                      TensorList exp_avg_sqs, TensorList steps, TensorList beta_prods,
                      TensorList prev_lrs, const Tensor& lrs, at::IntArrayRef group_sizes,
                      at::ArrayRef<double> hypers, const OptionalTensor& grad_scale) {
  return adamw_stats(
      {TensorRefs(params), TensorRefs(grads), TensorRefs(exp_avgs), TensorRefs(exp_avg_sqs),
       TensorRefs(steps), TensorRefs(beta_prods), TensorRefs(prev_lrs), TensorRefs()},
      {lrs, group_sizes, hypers}, grad_scale);
}

void adamw_apply_op(TensorList params, TensorList grads, TensorList exp_avgs,
                    TensorList exp_avg_sqs, TensorList steps, TensorList beta_prods,
                    TensorList prev_lrs, TensorList betas, const OptionalTensor& rows,
                    const Tensor& lrs, at::IntArrayRef group_sizes, at::ArrayRef<double> hypers,
                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  adamw_apply_(
      {TensorRefs(params), TensorRefs(grads), TensorRefs(exp_avgs), TensorRefs(exp_avg_sqs),
       TensorRefs(steps), TensorRefs(beta_prods), TensorRefs(prev_lrs), TensorRefs(betas)},
      rows, {lrs, group_sizes, hypers}, grad_scale, found_inf);
}

Tensor sgd_stats_op(TensorList params, TensorList grads, TensorList momentum_buffers,
                    TensorList steps, TensorList prev_lrs, const Tensor& lrs,
                    at::IntArrayRef group_sizes, at::ArrayRef<double> hypers,
                    const OptionalTensor& grad_scale) {
  return sgd_stats({TensorRefs(params), TensorRefs(grads), TensorRefs(momentum_buffers),
                    TensorRefs(steps), TensorRefs(prev_lrs), TensorRefs()},
                   {lrs, group_sizes, hypers}, grad_scale);
}

void sgd_apply_op(TensorList params, TensorList grads, TensorList momentum_buffers,
                  TensorList steps, TensorList prev_lrs, TensorList betas,
                  const OptionalTensor& rows, const Tensor& lrs, at::IntArrayRef group_sizes,
                  at::ArrayRef<double> hypers, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf) {
  sgd_apply_({TensorRefs(params), TensorRefs(grads), TensorRefs(momentum_buffers),
              TensorRefs(steps), TensorRefs(prev_lrs), TensorRefs(betas)},
             rows, {lrs, group_sizes, hypers}, grad_scale, found_inf);
}

}  // namespace

TORCH_LIBRARY_IMPL(adamem_fused, CPU, m) {
  m.impl("adamw_stats", adamw_stats_op);
  m.impl("adamw_apply_", adamw_apply_op);
  m.impl("sgd_stats", sgd_stats_op);
  m.impl("sgd_apply_", sgd_apply_op);
}

}  // namespace am::cpu

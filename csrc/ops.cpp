// The operators' schemas. Each backend registers its kernels for its dispatch key:
// cpu/ops_cpu.cpp for CPU, backends/cuda_ops.py of adamem_fused for CUDA, where backends/ops.py has
// the fake kernels.
//
// Lists of tensors hold one entry a tensor, over all parameter groups in order.
// group_sizes: how many of them belong to each group. lrs: [groups] float64, a tensor
// so that a learning rate on the device is never read back. hypers: for each group
//   AM-AdamW  beta_max, beta2, eps, weight_decay, memory_lambda, anchored, loss_gap, maximize,
//             shared
//   AM-SGD    beta_max, weight_decay, memory_lambda, anchored, loss_gap, maximize, shared
// rows: [tensors, 2] float64, num and den. What stats gives is what apply_ takes; in
// between, rows may be summed over tensors or over ranks. Where nothing is to happen in
// between, apply_ without rows does both; tensors of groups that are `shared` then take the
// sums over all such tensors.
#include <torch/library.h>

TORCH_LIBRARY(adamem_fused, m) {
  m.def(
      "adamw_stats(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, "
      "Tensor[] steps, Tensor[] beta_prods, Tensor[] prev_lrs, Tensor lrs, int[] group_sizes, "
      "float[] hypers, Tensor? grad_scale) -> Tensor");
  m.def(
      "adamw_apply_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] beta_prods, "
      "Tensor(f!)[] prev_lrs, Tensor(g!)[] betas, Tensor? rows, Tensor lrs, int[] group_sizes, "
      "float[] hypers, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "sgd_stats(Tensor[] params, Tensor[] grads, Tensor[] momentum_buffers, Tensor[] steps, "
      "Tensor[] prev_lrs, Tensor lrs, int[] group_sizes, float[] hypers, Tensor? grad_scale) "
      "-> Tensor");
  m.def(
      "sgd_apply_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] steps, Tensor(d!)[] prev_lrs, Tensor(e!)[] betas, Tensor? rows, Tensor lrs, "
      "int[] group_sizes, float[] hypers, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

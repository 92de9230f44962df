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
// Where a tensor of betas (and of beta_prods) has an element for each row of its parameter, an
// index of the first dimension, each of them has a beta; else it is of one element, for all of the
// tensor. begin: rows, [betas in all, 2] float64, num and den, and what may be updated before beta
// is there. finish: the rest of the step, from these rows, which may have been summed over tensors
// or over ranks. Where nothing is to happen in between, finish without rows does all of the step;
// tensors of groups that are `shared` then take the sums over all such tensors.
//
// packed, rounding: `Packed` of adamem_fused/backends/batch.py, where something is stored in few
// bits: the scales of each memory, one entry a tensor, and the remainders behind them. Else
// nothing.
//
// squared_norms: the sum of each tensor's squares, [tensors] float64.
#include <torch/library.h>

#define AM_OPTIONS \
  "Tensor lrs, int[] group_sizes, float[] hypers, Tensor? grad_scale, Tensor? found_inf, "

TORCH_LIBRARY(adamem_fused, m) {
  m.def(
      "adamw_begin_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor[] steps, Tensor[] beta_prods, Tensor[] prev_lrs, "
      "Tensor[] betas, " AM_OPTIONS "Tensor(d!)[] packed, Tensor? rounding) -> Tensor");
  m.def(
      "adamw_finish_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] beta_prods, "
      "Tensor(f!)[] prev_lrs, Tensor(g!)[] betas, " AM_OPTIONS
      "Tensor(h!)[] packed, Tensor? rounding, Tensor? rows) -> ()");
  m.def(
      "sgd_begin(Tensor[] params, Tensor[] grads, Tensor[] momentum_buffers, Tensor[] steps, "
      "Tensor[] prev_lrs, Tensor[] betas, " AM_OPTIONS
      "Tensor[] packed, Tensor? rounding) -> Tensor");
  m.def(
      "sgd_finish_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] steps, Tensor(d!)[] prev_lrs, Tensor(e!)[] betas, " AM_OPTIONS
      "Tensor(h!)[] packed, Tensor? rounding, Tensor? rows) -> ()");
  m.def("squared_norms(Tensor[] grads) -> Tensor");
}

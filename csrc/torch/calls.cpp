// Steps on the CPU without torch's dispatcher, which takes 0.35 us for each tensor in a list.
// Arguments are those of the operators.
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <array>
#include <optional>
#include <vector>

#include "functions.h"
#include "layouts.h"
#include "norms.h"
#include "python.h"
#include "step.h"
#include "tensor_refs.h"

namespace am {
namespace {

using at::Tensor;

// Whether some Python code is to see all operators: fake tensors, make_fx, a counter of FLOPs.
bool any_modes_set() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

// torch.ops has something to do, for a subclass or a mode.
Owned not_implemented() { return Owned::share(Py_NotImplemented); }

// Unless all are plain tensors, `plain` becomes false.
TensorRefs plain_refs_of(PyObject* list, bool& plain) {
  TensorRefs refs = refs_of(list, plain);
  for_each_ahead(refs, [&](size_t i) { plain = plain && is_plain(refs[i]); });
  return refs;
}

// The arguments that all steps have: lists of tensors, and the rest.
template <size_t kLists>
class StepArguments {
 public:
  explicit StepArguments(Arguments& read) {
    for (TensorRefs& list : lists) list = plain_refs_of(read.list(), plain);
    lrs_ = read.tensor();
    group_sizes_ = read.integers();
    hypers_ = read.numbers();
    grad_scale_ = read.optional_tensor();
    found_inf_ = read.optional_tensor();
    packed = plain_refs_of(read.list(), plain);
    rounding_ = read.optional_tensor();
  }

  cpu::Options options() const {
    return {lrs_, group_sizes_, hypers_, grad_scale_, found_inf_, rounding_};
  }

  bool plain = !any_modes_set();
  std::array<TensorRefs, kLists> lists;
  TensorRefs packed;

 private:
  Tensor lrs_;
  std::vector<int64_t> group_sizes_;
  std::vector<double> hypers_;
  cpu::OptionalTensor grad_scale_, found_inf_, rounding_;
};

cpu::AdamWTensors adamw_tensors(const StepArguments<8>& step) {
  const auto& [params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas] =
      step.lists;
  return {params, grads, exp_avgs, exp_avg_sqs, steps, beta_prods, prev_lrs, betas, step.packed};
}

cpu::SGDTensors sgd_tensors(const StepArguments<6>& step) {
  const auto& [params, grads, momentum_buffers, steps, prev_lrs, betas] = step.lists;
  return {params, grads, momentum_buffers, steps, prev_lrs, betas, step.packed};
}

template <class F>
auto run(const char* name, F f) {
  const WithoutGIL without_gil;
  RECORD_FUNCTION(name, std::vector<c10::IValue>());
  return f();
}

Owned wrap(const Tensor& tensor) { return Owned::take(THPVariable_Wrap(tensor)); }

}  // namespace

PyObject* any_modes(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments("any_modes", args, size, 0);
    return Owned::share(any_modes_set() ? Py_True : Py_False);
  });
}

PyObject* adamw_begin_(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("adamw_begin_", args, size, 15);
    const StepArguments<8> step(read);
    if (!step.plain) return not_implemented();
    return wrap(run("adamem_fused::adamw_begin_",
                    [&] { return cpu::adamw_begin_(adamw_tensors(step), step.options()); }));
  });
}

PyObject* adamw_finish_(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("adamw_finish_", args, size, 16);
    const StepArguments<8> step(read);
    const cpu::OptionalTensor rows = read.optional_tensor();
    if (!step.plain) return not_implemented();
    run("adamem_fused::adamw_finish_",
        [&] { cpu::adamw_finish_(adamw_tensors(step), step.options(), rows); });
    return none();
  });
}

PyObject* sgd_begin(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("sgd_begin", args, size, 13);
    const StepArguments<6> step(read);
    if (!step.plain) return not_implemented();
    return wrap(run("adamem_fused::sgd_begin",
                    [&] { return cpu::sgd_begin(sgd_tensors(step), step.options()); }));
  });
}

PyObject* sgd_finish_(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("sgd_finish_", args, size, 14);
    const StepArguments<6> step(read);
    const cpu::OptionalTensor rows = read.optional_tensor();
    if (!step.plain) return not_implemented();
    run("adamem_fused::sgd_finish_",
        [&] { cpu::sgd_finish_(sgd_tensors(step), step.options(), rows); });
    return none();
  });
}

PyObject* squared_norms(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("squared_norms", args, size, 1);
    bool plain = !any_modes_set();
    const TensorRefs grads = plain_refs_of(read.list(), plain);
    if (!plain) return not_implemented();
    return wrap(run("adamem_fused::squared_norms", [&] { return cpu::squared_norms(grads); }));
  });
}

}  // namespace am

// betas: those of the last step.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "functions.h"
#include "layouts.h"
#include "python.h"
#include "states.h"
#include "tensor_refs.h"

namespace am {
namespace {

using at::Tensor;

// Reads a run of parameters at a time, in loops of which each asks for what the next one reads, as
// Gatherer does; and owns what it has found, as that does.
class BetaReader {
 public:
  static constexpr size_t kRun = 64;

  BetaReader(PyObject* state, PyObject* name, PyObject* dtensor)
      : states_(state), name_(name), dtensors_(dtensor) {}

  // Adds those of a run; false where one of them is not ordinary.
  bool add(PyObject* const* items, size_t n) {
    std::array<Owned, kRun> params, found;  // the state of each; then its beta, if there is one
    for (size_t i = 0; i < n; ++i) {
      TORCH_CHECK_TYPE(is_tensor(items[i]), "a list of tensors holds a ", class_of(items[i]));
      params[i] = Owned::share(items[i]);
      prefetch_impl(unpack(items[i]));
    }
    for (size_t i = 0; i < n; ++i) {
      PyObject* const state = states_.find(params[i].get());
      if (state == nullptr || !PyDict_Check(state)) continue;
      found[i] = Owned::share(state);
    }
    for (size_t i = 0; i < n; ++i)
      if (found[i]) prefetch_keys(found[i].get());
    for (size_t i = 0; i < n; ++i) {
      if (!found[i]) continue;
      const bool any = unpack(params[i].get()).numel() > 0;
      PyObject* beta = any ? PyDict_GetItemWithError(found[i].get(), name_) : nullptr;
      if (beta == nullptr && PyErr_Occurred()) throw PythonError();
      if (beta != nullptr && dtensors_.is(beta)) beta = dtensors_.local(beta);
      found[i] = beta == nullptr ? Owned() : Owned::share(beta);
    }
    TensorRefs betas;
    betas.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      if (!found[i]) continue;
      if (!is_exact(found[i].get())) return false;
      betas.push_back(unpack(found[i].get()));
      prefetch_impl(unpack(found[i].get()));
    }
    for (size_t i = 0, k = 0; i < n; ++i) {
      structure_.push_back(unpack(params[i].get()).numel());
      structure_.push_back(0);
      if (!found[i]) continue;
      const Tensor& beta = betas[k++];
      if (!is_ordinary(beta)) return false;
      structure_.back() = beta.numel();
      prefetch_storage(beta);
    }
    if (!device_.has_value()) return true;
    if (!device_->is_cpu()) {
      for (size_t k = 0; k < betas.size(); ++k) elsewhere_.push_back(betas[k]);
      return true;
    }
    for (size_t k = 0; k < betas.size(); ++k) __builtin_prefetch(betas[k].const_data_ptr());
    for (size_t k = 0; k < betas.size(); ++k) {
      if (betas[k].scalar_type() == at::kFloat)
        append<float>(betas[k]);
      else
        append<double>(betas[k]);
    }
    return true;
  }

  bool any() const { return device_.has_value(); }

  // Two words of each parameter, as bytes.
  Owned structure() const {
    return Owned::take(
        PyBytes_FromStringAndSize(reinterpret_cast<const char*>(structure_.data()),
                                  static_cast<Py_ssize_t>(structure_.size() * sizeof(int64_t))));
  }

  // [betas]; float64 on the CPU.
  Tensor values() const {
    if (elsewhere_.empty()) return at::tensor(values_, at::kDouble);
    std::vector<Tensor> flat;
    flat.reserve(elsewhere_.size());
    for (const Tensor& beta : elsewhere_)
      flat.push_back(beta.dim() == 0 ? beta.unsqueeze(0) : beta);
    return at::cat(flat);
  }

 private:
  bool is_ordinary(const Tensor& beta) {
    if (!device_.has_value()) device_ = beta.device();
    return is_plain(beta) && beta.dim() <= 1 && beta.is_contiguous() && beta.device() == *device_ &&
           (beta.scalar_type() == at::kFloat || beta.scalar_type() == at::kDouble);
  }

  template <class T>
  void append(const Tensor& beta) {
    const T* data = static_cast<const T*>(beta.const_data_ptr());
    values_.insert(values_.end(), data, data + beta.numel());
  }

  Cursor states_;
  PyObject* name_;
  DTensors dtensors_;
  std::optional<c10::Device> device_;
  std::vector<int64_t> structure_;
  std::vector<double> values_;
  std::vector<Tensor> elsewhere_;  // not on the CPU
};

}  // namespace

// The last betas of parameters, in their order, as a new tensor [betas], float64 on the CPU; and,
// as bytes, two words of each parameter: its elements and how many of these betas are its, 0 where
// it has none or no elements.
//
// None where there are none, or one is not ordinary: a plain contiguous tensor of at most one
// dimension, or a DTensor's shard that is one, on the device of the others.
PyObject* betas(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("betas", args, size, 4);
    PyObject* const groups = read.list();
    PyObject* const state = read.dict();
    PyObject* const name = read.str();
    PyObject* const dtensor = read.object();
    if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return none();
    BetaReader reader(state, name, dtensor);
    for (size_t k = 0; k < size_of(groups); ++k) {
      const Owned group = Owned::share(items_of(groups)[k]);
      TORCH_CHECK_TYPE(PyList_Check(group.get()), "expected a list, not a ", class_of(group.get()));
      for (size_t begin = 0; begin < size_of(group.get()); begin += BetaReader::kRun) {
        const size_t n = std::min(BetaReader::kRun, size_of(group.get()) - begin);
        if (!reader.add(items_of(group.get()) + begin, n)) return none();
      }
    }
    if (!reader.any()) return none();
    std::vector<Owned> result;
    result.push_back(Owned::take(THPVariable_Wrap(reader.values())));
    result.push_back(reader.structure());
    return tuple_of(std::move(result));
  });
}

}  // namespace am

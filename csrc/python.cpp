// The module adamem_fused._C: what a step does with its thousands of tensors before any
// arithmetic. Python takes 0.1 us for each attribute of each tensor and torch's dispatcher
// 0.35 us for each tensor in a list; here a tensor costs some 20 ns.
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu/step.h"
#include "tensor_refs.h"

namespace am {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A Tensor or Parameter, not a subclass.
bool is_exact(PyObject* object) { return THPVariable_CheckExact(object); }

// Not wrapped, sparse, quantized or a lazy negation: a kernel may read its data through its
// pointer.
bool is_plain(const Tensor& tensor) {
  static const uint64_t allowed =
      c10::full_backend_mask |
      (c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
       c10::DispatchKeySet(c10::DispatchKey::Dense))
          .raw_repr();
  return (tensor.key_set().raw_repr() & ~allowed) == 0;
}

const Tensor& tensor_of(PyObject* object) {
  TORCH_CHECK_TYPE(is_exact(object) || THPVariable_Check(object), "a list of tensors holds a ",
                   Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

// References to a list's tensors; unless all are plain, `plain` becomes false.
TensorRefs refs_of(const py::list& list, bool& plain) {
  TensorRefs refs;
  refs.reserve(list.size());
  for (const py::handle object : list) {
    refs.push_back(tensor_of(object.ptr()));
    plain = plain && is_exact(object.ptr());
  }
  for_each_ahead(refs, [&](size_t i) { plain = plain && is_plain(refs[i]); });
  return refs;
}

PyObject* const* items_of(const py::handle& list) {
  TORCH_CHECK_TYPE(PyList_Check(list.ptr()), "expected a list, not a ",
                   Py_TYPE(list.ptr())->tp_name);
  return PySequence_Fast_ITEMS(list.ptr());
}

// ---- gather: the tensors of a step ------------------------------------------------

// Looks keys up in a dict in the order in which they are met, which most often is that of
// the dict: then it takes no hash, which for a tensor is a call into Python.
class Cursor {
 public:
  explicit Cursor(PyObject* dict) : dict_(dict) {}

  // A borrowed value, or null.
  PyObject* find(PyObject* key) {
    if (is_next(key)) return value_;
    PyObject* value = PyDict_GetItemWithError(dict_, key);
    if (value == nullptr && PyErr_Occurred()) throw python_error();
    return value;
  }

  // Steps over a key that is not needed.
  void skip(PyObject* key) { is_next(key); }

 private:
  bool is_next(PyObject* key) {
    if (!ahead_ && !PyDict_Next(dict_, &position_, &key_, &value_)) key_ = nullptr;
    ahead_ = key != key_;
    return !ahead_;
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0;
  PyObject *key_ = nullptr, *value_ = nullptr;
  bool ahead_ = false;  // key_ is still to be met
};

// A list of at most so many items, which owns them: nothing else may for the time of a step.
class Filling {
 public:
  explicit Filling(Py_ssize_t most) : list_(py::reinterpret_steal<py::list>(PyList_New(most))) {
    if (!list_) throw python_error();
  }

  // Takes over a reference.
  void put(PyObject* item) { PyList_SET_ITEM(list_.ptr(), size_++, item); }

  py::list finish() {
    const Py_ssize_t most = PyList_GET_SIZE(list_.ptr());
    if (size_ < most && PyList_SetSlice(list_.ptr(), size_, most, nullptr) != 0)
      throw python_error();
    return std::move(list_);
  }

 private:
  py::list list_;
  Py_ssize_t size_ = 0;
};

// Whether its rows may have betas of their own: as beta_shape of adamem_fused/state.py.
bool has_rows(const Tensor& param) {
  constexpr int64_t kMinRow = 16;
  if (param.dim() < 2) return false;
  int64_t numel = 1;
  for (const int64_t size : param.sizes().slice(1)) numel *= size;
  return numel >= kMinRow;
}

// Gathers a run of parameters at a time, in loops of which each asks for what the next one
// reads: waiting for memory is most of what these lookups do.
class Gatherer {
 public:
  static constexpr size_t kRun = 64;

  // by_row: of each name, whether a row may have one for itself.
  Gatherer(const py::dict& state, const py::tuple& names, std::vector<bool> by_row, size_t most)
      : states_(state.ptr()), by_row_(std::move(by_row)) {
    for (const py::handle name : names) names_.push_back(name.ptr());
    for (size_t k = 0; k < 2 + names_.size(); ++k) lists_.emplace_back(most);
  }

  // Adds a run's tensors to the lists; false where one of them is not ordinary. rows: whether rows
  // have betas of their own.
  bool add(PyObject* const* params, size_t n, bool rows) {
    entries_.clear();
    values_.clear();
    for (size_t i = 0; i < n; ++i) {
      if (!is_exact(params[i])) return false;
      prefetch_impl(THPVariable_Unpack(params[i]));
    }
    for (size_t i = 0; i < n; ++i)
      __builtin_prefetch(THPVariable_Unpack(params[i]).unsafeGetTensorImpl()->autograd_meta());
    for (size_t i = 0; i < n; ++i) {
      const Tensor& param = THPVariable_Unpack(params[i]);
      const Tensor& grad = param.unsafeGetTensorImpl()->grad();
      if (!grad.defined()) {
        states_.skip(params[i]);
        continue;
      }
      if (!device_.has_value()) device_ = param.device();
      if (!is_plain(param) || param.is_complex() || param.device() != *device_) return false;
      PyObject* state = states_.find(params[i]);
      if (state == nullptr || !PyDict_CheckExact(state)) return false;
      prefetch_impl(grad);
      __builtin_prefetch(state);
      entries_.push_back({params[i], &grad, state});
    }
    for (const Entry& entry : entries_) {
      if (!is_plain(*entry.grad)) return false;
      prefetch(reinterpret_cast<PyDictObject*>(entry.state)->ma_keys, 256);
    }
    for (size_t i = 0; i < entries_.size(); ++i) {
      Cursor values(entries_[i].state);
      for (size_t k = 0; k < names_.size(); ++k) {
        PyObject* value = values.find(names_[k]);
        if (value == nullptr) return false;
        __builtin_prefetch(value, 1);
        values_.push_back(value);
      }
    }
    PyObject* const* value = values_.data();
    for (const Entry& entry : entries_) {
      const Tensor& param = THPVariable_Unpack(entry.param);
      const int64_t dim = rows && has_rows(param) ? 1 : 0;
      auto grad = py::reinterpret_steal<py::object>(THPVariable_Wrap(*entry.grad));
      if (!is_exact(grad.ptr())) return false;
      lists_[0].put(py::handle(entry.param).inc_ref().ptr());
      lists_[1].put(grad.release().ptr());
      for (size_t k = 2; k < lists_.size(); ++k, ++value) {
        if (!is_exact(*value)) return false;
        if (by_row_[k - 2]) {
          const Tensor& scalar = THPVariable_Unpack(*value);
          if (scalar.dim() != dim || (dim == 1 && scalar.size(0) != param.size(0))) return false;
        }
        lists_[k].put(py::handle(*value).inc_ref().ptr());
      }
    }
    return true;
  }

  size_t last_run() const { return entries_.size(); }

  py::tuple finish() {
    py::tuple lists(lists_.size());
    for (size_t k = 0; k < lists_.size(); ++k) lists[k] = lists_[k].finish();
    return lists;
  }

 private:
  struct Entry {
    PyObject* param;
    const Tensor* grad;
    PyObject* state;
  };

  Cursor states_;
  std::vector<PyObject*> names_;
  std::vector<bool> by_row_;
  std::vector<Filling> lists_;
  std::optional<c10::Device> device_;
  std::vector<Entry> entries_;
  std::vector<PyObject*> values_;
};

// How many tensors of each group have a gradient; and lists of these parameters, the gradients,
// and their state by name. None where one of them is not ordinary: not a plain real tensor with a
// plain gradient and whole state, or not on the device of the others; or one whose state is of
// another scope. rows: of each group, whether rows have betas of their own; by_row: of each name.
py::object gather(const py::list& groups, const py::dict& state, const py::tuple& names,
                  const std::vector<bool>& by_row, const std::vector<bool>& rows) {
  TORCH_CHECK_VALUE(by_row.size() == names.size() && rows.size() == groups.size(),
                    "by_row and rows have to be as long as names and groups");
  size_t most = 0;
  for (const py::handle group : groups) {
    if (!PyList_Check(group.ptr())) return py::none();
    most += PyList_GET_SIZE(group.ptr());
  }
  Gatherer gatherer(state, names, by_row, most);
  py::list sizes;
  for (size_t k = 0; k < groups.size(); ++k) {
    const py::handle group = groups[k];
    PyObject* const* items = items_of(group);
    const size_t n = py::len(group);
    size_t size = 0;
    for (size_t begin = 0; begin < n; begin += Gatherer::kRun) {
      if (!gatherer.add(items + begin, std::min(Gatherer::kRun, n - begin), rows[k]))
        return py::none();
      size += gatherer.last_run();
    }
    sizes.append(size);
  }
  return py::make_tuple(sizes, gatherer.finish());
}

// ---- describe: what tables are made of --------------------------------------------

// The words as bytes: `last` itself, if it is these.
py::bytes as_bytes(const std::vector<int64_t>& words, const py::bytes& last) {
  const std::string_view bytes(reinterpret_cast<const char*>(words.data()),
                               words.size() * sizeof(int64_t));
  return bytes == std::string_view(last) ? last : py::bytes(bytes.data(), bytes.size());
}

// dtype, device, layout and number of dimensions in a word.
int64_t kind_of(const Tensor& t) {
  const auto byte = [](auto value) { return static_cast<int64_t>(value) & 0xff; };
  return byte(t.scalar_type()) << 40 | byte(t.device().type()) << 32 |
         byte(t.device().index()) << 24 | byte(t.layout()) << 16 | t.dim();
}

// The addresses of the tensors, list by list, and all else about them that tables are made
// of: dtypes, devices, layouts, shapes, and for the first `data` lists their strides. Where
// they are what they were, the very objects that are given as the last ones.
//
// updated: bumps the versions of all but the gradients, in this walk: a walk of its own would
// take as long as half of this one.
py::tuple describe(const py::tuple& lists, size_t data, const py::bytes& last_addresses,
                   const py::bytes& last_structure, bool updated) {
  constexpr size_t kGrads = 1;
  std::vector<int64_t> addresses, structure;
  for (size_t k = 0; k < lists.size(); ++k) {
    PyObject* const* items = items_of(lists[k]);
    const size_t n = py::len(lists[k]);
    TensorRefs refs;
    refs.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      if (i + 16 < n) __builtin_prefetch(items[i + 16]);
      refs.push_back(tensor_of(items[i]));
    }
    addresses.reserve(lists.size() * n);
    structure.reserve(lists.size() * n * 4);
    const bool bump = updated && k != kGrads;
    for_each_ahead(refs, [&](size_t i) {
      const Tensor& t = refs[i];
      if (bump) bump_version_ahead(refs, i);
      addresses.push_back(reinterpret_cast<int64_t>(t.data_ptr()));
      structure.push_back(kind_of(t));
      for (const int64_t size : t.sizes()) structure.push_back(size);
      if (k < data)
        for (const int64_t stride : t.strides()) structure.push_back(stride);
    });
  }
  return py::make_tuple(as_bytes(addresses, last_addresses), as_bytes(structure, last_structure));
}

// ---- steps without the dispatcher -------------------------------------------------

// Whether some Python code is to see all operators: fake tensors, make_fx, a counter of FLOPs.
bool any_modes() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

// NotImplemented: torch.ops has something to do, for a subclass or a mode.
py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

template <class F>
auto run(const char* name, F f) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION(name, std::vector<c10::IValue>());
  return f();
}

py::object adamw_begin_(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                        const py::list& exp_avg_sqs, const py::list& steps,
                        const py::list& beta_prods, const py::list& prev_lrs, const py::list& betas,
                        const Tensor& lrs, const std::vector<int64_t>& group_sizes,
                        const std::vector<double>& hypers, const OptionalTensor& grad_scale,
                        const OptionalTensor& found_inf) {
  bool plain = !any_modes();
  const cpu::AdamWTensors tensors{refs_of(params, plain),   refs_of(grads, plain),
                                  refs_of(exp_avgs, plain), refs_of(exp_avg_sqs, plain),
                                  refs_of(steps, plain),    refs_of(beta_prods, plain),
                                  refs_of(prev_lrs, plain), refs_of(betas, plain)};
  if (!plain) return not_implemented();
  return py::cast(run("adamem_fused::adamw_begin_", [&] {
    return cpu::adamw_begin_(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf});
  }));
}

py::object adamw_finish_(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                         const py::list& exp_avg_sqs, const py::list& steps,
                         const py::list& beta_prods, const py::list& prev_lrs,
                         const py::list& betas, const Tensor& lrs,
                         const std::vector<int64_t>& group_sizes, const std::vector<double>& hypers,
                         const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                         const OptionalTensor& rows) {
  bool plain = !any_modes();
  const cpu::AdamWTensors tensors{refs_of(params, plain),   refs_of(grads, plain),
                                  refs_of(exp_avgs, plain), refs_of(exp_avg_sqs, plain),
                                  refs_of(steps, plain),    refs_of(beta_prods, plain),
                                  refs_of(prev_lrs, plain), refs_of(betas, plain)};
  if (!plain) return not_implemented();
  run("adamem_fused::adamw_finish_", [&] {
    cpu::adamw_finish_(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf}, rows);
  });
  return py::none();
}

py::object sgd_begin(const py::list& params, const py::list& grads,
                     const py::list& momentum_buffers, const py::list& steps,
                     const py::list& prev_lrs, const py::list& betas, const Tensor& lrs,
                     const std::vector<int64_t>& group_sizes, const std::vector<double>& hypers,
                     const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  bool plain = !any_modes();
  const cpu::SGDTensors tensors{refs_of(params, plain),           refs_of(grads, plain),
                                refs_of(momentum_buffers, plain), refs_of(steps, plain),
                                refs_of(prev_lrs, plain),         refs_of(betas, plain)};
  if (!plain) return not_implemented();
  return py::cast(run("adamem_fused::sgd_begin", [&] {
    return cpu::sgd_begin(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf});
  }));
}

py::object sgd_finish_(const py::list& params, const py::list& grads,
                       const py::list& momentum_buffers, const py::list& steps,
                       const py::list& prev_lrs, const py::list& betas, const Tensor& lrs,
                       const std::vector<int64_t>& group_sizes, const std::vector<double>& hypers,
                       const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                       const OptionalTensor& rows) {
  bool plain = !any_modes();
  const cpu::SGDTensors tensors{refs_of(params, plain),           refs_of(grads, plain),
                                refs_of(momentum_buffers, plain), refs_of(steps, plain),
                                refs_of(prev_lrs, plain),         refs_of(betas, plain)};
  if (!plain) return not_implemented();
  run("adamem_fused::sgd_finish_",
      [&] { cpu::sgd_finish_(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf}, rows); });
  return py::none();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // What the library is tied to; adamem_fused/backends/ops.py compares.
  m.attr("torch_version") = TORCH_VERSION;
  m.def("gather", torch::wrap_pybind_function(gather));
  m.def("describe", torch::wrap_pybind_function(describe));
  m.def("any_modes", any_modes);
  m.def("adamw_begin_", torch::wrap_pybind_function(adamw_begin_));
  m.def("adamw_finish_", torch::wrap_pybind_function(adamw_finish_));
  m.def("sgd_begin", torch::wrap_pybind_function(sgd_begin));
  m.def("sgd_finish_", torch::wrap_pybind_function(sgd_finish_));
}

}  // namespace am

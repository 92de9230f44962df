// The module adamem_fused._C: what a step does with its thousands of tensors before any
// arithmetic. Python takes 0.1 us for each attribute of each tensor and torch's dispatcher
// 0.35 us for each tensor in a list; here a tensor costs some 20 ns.
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <ATen/Version.h>
#include <ATen/record_function.h>
#include <Python.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <structmember.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "../cpu/library.h"
#include "norms.h"
#include "step.h"
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
  // Not THPVariable_Check, which asks Tensor's metaclass: 40 ns for a DTensor.
  PyTypeObject* const tensor = reinterpret_cast<PyTypeObject*>(THPVariableClass);
  TORCH_CHECK_TYPE(is_exact(object) || PyObject_TypeCheck(object, tensor),
                   "a list of tensors holds a ", Py_TYPE(object)->tp_name);
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

// Reads a DTensor's parts where torch's class keeps them, in slots.
class DTensors {
 public:
  // The class, or None where nothing has imported it: then there are no DTensors.
  explicit DTensors(const py::handle& type) {
    if (type.is_none()) return;
    TORCH_CHECK_TYPE(PyType_Check(type.ptr()), "expected a class");
    local_ = offset_of(type, "_local_tensor");
    spec_ = offset_of(type, "_spec");
    if (local_ > 0 && spec_ > 0) type_ = reinterpret_cast<PyTypeObject*>(type.ptr());
  }

  bool is(PyObject* object) const { return Py_TYPE(object) == type_; }

  // Borrowed; None where it is not set.
  PyObject* local(PyObject* dtensor) const { return slot(dtensor, local_); }
  PyObject* spec(PyObject* dtensor) const { return slot(dtensor, spec_); }

  // Whether two are laid out alike. A gradient of FSDP2 has its parameter's own spec.
  bool alike(PyObject* spec, PyObject* other) const {
    return spec == other || (equal(spec, other, placements_) && equal(spec, other, mesh_));
  }

 private:
  static Py_ssize_t offset_of(const py::handle& type, const char* name) {
    const py::object descriptor = py::getattr(type, name, py::none());
    if (Py_TYPE(descriptor.ptr()) != &PyMemberDescr_Type) return 0;
    return reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member->offset;
  }

  static PyObject* slot(PyObject* object, Py_ssize_t offset) {
    PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
    return value == nullptr ? Py_None : value;
  }

  static bool equal(PyObject* a, PyObject* b, const py::str& name) {
    const py::object ours = py::handle(a).attr(name), theirs = py::handle(b).attr(name);
    const int result = PyObject_RichCompareBool(ours.ptr(), theirs.ptr(), Py_EQ);
    if (result < 0) throw python_error();
    return result == 1;
  }

  PyTypeObject* type_ = nullptr;
  Py_ssize_t local_ = 0, spec_ = 0;
  py::str placements_{"placements"}, mesh_{"mesh"};
};

// The tensors of a step that are stepped in one call.
struct Gathered {
  Gathered(size_t n_lists, size_t most, bool any_dtensors) : params(any_dtensors ? most : 0) {
    for (size_t k = 0; k < n_lists; ++k) lists.emplace_back(most);
  }

  std::vector<Filling> lists;  // parameters, gradients, and state by name; shards of DTensors
  Filling params;              // what the first list has shards of; not where none is a DTensor
  py::list dtensors;           // those of which shards are written to
  std::vector<int64_t> sizes;  // by group
};

// Gathers a run of parameters at a time, in loops of which each asks for what the next one
// reads: waiting for memory is most of what these lookups do.
class Gatherer {
 public:
  static constexpr size_t kRun = 64;

  // others: for each name None, another name that stands in for it, or the tensor of a state that
  // does not have it. by_row: of each name, whether a row may have one for itself. known: what
  // `seen` was when `crossing` was found by it.
  Gatherer(const py::dict& state, const py::tuple& names, const py::tuple& others,
           std::vector<bool> by_row, size_t most, DTensors dtensors, bool any_dtensors,
           const py::list& known, std::string_view crossing)
      : states_(state.ptr()),
        by_row_(std::move(by_row)),
        most_(most),
        dtensors_(dtensors),
        any_dtensors_(any_dtensors),
        known_(known),
        crossing_(crossing) {
    for (const py::handle name : names) names_.push_back(name.ptr());
    for (const py::handle other : others) others_.push_back(other.ptr());
  }

  // Begins with the parameters of a group. rows: whether its rows have betas of their own.
  void begin_group(bool rows) {
    rows_ = rows;
    ++n_groups_;
    see(rows ? Py_True : Py_False);
  }

  // Adds a run's tensors to the lists; false where one of them is not ordinary.
  bool add(PyObject* const* params, size_t n) {
    entries_.clear();
    values_.clear();
    for (size_t i = 0; i < n; ++i) {
      if (!is_exact(params[i])) {
        if (!dtensors_.is(params[i]) || !is_exact(dtensors_.local(params[i]))) return false;
        prefetch_impl(THPVariable_Unpack(dtensors_.local(params[i])));
      }
      prefetch_impl(THPVariable_Unpack(params[i]));
    }
    for (size_t i = 0; i < n; ++i)
      __builtin_prefetch(THPVariable_Unpack(params[i]).unsafeGetTensorImpl()->autograd_meta());
    for (size_t i = 0; i < n; ++i) {
      const Tensor& grad = THPVariable_Unpack(params[i]).unsafeGetTensorImpl()->grad();
      if (!grad.defined()) {
        states_.skip(params[i]);
        continue;
      }
      PyObject* const spec = is_exact(params[i]) ? nullptr : dtensors_.spec(params[i]);
      PyObject* const local = spec == nullptr ? params[i] : dtensors_.local(params[i]);
      const Tensor& shard = THPVariable_Unpack(local);
      if (!device_.has_value()) device_ = shard.device();
      if (!is_plain(shard) || shard.is_complex() || shard.device() != *device_) return false;
      PyObject* state = states_.find(params[i]);
      if (state == nullptr || !PyDict_CheckExact(state)) return false;
      prefetch_impl(grad);
      __builtin_prefetch(state);
      entries_.push_back({params[i], local, spec, &grad, state});
    }
    for (const Entry& entry : entries_)
      prefetch(reinterpret_cast<PyDictObject*>(entry.state)->ma_keys, 256);
    for (size_t i = 0; i < entries_.size(); ++i) {
      Cursor values(entries_[i].state);
      for (size_t k = 0; k < names_.size(); ++k) {
        PyObject* value = values.find(names_[k]);
        if (value == nullptr && others_[k] != Py_None)
          value = PyUnicode_Check(others_[k]) ? values.find(others_[k]) : others_[k];
        if (value == nullptr) return false;
        __builtin_prefetch(value, 1);
        values_.push_back(value);
      }
    }
    PyObject* const* value = values_.data();
    for (const Entry& entry : entries_) {
      if (!put(entry, value)) return false;
      value += names_.size();
    }
    return true;
  }

  // Whether all that it has seen is known, and what it has gathered therefore in its place.
  bool is_known() const { return is_known_ && seen_.size() == crossing_.size(); }

  py::list seen() const {
    py::list seen;
    for (PyObject* const object : seen_) seen.append(py::handle(object));
    return seen;
  }

  // What crosses ranks and what does not; None in the place of what there is none of.
  py::tuple finish() {
    py::tuple result(2);
    for (size_t kind = 0; kind < 2; ++kind) {
      result[kind] = py::none();
      if (!gathered_[kind].has_value()) continue;
      Gathered& gathered = *gathered_[kind];
      gathered.sizes.resize(n_groups_);
      py::tuple lists(gathered.lists.size());
      for (size_t k = 0; k < lists.size(); ++k) lists[k] = gathered.lists[k].finish();
      const py::object params = any_dtensors_ ? py::object(gathered.params.finish()) : lists[0];
      result[kind] = py::make_tuple(gathered.sizes, lists, params, gathered.dtensors);
    }
    return result;
  }

 private:
  struct Entry {
    PyObject* param;
    PyObject* local;  // this rank's shard of a DTensor, or else the parameter itself
    PyObject* spec;   // of a DTensor
    const Tensor* grad;
    PyObject* state;
  };

  // Notes what decides whether a parameter's sums cross ranks. Borrowed from what it has gathered.
  void see(PyObject* object) {
    is_known_ = is_known_ && seen_.size() < crossing_.size() &&
                PyList_GET_ITEM(known_.ptr(), seen_.size()) == object;
    seen_.push_back(object);
  }

  bool put(const Entry& entry, PyObject* const* values) {
    const Tensor& shard = THPVariable_Unpack(entry.local);
    const int64_t dim = rows_ && has_rows(THPVariable_Unpack(entry.param)) ? 1 : 0;
    const bool sharded = entry.spec != nullptr;
    auto wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(*entry.grad));
    PyObject* grad = wrapped.ptr();
    if (sharded) {
      if (!dtensors_.is(grad) || !dtensors_.alike(entry.spec, dtensors_.spec(grad))) return false;
      grad = dtensors_.local(grad);
    }
    if (!is_exact(grad) || !is_plain(THPVariable_Unpack(grad))) return false;
    if (sharded) see(entry.spec);
    const bool crosses = sharded && is_known_ && crossing_[seen_.size() - 1] != 0;
    std::optional<Gathered>& gathered = gathered_[crosses ? 1 : 0];
    if (!gathered.has_value()) gathered.emplace(2 + names_.size(), most_, any_dtensors_);
    gathered->lists[0].put(py::handle(entry.local).inc_ref().ptr());
    gathered->lists[1].put(py::handle(grad).inc_ref().ptr());
    if (any_dtensors_) gathered->params.put(py::handle(entry.param).inc_ref().ptr());
    if (sharded) gathered->dtensors.append(py::handle(entry.param));
    for (size_t k = 0; k < names_.size(); ++k) {
      PyObject* value = values[k];
      if (sharded && dtensors_.is(value)) {
        gathered->dtensors.append(py::handle(value));
        value = dtensors_.local(value);
      }
      if (!is_exact(value)) return false;
      if (by_row_[k]) {
        const Tensor& scalar = THPVariable_Unpack(value);
        if (scalar.dim() != dim || (dim == 1 && scalar.size(0) != shard.size(0))) return false;
      }
      gathered->lists[2 + k].put(py::handle(value).inc_ref().ptr());
    }
    gathered->sizes.resize(n_groups_);
    ++gathered->sizes.back();
    return true;
  }

  Cursor states_;
  std::vector<PyObject*> names_, others_;
  std::vector<bool> by_row_;
  size_t most_;
  DTensors dtensors_;
  bool any_dtensors_;
  const py::list& known_;
  std::string_view crossing_;
  bool is_known_ = true, rows_ = false;
  size_t n_groups_ = 0;
  std::vector<PyObject*> seen_;
  std::optional<Gathered> gathered_[2];
  std::optional<c10::Device> device_;
  std::vector<Entry> entries_;
  std::vector<PyObject*> values_;
};

// A step's tensors, those whose sums do not cross ranks and those whose do. Of either: how many of
// each group; lists of the parameters, the gradients, and their state by name, this rank's shards
// of DTensors; the parameters themselves; and the DTensors of which shards are written to.
//
// None where a tensor is not ordinary: not a plain real one with a plain gradient and whole state,
// or a DTensor of such with a gradient that is laid out as it is, or not on the device of the
// others; or where its state is of another scope. A list where it is not known which of them cross
// ranks: what decides that, to be given as `known` with a byte of each, other than 0 if it does.
//
// others: what is taken where a state has no such name: None where it has to have it, another name,
// or a tensor. rows: of each group, whether rows have betas of their own; by_row: of each name.
// dtensor: the class, or None.
py::object gather(const py::list& groups, const py::dict& state, const py::tuple& names,
                  const py::tuple& others, const std::vector<bool>& by_row,
                  const std::vector<bool>& rows, const py::object& dtensor, const py::list& known,
                  const py::bytes& crossing) {
  TORCH_CHECK_VALUE(by_row.size() == names.size() && others.size() == names.size() &&
                        rows.size() == groups.size(),
                    "others, by_row and rows have to be as long as names, names and groups");
  const std::string_view crossing_bytes(crossing);
  TORCH_CHECK_VALUE(crossing_bytes.size() == known.size(), "crossing has to be as long as known");
  size_t most = 0;
  for (const py::handle group : groups) {
    if (!PyList_Check(group.ptr())) return py::none();
    most += PyList_GET_SIZE(group.ptr());
  }
  Gatherer gatherer(state, names, others, by_row, most, DTensors(dtensor), !dtensor.is_none(),
                    known, crossing_bytes);
  for (size_t k = 0; k < groups.size(); ++k) {
    const py::handle group = groups[k];
    PyObject* const* items = items_of(group);
    const size_t n = py::len(group);
    gatherer.begin_group(rows[k]);
    for (size_t begin = 0; begin < n; begin += Gatherer::kRun)
      if (!gatherer.add(items + begin, std::min(Gatherer::kRun, n - begin))) return py::none();
  }
  if (!dtensor.is_none() && !gatherer.is_known()) return gatherer.seen();
  return gatherer.finish();
}

// Tells autograd that tensors were written to, as torch.autograd.graph.increment_version does.
void bump_versions(const py::list& tensors) {
  TensorRefs refs;
  refs.reserve(tensors.size());
  for (const py::handle tensor : tensors) refs.push_back(tensor_of(tensor.ptr()));
  for (size_t i = 0; i < refs.size(); ++i) bump_version_ahead(refs, i);
}

// ---- describe: what tables are made of --------------------------------------------

// The words as bytes: `last` itself, if it is these.
py::bytes as_bytes(const std::vector<int64_t>& words, const py::bytes& last) {
  const std::string_view bytes(reinterpret_cast<const char*>(words.data()),
                               words.size() * sizeof(int64_t));
  return bytes == std::string_view(last) ? last : py::bytes(bytes.data(), bytes.size());
}

// dtype, device, layout, number of dimensions, and whether it was made in inference mode, in a
// word.
int64_t kind_of(const Tensor& t) {
  const auto byte = [](auto value) { return static_cast<int64_t>(value) & 0xff; };
  return int64_t{t.is_inference()} << 48 | byte(t.scalar_type()) << 40 |
         byte(t.device().type()) << 32 | byte(t.device().index()) << 24 | byte(t.layout()) << 16 |
         t.dim();
}

// The addresses of the tensors, list by list, and all else about them that tables are made
// of: dtypes, devices, layouts, shapes and strides. Where
// they are what they were, the very objects that are given as the last ones.
//
// updated: bumps the versions of all but the gradients, in this walk: a walk of its own would
// take as long as half of this one.
py::tuple describe(const py::tuple& lists, const py::bytes& last_addresses,
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
                        const OptionalTensor& found_inf, const py::list& packed,
                        const OptionalTensor& rounding) {
  bool plain = !any_modes();
  const cpu::AdamWTensors tensors{
      refs_of(params, plain),      refs_of(grads, plain), refs_of(exp_avgs, plain),
      refs_of(exp_avg_sqs, plain), refs_of(steps, plain), refs_of(beta_prods, plain),
      refs_of(prev_lrs, plain),    refs_of(betas, plain), refs_of(packed, plain)};
  if (!plain) return not_implemented();
  return py::cast(run("adamem_fused::adamw_begin_", [&] {
    return cpu::adamw_begin_(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf, rounding});
  }));
}

py::object adamw_finish_(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                         const py::list& exp_avg_sqs, const py::list& steps,
                         const py::list& beta_prods, const py::list& prev_lrs,
                         const py::list& betas, const Tensor& lrs,
                         const std::vector<int64_t>& group_sizes, const std::vector<double>& hypers,
                         const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                         const py::list& packed, const OptionalTensor& rounding,
                         const OptionalTensor& rows) {
  bool plain = !any_modes();
  const cpu::AdamWTensors tensors{
      refs_of(params, plain),      refs_of(grads, plain), refs_of(exp_avgs, plain),
      refs_of(exp_avg_sqs, plain), refs_of(steps, plain), refs_of(beta_prods, plain),
      refs_of(prev_lrs, plain),    refs_of(betas, plain), refs_of(packed, plain)};
  if (!plain) return not_implemented();
  run("adamem_fused::adamw_finish_", [&] {
    cpu::adamw_finish_(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf, rounding}, rows);
  });
  return py::none();
}

py::object sgd_begin(const py::list& params, const py::list& grads,
                     const py::list& momentum_buffers, const py::list& steps,
                     const py::list& prev_lrs, const py::list& betas, const Tensor& lrs,
                     const std::vector<int64_t>& group_sizes, const std::vector<double>& hypers,
                     const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                     const py::list& packed, const OptionalTensor& rounding) {
  bool plain = !any_modes();
  const cpu::SGDTensors tensors{
      refs_of(params, plain), refs_of(grads, plain),    refs_of(momentum_buffers, plain),
      refs_of(steps, plain),  refs_of(prev_lrs, plain), refs_of(betas, plain),
      refs_of(packed, plain)};
  if (!plain) return not_implemented();
  return py::cast(run("adamem_fused::sgd_begin", [&] {
    return cpu::sgd_begin(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf, rounding});
  }));
}

py::object sgd_finish_(const py::list& params, const py::list& grads,
                       const py::list& momentum_buffers, const py::list& steps,
                       const py::list& prev_lrs, const py::list& betas, const Tensor& lrs,
                       const std::vector<int64_t>& group_sizes, const std::vector<double>& hypers,
                       const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                       const py::list& packed, const OptionalTensor& rounding,
                       const OptionalTensor& rows) {
  bool plain = !any_modes();
  const cpu::SGDTensors tensors{
      refs_of(params, plain), refs_of(grads, plain),    refs_of(momentum_buffers, plain),
      refs_of(steps, plain),  refs_of(prev_lrs, plain), refs_of(betas, plain),
      refs_of(packed, plain)};
  if (!plain) return not_implemented();
  run("adamem_fused::sgd_finish_", [&] {
    cpu::sgd_finish_(tensors, {lrs, group_sizes, hypers, grad_scale, found_inf, rounding}, rows);
  });
  return py::none();
}

py::object squared_norms(const py::list& grads) {
  bool plain = !any_modes();
  const TensorRefs refs = refs_of(grads, plain);
  if (!plain) return not_implemented();
  return py::cast(run("adamem_fused::squared_norms", [&] { return cpu::squared_norms(refs); }));
}

// ---- betas: those of the last step ------------------------------------------------

// Reads a run of parameters at a time, in loops of which each asks for what the next one reads, as
// Gatherer does.
class BetaReader {
 public:
  static constexpr size_t kRun = 64;

  BetaReader(const py::dict& state, const py::str& name, DTensors dtensors)
      : states_(state.ptr()), name_(name.ptr()), dtensors_(dtensors) {}

  // Adds those of a run; false where one of them is not ordinary.
  bool add(PyObject* const* params, size_t n) {
    PyObject* found[kRun];  // the state of each; then its beta; null where there is none
    for (size_t i = 0; i < n; ++i) {
      prefetch_impl(tensor_of(params[i]));
      found[i] = states_.find(params[i]);
      __builtin_prefetch(found[i]);
    }
    for (size_t i = 0; i < n; ++i) {
      if (found[i] == nullptr) continue;
      if (PyDict_Check(found[i]))
        prefetch(reinterpret_cast<PyDictObject*>(found[i])->ma_keys, 256);
      else
        found[i] = nullptr;
    }
    for (size_t i = 0; i < n; ++i) {
      if (found[i] == nullptr) continue;
      const bool any = THPVariable_Unpack(params[i]).numel() > 0;
      found[i] = any ? PyDict_GetItemWithError(found[i], name_) : nullptr;
      if (found[i] == nullptr && PyErr_Occurred()) throw python_error();
      __builtin_prefetch(found[i]);
    }
    TensorRefs betas;
    betas.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      if (found[i] == nullptr) continue;
      PyObject* const beta = dtensors_.is(found[i]) ? dtensors_.local(found[i]) : found[i];
      if (!is_exact(beta)) return false;
      betas.push_back(THPVariable_Unpack(beta));
      prefetch_impl(THPVariable_Unpack(beta));
    }
    for (size_t i = 0, k = 0; i < n; ++i) {
      structure_.push_back(THPVariable_Unpack(params[i]).numel());
      structure_.push_back(0);
      if (found[i] == nullptr) continue;
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
  const std::vector<int64_t>& structure() const { return structure_; }

  // [betas]; float64 on the CPU.
  Tensor values() const {
    if (elsewhere_.size() == 0) return at::tensor(values_, at::kDouble);
    std::vector<Tensor> flat;
    flat.reserve(elsewhere_.size());
    for (size_t k = 0; k < elsewhere_.size(); ++k)
      flat.push_back(elsewhere_[k].dim() == 0 ? elsewhere_[k].unsqueeze(0) : elsewhere_[k]);
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
  TensorRefs elsewhere_;  // not on the CPU
};

// The last betas of parameters, in their order, as a new tensor [betas], float64 on the CPU; and,
// as bytes, two words of each parameter: its elements and how many of these betas are its, 0 where
// it has none or no elements.
//
// None where there are none, or one is not ordinary: a plain contiguous tensor of at most one
// dimension, or a DTensor's shard that is one, on the device of the others.
py::object betas(const py::list& groups, const py::dict& state, const py::str& name,
                 const py::object& dtensor) {
  if (any_modes()) return py::none();
  BetaReader reader(state, name, DTensors(dtensor));
  for (const py::handle group : groups) {
    PyObject* const* items = items_of(group);
    const size_t n = py::len(group);
    for (size_t begin = 0; begin < n; begin += BetaReader::kRun)
      if (!reader.add(items + begin, std::min(BetaReader::kRun, n - begin))) return py::none();
  }
  if (!reader.any()) return py::none();
  return py::make_tuple(reader.values(), as_bytes(reader.structure(), py::bytes()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // As torch chooses its own kernels, so that ATEN_CPU_CAPABILITY rules these too.
  adamem_cpu_choose(at::get_cpu_capability().c_str());
  // What the library is tied to; adamem_fused/backends/ops.py compares.
  m.attr("torch_version") = TORCH_VERSION;
  m.def("gather", torch::wrap_pybind_function(gather));
  m.def("bump_versions", torch::wrap_pybind_function(bump_versions));
  m.def("describe", torch::wrap_pybind_function(describe));
  m.def("any_modes", any_modes);
  m.def("betas", torch::wrap_pybind_function(betas));
  m.def("adamw_begin_", torch::wrap_pybind_function(adamw_begin_));
  m.def("adamw_finish_", torch::wrap_pybind_function(adamw_finish_));
  m.def("sgd_begin", torch::wrap_pybind_function(sgd_begin));
  m.def("sgd_finish_", torch::wrap_pybind_function(sgd_finish_));
  m.def("squared_norms", torch::wrap_pybind_function(squared_norms));
}

}  // namespace am

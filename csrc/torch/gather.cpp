// gather: the tensors of a step, out of the optimizer's groups and state.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string_view>
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

// A list of at most so many items, which owns them: nothing else may for the time of a step.
class Filling {
 public:
  explicit Filling(size_t most) : list_(Owned::take(PyList_New(static_cast<Py_ssize_t>(most)))) {}

  void put(Owned item) { items_of(list_.get())[size_++] = item.release(); }

  Owned finish() {
    const auto size = static_cast<Py_ssize_t>(size_);
    const Py_ssize_t most = PyList_Size(list_.get());
    if (size < most && PyList_SetSlice(list_.get(), size, most, nullptr) != 0) throw PythonError();
    return std::move(list_);
  }

 private:
  Owned list_;
  size_t size_ = 0;
};

// Whether its rows may have betas of their own: as beta_shape of adamem_fused/state.py.
bool has_rows(const Tensor& param) {
  constexpr int64_t kMinRow = 16;
  if (param.dim() < 2) return false;
  int64_t numel = 1;
  for (const int64_t size : param.sizes().slice(1)) numel *= size;
  return numel >= kMinRow;
}

// The tensors of a step that are stepped in one call.
struct Gathered {
  Gathered(size_t n_lists, size_t most, bool any_dtensors) : params(any_dtensors ? most : 0) {
    for (size_t k = 0; k < n_lists; ++k) lists.emplace_back(most);
  }

  std::vector<Filling> lists;   // parameters, gradients, and state by name; shards of DTensors
  Filling params;               // what the first list has shards of; not where none is a DTensor
  std::vector<Owned> dtensors;  // those of which shards are written to
  std::vector<int64_t> sizes;   // by group
};

// What gather is given beside the groups.
struct Wanted {
  PyObject* state;
  std::vector<PyObject*> names, others;
  std::vector<char> by_row;  // whole bytes: read for every value
  size_t most;               // tensors
  DTensors dtensors;
  bool any_dtensors;
  PyObject* known;
  std::string_view crossing;
};

// Gathers a run of parameters at a time, in loops of which each asks for what the next one
// reads: waiting for memory is most of what these lookups do. What it has found it owns before any
// Python code may run, which could take it from where it was.
class Gatherer {
 public:
  static constexpr size_t kRun = 64, kAhead = 8;

  explicit Gatherer(Wanted wanted) : wanted_(std::move(wanted)), states_(wanted_.state) {
    params_.reserve(kRun);
    entries_.reserve(kRun);
    values_.reserve(kRun * wanted_.names.size());
    values_held_.reserve(kRun * wanted_.names.size());
  }

  // Begins with the parameters of a group. rows: whether its rows have betas of their own.
  void begin_group(bool rows) {
    rows_ = rows;
    ++n_groups_;
    see(rows ? Py_True : Py_False);
  }

  // Adds a run's tensors to the lists; false where one of them is not ordinary.
  bool add(PyObject* const* params, size_t n) {
    const DTensors& dtensors = wanted_.dtensors;
    params_.clear();
    entries_.clear();
    states_held_.clear();
    values_.clear();
    values_held_.clear();
    for (size_t i = 0; i < n; ++i) {
      params_.push_back(Owned::share(params[i]));
      if (!is_exact(params[i])) {
        if (!dtensors.is(params[i]) || !is_exact(dtensors.local(params[i]))) return false;
        prefetch_impl(unpack(dtensors.local(params[i])));
      }
      prefetch_impl(unpack(params[i]));
    }
    for (const Owned& param : params_)
      __builtin_prefetch(unpack(param.get()).unsafeGetTensorImpl()->autograd_meta());
    for (Owned& owned : params_) {
      PyObject* const param = owned.get();
      const Tensor& grad = unpack(param).unsafeGetTensorImpl()->grad();
      if (!grad.defined()) {
        states_.next(param);
        continue;
      }
      Owned local, spec;
      if (!is_exact(param)) {
        local = Owned::share(dtensors.local(param));
        spec = Owned::share(dtensors.spec(param));
        if (!is_exact(local.get())) return false;
      }
      const Tensor& shard = unpack(local ? local.get() : param);
      if (!device_.has_value()) device_ = shard.device();
      if (!is_plain(shard) || shard.is_complex() || shard.device() != *device_) return false;
      PyObject* state = states_.next(param);
      if (state == nullptr) {
        hold_states();
        state = states_.look_up(param);
      }
      if (state == nullptr || !PyDict_CheckExact(state)) return false;
      prefetch_impl(grad);
      __builtin_prefetch(state);
      entries_.push_back({std::move(owned), std::move(local), std::move(spec), &grad, state});
    }
    for (const Entry& entry : entries_) prefetch_keys(entry.state);
    for (const Entry& entry : entries_) {
      Cursor values(entry.state);
      for (size_t k = 0; k < wanted_.names.size(); ++k) {
        PyObject* value = find(values, wanted_.names[k]);
        PyObject* const other = wanted_.others[k];
        if (value == nullptr && other != Py_None)
          value = PyUnicode_Check(other) ? find(values, other) : other;
        if (value == nullptr) return false;
        __builtin_prefetch(value, 1);
        values_.push_back(value);
      }
    }
    hold_values();
    Owned* value = values_held_.data();
    const size_t n_names = wanted_.names.size();
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (i + kAhead < entries_.size()) {
        // put looks at the shapes of these.
        const Owned* const later = value + kAhead * n_names;
        for (size_t k = 0; k < n_names; ++k)
          if (wanted_.by_row[k] && is_exact(later[k].get())) prefetch_impl(unpack(later[k].get()));
      }
      if (!put(entries_[i], value)) return false;
      value += n_names;
    }
    return true;
  }

  // Whether all that it has seen is known, and what it has gathered therefore in its place.
  bool is_known() const { return is_known_ && seen_.size() == wanted_.crossing.size(); }

  Owned take_seen() { return list_of(std::move(seen_)); }

  // What crosses ranks and what does not; None in the place of what there is none of.
  Owned finish() {
    std::vector<Owned> result;
    for (std::optional<Gathered>& gathered : gathered_)
      result.push_back(gathered.has_value() ? finish(*gathered) : none());
    return tuple_of(std::move(result));
  }

 private:
  struct Entry {
    Owned param;
    Owned local, spec;  // of a DTensor; local: this rank's shard
    const Tensor* grad;
    PyObject* state;  // borrowed

    PyObject* shard() const { return local ? local.get() : param.get(); }
  };

  // Before Python code runs while a run's states are looked up.
  void hold_states() {
    for (size_t i = states_held_.size(); i < entries_.size(); ++i)
      states_held_.push_back(Owned::share(entries_[i].state));
  }

  // And while what is in them is.
  void hold_values() {
    for (size_t i = values_held_.size(); i < values_.size(); ++i)
      values_held_.push_back(Owned::share(values_[i]));
  }

  PyObject* find(Cursor& values, PyObject* name) {
    if (PyObject* const value = values.next(name)) return value;
    hold_states();
    hold_values();
    return values.look_up(name);
  }

  // Notes what decides whether a parameter's sums cross ranks.
  void see(PyObject* object) {
    const size_t i = seen_.size();
    is_known_ = is_known_ && i < wanted_.crossing.size() &&
                PyList_GetItem(wanted_.known, static_cast<Py_ssize_t>(i)) == object;
    seen_.push_back(Owned::share(object));
  }

  bool put(Entry& entry, Owned* values) {
    const DTensors& dtensors = wanted_.dtensors;
    const Tensor& shard = unpack(entry.shard());
    const int64_t dim = rows_ && has_rows(unpack(entry.param.get())) ? 1 : 0;
    const bool sharded = static_cast<bool>(entry.spec);
    Owned grad = Owned::take(THPVariable_Wrap(*entry.grad));
    if (sharded) {
      if (!dtensors.is(grad.get())) return false;
      if (!dtensors.alike(entry.spec.get(), dtensors.spec(grad.get()))) return false;
      grad = Owned::share(dtensors.local(grad.get()));
    }
    if (!is_exact(grad.get()) || !is_plain(unpack(grad.get()))) return false;
    if (sharded) see(entry.spec.get());
    const bool crosses = sharded && is_known_ && wanted_.crossing[seen_.size() - 1] != 0;
    std::optional<Gathered>& gathered = gathered_[crosses ? 1 : 0];
    const size_t n_names = wanted_.names.size();
    if (!gathered.has_value()) gathered.emplace(2 + n_names, wanted_.most, wanted_.any_dtensors);
    if (sharded) gathered->dtensors.push_back(Owned::share(entry.param.get()));
    for (size_t k = 0; k < n_names; ++k) {
      Owned& value = values[k];
      if (sharded && dtensors.is(value.get())) {
        Owned local = Owned::share(dtensors.local(value.get()));
        gathered->dtensors.push_back(std::exchange(value, std::move(local)));
      }
      if (!is_exact(value.get())) return false;
      if (wanted_.by_row[k]) {
        const Tensor& scalar = unpack(value.get());
        if (scalar.dim() != dim || (dim == 1 && scalar.size(0) != shard.size(0))) return false;
      }
      gathered->lists[2 + k].put(std::move(value));
    }
    if (wanted_.any_dtensors) gathered->params.put(Owned::share(entry.param.get()));
    gathered->lists[0].put(std::move(sharded ? entry.local : entry.param));
    gathered->lists[1].put(std::move(grad));
    if (gathered->sizes.size() != n_groups_) gathered->sizes.resize(n_groups_);
    ++gathered->sizes.back();
    return true;
  }

  Owned finish(Gathered& gathered) {
    gathered.sizes.resize(n_groups_);
    std::vector<Owned> lists, result;
    for (Filling& list : gathered.lists) lists.push_back(list.finish());
    Owned params =
        wanted_.any_dtensors ? gathered.params.finish() : Owned::share(lists.front().get());
    result.push_back(list_of(gathered.sizes));
    result.push_back(tuple_of(std::move(lists)));
    result.push_back(std::move(params));
    result.push_back(list_of(std::move(gathered.dtensors)));
    return tuple_of(std::move(result));
  }

  Wanted wanted_;
  Cursor states_;
  bool is_known_ = true, rows_ = false;
  size_t n_groups_ = 0;
  std::vector<Owned> seen_;
  std::optional<Gathered> gathered_[2];
  std::optional<c10::Device> device_;
  // Of a run.
  std::vector<Owned> params_, states_held_, values_held_;
  std::vector<Entry> entries_;
  std::vector<PyObject*> values_;
};

std::vector<PyObject*> items_of_tuple(PyObject* tuple) {
  std::vector<PyObject*> items(PyTuple_Size(tuple));
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i));
  return items;
}

}  // namespace

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
PyObject* gather(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("gather", args, size, 9);
    PyObject* const groups = read.list();
    PyObject* const state = read.dict();
    std::vector<PyObject*> names = items_of_tuple(read.tuple());
    std::vector<PyObject*> others = items_of_tuple(read.tuple());
    const std::vector<bool> which = read.booleans();
    std::vector<char> by_row(which.begin(), which.end());
    const std::vector<bool> rows = read.booleans();
    PyObject* const dtensor = read.object();
    PyObject* const known = read.list();
    const std::string_view crossing = view_of(read.bytes());
    TORCH_CHECK_VALUE(by_row.size() == names.size() && others.size() == names.size() &&
                          rows.size() == size_of(groups),
                      "others, by_row and rows have to be as long as names, names and groups");
    TORCH_CHECK_VALUE(crossing.size() == size_of(known), "crossing has to be as long as known");
    std::vector<std::pair<Owned, size_t>> lists;
    size_t most = 0;
    for (size_t k = 0; k < rows.size(); ++k) {
      PyObject* const group = items_of(groups)[k];
      if (!PyList_Check(group)) return none();
      lists.emplace_back(Owned::share(group), size_of(group));
      most += size_of(group);
    }
    const bool any_dtensors = dtensor != Py_None;
    Gatherer gatherer({state, std::move(names), std::move(others), std::move(by_row), most,
                       DTensors(dtensor), any_dtensors, known, crossing});
    for (size_t k = 0; k < lists.size(); ++k) {
      PyObject* const group = lists[k].first.get();
      gatherer.begin_group(rows[k]);
      for (size_t begin = 0; begin < lists[k].second; begin += Gatherer::kRun) {
        const size_t n = std::min(Gatherer::kRun, lists[k].second - begin);
        if (size_of(group) != lists[k].second) return none();
        if (!gatherer.add(items_of(group) + begin, n)) return none();
      }
    }
    if (any_dtensors && !gatherer.is_known()) return gatherer.take_seen();
    return gatherer.finish();
  });
}

}  // namespace am

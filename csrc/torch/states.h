// Looks up what a step needs of an optimizer's state.
#pragma once

#include <c10/util/Exception.h>

#include <vector>

#include "layouts.h"
#include "python.h"

namespace am {

// Looks keys up in a dict in the order in which they are met, which most often is that of
// the dict: then it takes no hash, which for a tensor is a call into Python.
class Cursor {
 public:
  explicit Cursor(PyObject* dict) : dict_(dict) {}

  // The value, if the key is the next one that is met; else null. Runs no Python code.
  PyObject* next(PyObject* key) {
    if (ahead_) {
      ahead_ = key != key_;
      return ahead_ ? nullptr : value_;
    }
    if (!PyDict_Next(dict_, &position_, &key_, &value_)) key_ = nullptr;
    if (key == key_) return value_;
    stay_ahead();
    return nullptr;
  }

  // The value, or null. For a tensor runs Python code.
  PyObject* look_up(PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(dict_, key);
    if (value == nullptr && PyErr_Occurred()) throw PythonError();
    return value;
  }

  PyObject* find(PyObject* key) {
    PyObject* value = next(key);
    return value != nullptr ? value : look_up(key);
  }

 private:
  // Holds what is still to be met, which Python code may take from the dict: until the end, as who
  // is given it borrows it.
  [[gnu::noinline]] void stay_ahead() {
    ahead_ = true;
    if (key_ == nullptr) return;
    held_.push_back(Owned::share(key_));
    held_.push_back(Owned::share(value_));
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0;
  PyObject *key_ = nullptr, *value_ = nullptr;
  bool ahead_ = false;  // key_ is still to be met
  std::vector<Owned> held_;
};

// Reads a DTensor's parts where torch's class keeps them, in slots.
class DTensors {
 public:
  // The class, or None where nothing has imported it: then there are no DTensors.
  explicit DTensors(PyObject* type) {
    if (type == Py_None) return;
    TORCH_CHECK_TYPE(
        PyType_Check(type) && PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type),
                                               reinterpret_cast<PyTypeObject*>(THPVariableClass)),
        "expected a class of tensors");
    local_ = slot_offset(type, "_local_tensor");
    spec_ = slot_offset(type, "_spec");
    if (local_ > 0 && spec_ > 0) type_ = reinterpret_cast<PyTypeObject*>(type);
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
  static bool equal(PyObject* a, PyObject* b, const Owned& name) {
    const Owned ours = Owned::take(PyObject_GetAttr(a, name.get()));
    const Owned theirs = Owned::take(PyObject_GetAttr(b, name.get()));
    const int result = PyObject_RichCompareBool(ours.get(), theirs.get(), Py_EQ);
    if (result < 0) throw PythonError();
    return result == 1;
  }

  PyTypeObject* type_ = nullptr;
  Py_ssize_t local_ = 0, spec_ = 0;
  Owned placements_ = Owned::take(PyUnicode_InternFromString("placements"));
  Owned mesh_ = Owned::take(PyUnicode_InternFromString("mesh"));
};

}  // namespace am

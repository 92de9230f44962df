// What the module's functions need of Python: references, arguments and errors. In terms of the
// limited API of 3.10, so that one file serves every later Python; torch's own headers for this
// are made for one Python (pybind11).
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/Export.h>

#include <exception>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tensor_refs.h"

namespace torch {

// Declared in torch/csrc/Exceptions.h, which includes pybind11. Of torch's errors it makes those
// that its own functions raise.
TORCH_PYTHON_API void translate_exception_to_python(const std::exception_ptr& error);

}  // namespace torch

namespace am {

// Thrown where Python's own error is set already.
struct PythonError : std::exception {
  const char* what() const noexcept override { return "an error of Python"; }
};

// A reference, given back when this ends.
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& other) noexcept : object_(other.release()) {}
  Owned& operator=(Owned&& other) noexcept {
    Owned(std::move(other)).swap(*this);
    return *this;
  }
  ~Owned() { Py_XDECREF(object_); }

  // Takes over what an API function returns: null where it has set an error.
  static Owned take(PyObject* object) {
    if (object == nullptr) throw PythonError();
    Owned owned;
    owned.object_ = object;
    return owned;
  }

  // A reference beside that of somebody else.
  static Owned share(PyObject* object) {
    Py_INCREF(object);
    return take(object);
  }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }
  void swap(Owned& other) noexcept { std::swap(object_, other.object_); }

 private:
  PyObject* object_ = nullptr;
};

inline Owned none() { return Owned::share(Py_None); }

Owned tuple_of(std::vector<Owned> items);
Owned list_of(std::vector<Owned> items);
Owned list_of(const std::vector<int64_t>& numbers);

// The name of an object's class, for messages.
std::string class_of(PyObject* object);

inline std::string_view view_of(PyObject* bytes) {
  return {PyBytes_AsString(bytes), static_cast<size_t>(PyBytes_Size(bytes))};
}

// References to a list's tensors. exact: becomes false where one is of a subclass.
TensorRefs refs_of(PyObject* list, bool& exact);
inline TensorRefs refs_of(PyObject* list) {
  bool exact = true;
  return refs_of(list, exact);
}

// The arguments of a call, read in order. Those of another number or type raise a TypeError.
class Arguments {
 public:
  Arguments(const char* function, PyObject* const* items, Py_ssize_t size, Py_ssize_t expected);

  PyObject* object() { return items_[at_++]; }
  PyObject* list() { return checked(PyList_Check(items_[at_]), "a list"); }
  PyObject* tuple() { return checked(PyTuple_Check(items_[at_]), "a tuple"); }
  PyObject* dict() { return checked(PyDict_Check(items_[at_]), "a dict"); }
  PyObject* str() { return checked(PyUnicode_Check(items_[at_]), "a str"); }
  PyObject* bytes() { return checked(PyBytes_Check(items_[at_]), "bytes"); }
  bool boolean() { return checked(PyBool_Check(items_[at_]), "a bool") == Py_True; }
  const at::Tensor& tensor();
  std::optional<at::Tensor> optional_tensor();

  // Of lists.
  std::vector<int64_t> integers();
  std::vector<double> numbers();
  std::vector<bool> booleans();

 private:
  PyObject* checked(bool fits, const char* expected);
  template <class T, class Fits, class Read>
  std::vector<T> read_items(const char* expected, Fits fits, Read read);

  const char* function_;
  PyObject* const* items_;
  Py_ssize_t at_ = 0;
};

// Calls f(), which returns what is Owned, for Python: an error becomes one of Python's.
template <class F>
PyObject* call(F f) {
  try {
    return f().release();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

// Lets other threads run Python meanwhile.
class WithoutGIL {
 public:
  WithoutGIL() : state_(PyEval_SaveThread()) {}
  ~WithoutGIL() { PyEval_RestoreThread(state_); }
  WithoutGIL(const WithoutGIL&) = delete;
  WithoutGIL& operator=(const WithoutGIL&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace am

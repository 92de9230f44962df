#include "python.h"

#include "layouts.h"

namespace am {

std::string class_of(PyObject* object) {
  const Owned name =
      Owned::take(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__"));
  const char* text = PyUnicode_AsUTF8AndSize(name.get(), nullptr);
  if (text == nullptr) throw PythonError();
  return text;
}

Owned tuple_of(std::vector<Owned> items) {
  Owned tuple = Owned::take(PyTuple_New(static_cast<Py_ssize_t>(items.size())));
  for (size_t i = 0; i < items.size(); ++i)
    PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i), items[i].release());
  return tuple;
}

Owned list_of(std::vector<Owned> items) {
  Owned list = Owned::take(PyList_New(static_cast<Py_ssize_t>(items.size())));
  for (size_t i = 0; i < items.size(); ++i)
    PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), items[i].release());
  return list;
}

Owned list_of(const std::vector<int64_t>& numbers) {
  std::vector<Owned> items;
  items.reserve(numbers.size());
  for (const int64_t number : numbers) items.push_back(Owned::take(PyLong_FromLongLong(number)));
  return list_of(std::move(items));
}

TensorRefs refs_of(PyObject* list, bool& exact) {
  TORCH_CHECK_TYPE(PyList_Check(list), "expected a list, not a ", class_of(list));
  PyObject* const* const items = items_of(list);
  const size_t n = size_of(list);
  TensorRefs refs;
  refs.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    if (i + 16 < n) __builtin_prefetch(items[i + 16]);
    if (!is_exact(items[i])) {
      TORCH_CHECK_TYPE(is_tensor(items[i]), "a list of tensors holds a ", class_of(items[i]));
      exact = false;
    }
    refs.push_back(unpack(items[i]));
  }
  return refs;
}

Arguments::Arguments(const char* function, PyObject* const* items, Py_ssize_t size,
                     Py_ssize_t expected)
    : function_(function), items_(items) {
  TORCH_CHECK_TYPE(size == expected, function, "() takes ", expected, " arguments, not ", size);
}

PyObject* Arguments::checked(bool fits, const char* expected) {
  PyObject* const object = items_[at_++];
  if (!fits) {
    const std::string given = class_of(object);
    TORCH_CHECK_TYPE(false, function_, "(): argument ", at_, " has to be ", expected, ", not ",
                     given);
  }
  return object;
}

const at::Tensor& Arguments::tensor() {
  return unpack(checked(is_tensor(items_[at_]), "a tensor"));
}

std::optional<at::Tensor> Arguments::optional_tensor() {
  if (items_[at_] != Py_None) return tensor();
  ++at_;
  return std::nullopt;
}

std::vector<int64_t> Arguments::integers() {
  return read_items<int64_t>(
      "a list of ints", [](PyObject* item) { return PyLong_Check(item); },
      [](PyObject* item) { return PyLong_AsLongLong(item); });
}

std::vector<double> Arguments::numbers() {
  const auto fits = [](PyObject* item) { return PyFloat_Check(item) || PyLong_CheckExact(item); };
  return read_items<double>("a list of floats", fits,
                            [](PyObject* item) { return PyFloat_AsDouble(item); });
}

std::vector<bool> Arguments::booleans() {
  return read_items<bool>(
      "a list of bools", [](PyObject* item) { return PyBool_Check(item); },
      [](PyObject* item) { return item == Py_True; });
}

// Neither `fits` nor `read` may run Python code, which could change the list.
template <class T, class Fits, class Read>
std::vector<T> Arguments::read_items(const char* expected, Fits fits, Read read) {
  PyObject* const items = checked(PyList_Check(items_[at_]), expected);
  std::vector<T> values(size_of(items));
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* const item = items_of(items)[i];
    TORCH_CHECK_TYPE(fits(item), function_, "(): argument ", at_, " has to be ", expected);
    values[i] = read(item);
  }
  // Of a number that is too large.
  if (PyErr_Occurred()) throw PythonError();
  return values;
}

}  // namespace am

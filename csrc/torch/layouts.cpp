#include "layouts.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <structmember.h>

#include "python.h"

namespace am {
namespace {

struct MemberObject {
  PyObject head;
  PyTypeObject* type;
  PyObject *name, *qualified_name;
  PyMemberDef* member;
};

// By the API's functions alone, as what the inline ones assume is in question.
bool heads_fit() {
  PyObject* const list = PyList_New(0);
  if (list == nullptr) throw PythonError();
  PyObject* const type = PyObject_Type(list);
  const bool fit = reinterpret_cast<PyObject*>(Py_TYPE(list)) == type;
  Py_DecRef(type);
  Py_DecRef(list);
  return fit;
}

bool lists_fit() {
  const Owned list = Owned::take(PyList_New(2));
  PyList_SetItem(list.get(), 0, none().release());
  PyList_SetItem(list.get(), 1, PyLong_FromLong(1 << 20));
  if (size_of(list.get()) != 2) return false;
  for (Py_ssize_t i = 0; i < 2; ++i)
    if (items_of(list.get())[i] != PyList_GetItem(list.get(), i)) return false;
  return true;
}

// Whether a word that is read of a dict is one of its own.
bool dicts_fit() {
  const Owned size = Owned::take(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(&PyDict_Type), "__basicsize__"));
  return PyLong_AsLong(size.get()) >= static_cast<long>(sizeof(DictObject));
}

bool slots_fit() {
  const char* const names[] = {"first", "second"};
  const Owned type =
      Owned::take(PyObject_CallFunction(reinterpret_cast<PyObject*>(&PyType_Type), "s(){s(ss)}",
                                        "Slots", "__slots__", names[0], names[1]));
  const Owned object = Owned::take(PyObject_CallFunction(type.get(), nullptr));
  for (const char* name : names) {
    const Owned value = Owned::take(PyUnicode_FromString(name));
    const Py_ssize_t offset = slot_offset(type.get(), name);
    if (offset <= 0 || slot(object.get(), offset) != Py_None) return false;
    if (PyObject_SetAttrString(object.get(), name, value.get()) != 0) throw PythonError();
    if (slot(object.get(), offset) != value.get()) return false;
  }
  return true;
}

bool tensors_fit() {
  const at::Tensor tensor = at::empty({0});
  const Owned object = Owned::take(THPVariable_Wrap(tensor));
  return is_exact(object.get()) &&
         unpack(object.get()).unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl();
}

void check_layout(bool fits, const char* what) {
  if (fits) return;
  PyErr_Format(PyExc_ImportError,
               "adamem_fused's C++ extension knows another layout of %s than they have here", what);
  throw PythonError();
}

}  // namespace

Py_ssize_t slot_offset(PyObject* type, const char* name) {
  PyObject* found = PyObject_GetAttrString(type, name);
  if (found == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError();
    PyErr_Clear();
    return 0;
  }
  const Owned descriptor = Owned::take(found);
  if (Py_TYPE(found) != &PyMemberDescr_Type) return 0;
  return reinterpret_cast<MemberObject*>(found)->member->offset;
}

void check_layouts() {
  check_layout(heads_fit(), "objects");
  check_layout(lists_fit(), "lists");
  check_layout(dicts_fit(), "dicts");
  check_layout(slots_fit(), "slots");
  check_layout(tensors_fit(), "tensors");
}

}  // namespace am

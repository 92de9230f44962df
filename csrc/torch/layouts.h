// How Python and torch lay out objects, where no function of the limited API reads them or where
// one would take too long: a step reads thousands. Checked when the module is imported
// (check_layouts), which fails where it is otherwise.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/DispatchKeySet.h>
#include <torch/csrc/Export.h>
#include <torch/version.h>

#include "tensor_refs.h"

// As in torch/csrc/autograd/python_variable.h, which includes pybind11.
TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& tensor);

namespace am {

// Raises an ImportError where an object is laid out otherwise.
void check_layouts();

// ---- tensors ------------------------------------------------------------------------

struct TensorObject {
  PyObject head;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 10
  c10::MaybeOwned<at::Tensor> tensor;
#else
  at::Tensor tensor;
#endif
};

// A Tensor or Parameter, not a subclass.
inline bool is_exact(PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

// Not THPVariable_Check of torch's, which asks Tensor's metaclass: 40 ns for a DTensor.
inline bool is_tensor(PyObject* object) {
  return is_exact(object) ||
         PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// The tensor of an object that is one.
inline const at::Tensor& unpack(PyObject* object) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 10
  return *reinterpret_cast<TensorObject*>(object)->tensor;
#else
  return reinterpret_cast<TensorObject*>(object)->tensor;
#endif
}

// Not wrapped, sparse, quantized or a lazy negation: a kernel may read its data through its
// pointer.
inline bool is_plain(const at::Tensor& tensor) {
  const uint64_t allowed =
      c10::full_backend_mask |
      (c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
       c10::DispatchKeySet(c10::DispatchKey::Dense))
          .raw_repr();
  return (tensor.key_set().raw_repr() & ~allowed) == 0;
}

// As data_ptr, without the functions of torch's libraries that this asks first.
inline int64_t address_of(const at::Tensor& tensor) {
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  c10::StorageImpl* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (!is_plain(tensor) || impl->numel() == 0 || storage == nullptr)
    return reinterpret_cast<int64_t>(tensor.data_ptr());
  return reinterpret_cast<int64_t>(storage->mutable_data()) +
         static_cast<int64_t>(impl->dtype().itemsize()) * impl->storage_offset();
}

// ---- lists --------------------------------------------------------------------------

struct ListObject {
  PyVarObject head;
  PyObject** items;
};

inline size_t size_of(PyObject* list) {
  return static_cast<size_t>(reinterpret_cast<ListObject*>(list)->head.ob_size);
}

// PyList_GetItem would be 3.3 ns for each item, in place of 0.6 (Python 3.11, AMD EPYC).
inline PyObject** items_of(PyObject* list) { return reinterpret_cast<ListObject*>(list)->items; }

// ---- dicts --------------------------------------------------------------------------

struct DictObject {
  PyObject head;
  Py_ssize_t used;
  uint64_t version;
  void* keys;
};

// Asks for a dict's keys, once the dict itself is there. Where they lie elsewhere it asks for
// something else, and no harm is done.
inline void prefetch_keys(PyObject* dict) {
  prefetch(reinterpret_cast<DictObject*>(dict)->keys, 256);
}

// ---- slots --------------------------------------------------------------------------

// Where the objects of a class have a slot that is called so; 0 where it has none.
Py_ssize_t slot_offset(PyObject* type, const char* name);

// Borrowed; None where it is not set.
inline PyObject* slot(PyObject* object, Py_ssize_t offset) {
  PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
  return value == nullptr ? Py_None : value;
}

}  // namespace am

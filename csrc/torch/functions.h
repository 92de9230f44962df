// The module's functions, as METH_FASTCALL takes them.
#pragma once

#include <Python.h>

namespace am {

using Function = PyObject*(PyObject* module, PyObject* const* args, Py_ssize_t size);

Function gather, bump_versions, describe, any_modes, betas;
Function adamw_begin_, adamw_finish_, sgd_begin, sgd_finish_, squared_norms;

}  // namespace am

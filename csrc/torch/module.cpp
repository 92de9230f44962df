// The module adamem_fused._C: what a step does with its thousands of tensors before any
// arithmetic. Python takes 0.1 us for each attribute of each tensor and torch's dispatcher
// 0.35 us for each tensor in a list; here a tensor costs some 20 ns.
#include <ATen/Version.h>
#include <Python.h>
#include <torch/version.h>

#include "../cpu/library.h"
#include "functions.h"
#include "layouts.h"
#include "python.h"

namespace am {
namespace {

PyMethodDef method(const char* name, Function* function) {
  void (*const any)() = reinterpret_cast<void (*)()>(function);
  return {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method("gather", gather),
    method("bump_versions", bump_versions),
    method("describe", describe),
    method("any_modes", any_modes),
    method("betas", betas),
    method("adamw_begin_", adamw_begin_),
    method("adamw_finish_", adamw_finish_),
    method("sgd_begin", sgd_begin),
    method("sgd_finish_", sgd_finish_),
    method("squared_norms", squared_norms),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace am

PyMODINIT_FUNC PyInit__C() {
  return am::call([] {
    am::check_layouts();
    // It lies beside this file, and may be of another version all the same.
    if (adamem_cpu_interface() != am::cpu::kInterface) {
      PyErr_SetString(PyExc_ImportError, "_cpu.so is of another version of adamem_fused");
      throw am::PythonError();
    }
    // As torch chooses its own kernels, so that ATEN_CPU_CAPABILITY rules these too.
    adamem_cpu_choose(at::get_cpu_capability().c_str());
    am::Owned module = am::Owned::take(PyModule_Create(&am::definition));
    // What this file is tied to; adamem_fused/backends/ops.py compares.
    if (PyModule_AddStringConstant(module.get(), "torch_version", TORCH_VERSION) != 0)
      throw am::PythonError();
    return module;
  });
}

"""The build: the C++ extension, compiled against the torch that is installed, and the CUDA
kernels, which are tied to no torch, where there is nvcc and torch is a CUDA build.

ADAMEM_NO_EXTENSION=1 installs the pure-Python backends alone. ADAMEM_CUDA=0 leaves out the
CUDA kernels, ADAMEM_CUDA=1 insists on them, with any torch. TORCH_CUDA_ARCH_LIST says what to
compile them for; else it is the devices at hand, or 7.5, 8.0, 9.0 and 10.0.
"""

import importlib.util
import os
import platform
import re
import shutil
import site
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    "-g0",
    # Fused multiply-adds are written out where they are meant (csrc/am_math.h), so that
    # AVX2 and AVX-512 give the same bits.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # GCC 12's own AVX-512 headers.
    "-Wno-maybe-uninitialized",
]

# The kernels are C++17; torch's headers are C++20 from 2.14 on.
KERNEL_STANDARD, TORCH_STANDARD = "-std=c++17", "-std=c++20"

TORCH_SOURCES = [
    "csrc/ops.cpp",
    "csrc/python.cpp",
    "csrc/cpu/kernels.cpp",
    "csrc/cpu/norms.cpp",
    "csrc/cpu/ops_cpu.cpp",
    "csrc/cpu/step.cpp",
]

# The kernels, once for each instruction set that torch tells apart.
KERNEL_SOURCES = {"csrc/cpu/kernels_default.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_SOURCES["csrc/cpu/kernels_avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]
    KERNEL_SOURCES["csrc/cpu/kernels_avx512.cpp"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ]

CUDA_NAME = "adamem_fused._cuda"


def find_torch():
    """The folder of the installed torch, or None.

    pip's isolated builds hide the installed packages from import, but the interpreter
    still knows where they lie; torch is not imported, only its headers are read.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    paths = sysconfig.get_paths()
    for folder in (paths["purelib"], paths["platlib"], site.getusersitepackages()):
        root = Path(folder) / "torch"
        if (root / "include").is_dir():
            return root
    return None


def load_cuda_library():
    """adamem_fused/backends/cuda_library.py, without the package, which would import torch."""
    path = Path(__file__).parent / "adamem_fused" / "backends" / "cuda_library.py"
    spec = importlib.util.spec_from_file_location("cuda_library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_library = load_cuda_library()


def why_no_cuda():
    """Why the CUDA kernels are not compiled, or None if they are."""
    asked = os.environ.get("ADAMEM_CUDA")
    if asked not in (None, "0", "1"):
        sys.exit(f"adamem_fused: Invalid ADAMEM_CUDA: {asked!r} (0 or 1)")
    if asked == "0":
        return "ADAMEM_CUDA=0"
    if cuda_library.find_nvcc() is None:
        if asked == "1":
            sys.exit(
                "adamem_fused: ADAMEM_CUDA=1 asks for the CUDA kernels, and no nvcc was found. "
                "Install the CUDA toolkit, or say where it is with CUDA_HOME."
            )
        return "no nvcc was found"
    if asked is None:
        torch_root = find_torch()
        version = torch_root / "version.py" if torch_root else None
        text = version.read_text() if version and version.exists() else ""
        if not re.search(r"^cuda\b[^=]*= *['\"]", text, re.MULTILINE):
            return "torch is not a CUDA build (ADAMEM_CUDA=1 compiles them all the same)"
    return None


class BuildExtension(build_ext):
    """build_ext that compiles each kernel source with its own instruction set, and CUDA."""

    def finalize_options(self):
        super().finalize_options()
        # What an earlier build has left may be of another torch, with flags of its own: the times
        # of files do not tell.
        self.force = True

    def run(self):
        reason = why_no_cuda() if self.extensions else None
        if reason is not None:
            print(f"adamem_fused: without the CUDA kernels: {reason}")
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_NAME]
            # Or those of an earlier build would be installed.
            Path(self.build_lib, self.get_ext_filename(CUDA_NAME)).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname):
        # Not a Python module: tied to no version of Python.
        if fullname.split(".")[-1] == CUDA_NAME.split(".")[-1]:
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if ext.name == CUDA_NAME:
            self.build_cuda(Path(self.get_ext_fullpath(ext.name)))
        else:
            self.build_cpp(ext)

    def build_cuda(self, path):
        nvcc = cuda_library.find_nvcc()
        numbers = cuda_library.architectures(nvcc)
        print(f"adamem_fused: compiling the CUDA kernels for {numbers} with {nvcc}")
        path.parent.mkdir(parents=True, exist_ok=True)
        cuda_library.compile_library(nvcc, path, numbers)

    def build_cpp(self, ext):
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler.split()[0]) is None:
            sys.exit(
                f"adamem_fused: no C++ compiler ({compiler}) was found. Install one (Debian, "
                "Ubuntu: apt-get install g++) or set ADAMEM_NO_EXTENSION=1 to install without "
                "the cpu backend."
            )
        torch_root = find_torch()
        if torch_root is None:
            sys.exit(
                "adamem_fused: the extension is compiled against an installed torch (2.9 or "
                "newer), and none was found. Install torch first (where a build is isolated in "
                "an environment of its own, as uv does it, add --no-build-isolation), or set "
                "ADAMEM_NO_EXTENSION=1 to install without the cpu backend."
            )
        # As system headers, so that warnings are about this package's code.
        include = torch_root / "include"
        includes = [include, include / "torch" / "csrc" / "api" / "include"]
        flags = [flag for path in includes for flag in ("-isystem", str(path))]
        for source, isa_flags in KERNEL_SOURCES.items():
            ext.extra_objects += self.compile([source], [*CXX_FLAGS, KERNEL_STANDARD, *isa_flags])
        ext.extra_compile_args = [*CXX_FLAGS, TORCH_STANDARD, *flags]
        ext.library_dirs = [str(torch_root / "lib")]
        super().build_extension(ext)

    def compile(self, sources, flags):
        return self.compiler.compile(sources, output_dir=self.build_temp, extra_postargs=flags)


def extensions():
    if os.environ.get("ADAMEM_NO_EXTENSION") == "1":
        return []
    return [
        Extension(
            "adamem_fused._C",
            TORCH_SOURCES,
            libraries=["c10", "torch_cpu", "torch", "torch_python"],
            extra_link_args=["-fopenmp"],
            language="c++",
        ),
        Extension(CUDA_NAME, sorted(glob("csrc/cuda/*.cu"))),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})

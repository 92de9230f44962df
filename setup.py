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
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # GCC 12's own AVX-512 headers.
    "-Wno-maybe-uninitialized",
]

# The kernels are C++17; torch's headers are C++20 from 2.14 on.
KERNEL_STANDARD, TORCH_STANDARD = "-std=c++17", "-std=c++20"

# The kernels, a library without torch: what runs once, and, for each instruction set that torch
# tells apart, the file that is compiled with these flags.
CPU_SOURCES = {"kernels": [], "norms": [], "step": [], "threads": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES["kernels_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_SOURCES["kernels_avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ]
CPU_SOURCES["kernels_neon" if platform.machine() == "aarch64" else "kernels_default"] = []

CPU_NAME = "adamem_fused._cpu"
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


def check_compiler():
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"adamem_fused: no C++ compiler ({compiler}) was found. Install one (Debian, "
            "Ubuntu: apt-get install g++) or set ADAMEM_NO_EXTENSION=1 to install without "
            "the cpu backend."
        )


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

    def build_extensions(self):
        # Not beside the others, which may be built in parallel: _C is linked against it.
        everything = self.extensions
        for ext in everything:
            if ext.name == CPU_NAME:
                self.build_extension(ext)
        self.extensions = [ext for ext in everything if ext.name != CPU_NAME]
        super().build_extensions()
        self.extensions = everything

    def get_ext_filename(self, fullname):
        # Not Python modules: tied to no version of Python.
        if f"adamem_fused.{fullname.split('.')[-1]}" in (CPU_NAME, CUDA_NAME):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        path = Path(self.get_ext_fullpath(ext.name))
        if ext.name == CUDA_NAME:
            self.build_cuda(path)
        elif ext.name == CPU_NAME:
            self.build_cpu(path)
        else:
            self.build_cpp(ext)

    def build_cpu(self, path):
        check_compiler()
        objects = []
        for name, isa_flags in CPU_SOURCES.items():
            flags = [*CXX_FLAGS, KERNEL_STANDARD, *isa_flags]
            objects += self.compile([f"csrc/cpu/{name}.cpp"], flags)
        self.compiler.link_shared_object(
            objects,
            str(path),
            extra_postargs=["-pthread", f"-Wl,-soname,{path.name}", "-s"],
            target_lang="c++",
        )

    def build_cuda(self, path):
        nvcc = cuda_library.find_nvcc()
        numbers = cuda_library.architectures(nvcc)
        print(f"adamem_fused: compiling the CUDA kernels for {numbers} with {nvcc}")
        path.parent.mkdir(parents=True, exist_ok=True)
        cuda_library.compile_library(nvcc, path, numbers)

    def build_cpp(self, ext):
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
        # For at::parallel_for; not linked against OpenMP: it is to be the one that torch brings.
        ext.extra_compile_args = [*CXX_FLAGS, TORCH_STANDARD, "-fopenmp", *flags]
        library = Path(self.get_ext_fullpath(CPU_NAME))
        ext.library_dirs = [str(torch_root / "lib"), str(library.parent)]
        ext.extra_link_args = [f"-l:{library.name}", "-Wl,-rpath,$ORIGIN", "-s"]
        super().build_extension(ext)

    def compile(self, sources, flags):
        return self.compiler.compile(sources, output_dir=self.build_temp, extra_postargs=flags)


def extensions():
    if os.environ.get("ADAMEM_NO_EXTENSION") == "1":
        return []
    return [
        Extension(CPU_NAME, [f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES]),
        Extension(
            "adamem_fused._C",
            sorted(glob("csrc/torch/*.cpp")),
            libraries=["c10", "torch_cpu", "torch", "torch_python"],
            language="c++",
        ),
        Extension(CUDA_NAME, sorted(glob("csrc/cuda/*.cu"))),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})

"""The build: the C++ extension, compiled against the torch that is installed.

ADAMEM_NO_EXTENSION=1 installs the pure-Python backends alone.
"""

import importlib.util
import os
import platform
import shutil
import site
import sys
import sysconfig
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

TORCH_SOURCES = ["csrc/ops.cpp", "csrc/python.cpp", "csrc/cpu/ops_cpu.cpp", "csrc/cpu/step.cpp"]

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

HEADERS = [
    "csrc/am_math.h",
    "csrc/tensor_refs.h",
    "csrc/cpu/kernels.h",
    "csrc/cpu/kernels_impl.h",
    "csrc/cpu/pack.h",
    "csrc/cpu/schedule.h",
    "csrc/cpu/step.h",
]


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


class BuildExtension(build_ext):
    """build_ext that compiles each kernel source with its own instruction set."""

    def build_extension(self, ext):
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
        return self.compiler.compile(
            sources, output_dir=self.build_temp, extra_postargs=flags, depends=HEADERS
        )


def extensions():
    if os.environ.get("ADAMEM_NO_EXTENSION") == "1":
        return []
    return [
        Extension(
            "adamem_fused._C",
            TORCH_SOURCES,
            depends=HEADERS,
            libraries=["c10", "torch_cpu", "torch", "torch_python"],
            extra_link_args=["-fopenmp"],
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})

"""The build: the CPU kernels, which know no torch; the glue, compiled against a torch; and the CUDA
kernels, which know no torch either, where there is nvcc and torch is a CUDA build.

ADAMEM_NO_EXTENSION=1 installs the pure-Python backends alone. ADAMEM_CUDA=0 leaves out the
CUDA kernels, ADAMEM_CUDA=1 insists on them, with any torch. TORCH_CUDA_ARCH_LIST says what to
compile them for; else it is the devices at hand, or 7.5, 8.0, 9.0 and 10.0.

The glue is of the torch that is installed. `make wheel` has one of each torch: ADAMEM_TORCHES names
their folders, with include and lib in each, separated as PATH is.
"""

import importlib.util
import os
import platform
import re
import shutil
import site
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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

# The kernels, a library without torch: for each instruction set that torch tells apart, the file
# that is compiled with these flags, and what there is one of. What takes longest comes first.
CPU_SOURCES = {}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES["kernels_avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ]
    CPU_SOURCES["kernels_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
CPU_SOURCES["kernels_neon" if platform.machine() == "aarch64" else "kernels_default"] = []
CPU_SOURCES |= {"kernels": [], "norms": [], "step": [], "threads": []}

CPU_NAME = "adamem_fused._cpu"
CUDA_NAME = "adamem_fused._cuda"
# Followed by the torch that it is for, as in _C_2_13: those of several may lie beside each other.
GLUE_NAME = "adamem_fused._C"
# It is for any Python from 3.10 on: an extension of the limited API. Python without its lock has no
# such thing, and takes the kernels without the glue.
OLDEST_PYTHON = (3, 10)
HAS_LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


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


def torch_version(root):
    """As in 2_13, by the headers, for they are what is compiled against; None where torch is older
    than 2.9 or has no headers."""
    headers = root / "include" / "torch"
    # That of 2.9, and from 2.10 on.
    for path in ("csrc/api/include/torch/version.h", "headeronly/version.h"):
        text = (headers / path).read_text() if (headers / path).exists() else ""
        numbers = re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", text)
        if len(numbers) == 2 and list(map(int, numbers)) >= [2, 9]:
            return "_".join(numbers)
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


def check_compiler(torch_roots):
    """Exits where the compiler or a torch is missing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"adamem_fused: no C++ compiler ({compiler}) was found. Install one (Debian, "
            "Ubuntu: apt-get install g++) or set ADAMEM_NO_EXTENSION=1 to install without "
            "the cpu backend."
        )
    if None in torch_roots:
        sys.exit(
            "adamem_fused: the extension is compiled against an installed torch (2.9 or "
            "newer), and none was found. Install torch first (where a build is isolated in "
            "an environment of its own, as uv does it, add --no-build-isolation), or set "
            "ADAMEM_NO_EXTENSION=1 to install without the cpu backend."
        )


class Glue(Extension):
    """What is compiled against a torch, which lies in this folder, or None."""

    def __init__(self, torch_root):
        version = torch_version(torch_root) if torch_root is not None else None
        super().__init__(f"{GLUE_NAME}_{version}", sorted(glob("csrc/torch/*.cpp")))
        self.torch_root = torch_root if version is not None else None


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
        if self.extensions:
            check_compiler([ext.torch_root for ext in self.extensions if isinstance(ext, Glue)])
        self.remove_earlier()
        super().run()

    def remove_earlier(self):
        """Or what an earlier build has left would be installed: the CUDA kernels, glue of a torch
        that was upgraded."""
        folders = {Path(self.build_lib, self.get_ext_filename(CPU_NAME)).parent}
        if self.inplace:
            folders.add(Path(__file__).parent / "adamem_fused")
        for folder in folders:
            for library in folder.glob("*.so"):
                library.unlink()

    def build_extensions(self):
        # Not beside the others, which may be built in parallel: the glue is linked against it.
        everything = self.extensions
        for ext in everything:
            if ext.name == CPU_NAME:
                self.build_extension(ext)
        self.extensions = [ext for ext in everything if ext.name != CPU_NAME]
        super().build_extensions()
        self.extensions = everything

    def get_ext_filename(self, fullname):
        # None is tied to a version of Python, and only the glue is a Python module.
        path = Path(*fullname.split("."))
        return f"{path}.abi3.so" if path.name.startswith("_C") else f"{path}.so"

    def build_extension(self, ext):
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CUDA_NAME:
            self.build_cuda(path)
        elif ext.name == CPU_NAME:
            self.build_cpu(path)
        else:
            self.build_glue(ext, path)

    def build_cpu(self, path):
        def compile_one(name):
            flags = [*CXX_FLAGS, KERNEL_STANDARD, *CPU_SOURCES[name]]
            return self.compile([f"csrc/cpu/{name}.cpp"], "cpu", flags)

        # At once, as each instruction set's takes a minute or more.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, CPU_SOURCES) for path in paths]
        self.link(objects, path, ["-pthread", "-ldl", f"-Wl,-soname,{path.name}"])

    def build_cuda(self, path):
        nvcc = cuda_library.find_nvcc()
        numbers = cuda_library.architectures(nvcc)
        print(f"adamem_fused: compiling the CUDA kernels for {numbers} with {nvcc}")
        cuda_library.compile_library(nvcc, path, numbers)

    def build_glue(self, ext, path):
        root = ext.torch_root
        # As system headers, so that warnings are about this package's code.
        include = root / "include"
        includes = [include, include / "torch" / "csrc" / "api" / "include"]
        flags = [
            *(flag for folder in includes for flag in ("-isystem", str(folder))),
            "-DPy_LIMITED_API={:#04x}{:02x}0000".format(*OLDEST_PYTHON),
            # For at::parallel_for; not linked against OpenMP, which is to be the one of torch.
            "-fopenmp",
        ]
        # All in one file: most of the time goes into torch's headers.
        folder = Path(self.build_temp, path.name)
        folder.mkdir(parents=True, exist_ok=True)
        unit = folder / "glue.cpp"
        unit.write_text("".join(f'#include "{Path(file).resolve()}"\n' for file in ext.sources))
        objects = self.compile([str(unit)], path.name, [*CXX_FLAGS, TORCH_STANDARD, *flags])
        libraries = [f"-l{name}" for name in ("c10", "torch_cpu", "torch", "torch_python")]
        self.link(
            objects,
            path,
            [
                *(f"-L{folder}" for folder in (path.parent, root / "lib")),
                f"-l:{Path(self.get_ext_filename(CPU_NAME)).name}",
                *libraries,
                # DT_RPATH: looked through before LD_LIBRARY_PATH.
                "-Wl,-rpath,$ORIGIN,--disable-new-dtags",
            ],
        )

    def compile(self, sources, folder, flags):
        """Into a folder of their own: those of several torches have the same names."""
        output = str(Path(self.build_temp, folder))
        return self.compiler.compile(sources, output_dir=output, extra_postargs=flags)

    def link(self, objects, path, flags):
        self.compiler.link_shared_object(
            objects, str(path), extra_postargs=[*flags, "-s"], target_lang="c++"
        )


def extensions():
    if os.environ.get("ADAMEM_NO_EXTENSION") == "1":
        return []
    torches = os.environ.get("ADAMEM_TORCHES")
    roots = [Path(folder) for folder in torches.split(os.pathsep)] if torches else [find_torch()]
    return [
        Extension(CPU_NAME, [f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES]),
        *(Glue(root) for root in roots if HAS_LIMITED_API),
        Extension(CUDA_NAME, sorted(glob("csrc/cuda/*.cu"))),
    ]


tag = "cp{}{}".format(*OLDEST_PYTHON)
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": tag}} if HAS_LIMITED_API else {},
)

"""The compiled kernels of csrc/cuda: finds the library, compiles it, loads it.

setup.py compiles with this file too, without importing the package: it needs nothing but
Python. The library holds machine code for some architectures, and PTX of the newest for those
to come. It is tied to no version of Python or torch, and holds its own CUDA runtime, which needs a
driver of the same major version of CUDA or a newer one (CUDA 13: driver 580). Its functions are
called through ctypes.

In a source checkout that was not installed, ADAMEM_CUDA_JIT=1 compiles the kernels at their
first use, for the devices at hand, into the folder of torch's extensions
(TORCH_EXTENSIONS_DIR). torch.utils.cpp_extension.load does not fit: it links against torch,
and so would tie the library to it, and asks for a CUDA toolkit with all its headers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "_cuda.so"
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-O3",
    # Fused multiply-adds are written out where they are meant (csrc/am_math.h): else a step and its
    # two halves could give other bits.
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-Wall,-Wextra",
]
# Where there is no device to look at.
DEFAULT_ARCHITECTURES = (75, 80, 90, 100)


# ---- the compiler ---------------------------------------------------------------------


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, of CUDA's usual place, or of a pip package."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for home in homes:
        if (nvcc := Path(home) / "bin" / "nvcc").exists():
            return str(nvcc)
    if (found := shutil.which("nvcc")) is not None:
        return found
    candidates = [Path("/usr/local/cuda/bin/nvcc")]
    for folder in sys.path:
        candidates += sorted(Path(folder or ".").glob("nvidia/*/bin/nvcc"))
    return next((str(nvcc) for nvcc in candidates if nvcc.exists()), None)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def architectures(nvcc: str) -> list[int]:
    """What to compile for: TORCH_CUDA_ARCH_LIST, or the devices at hand, or the default.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST holds something else than numbers like 9.0.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked:
        entries = re.split(r"[;\s]+", asked.strip())
        matches = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry) for entry in entries]
        if None in matches:
            raise ValueError(
                f"Invalid TORCH_CUDA_ARCH_LIST: {asked!r} (numbers like 9.0, separated by ;)"
            )
        found = {int(match[1] + match[2]) for match in matches if match is not None}
        return sorted(found)
    devices = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    capabilities = {int(a + b) for a, b in re.findall(r"^(\d+)\.(\d)$", devices, re.MULTILINE)}
    known = {
        int(number) for number in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    }
    # None before 7.5: CUDA 13 knows no older ones. A device that nvcc does not know yet runs the
    # PTX of the newest.
    usable = [a for a in sorted(capabilities or DEFAULT_ARCHITECTURES) if a >= 75]
    return [a for a in usable if a in known] or [max(known, default=80)]


def targets(numbers: Sequence[int]) -> list[str]:
    """nvcc's arguments: machine code for each, and PTX of the newest."""
    newest = max(numbers)
    return [
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in numbers),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def headers() -> list[Path]:
    shared = [SOURCES.parent / name for name in ("am_math.h", "formats.h")]
    return [*shared, *sorted(SOURCES.glob("*.h"))]


def compile_library(nvcc: str, path: Path, numbers: Sequence[int]) -> None:
    """Compiles the library for these architectures. Raises CalledProcessError."""
    # Under another name first: another process may be loading it, or compiling it too.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    command = [nvcc, *FLAGS, *targets(numbers), "-shared", "-cudart=static", "--threads=0"]
    try:
        subprocess.run([*command, "-o", unfinished, *sources()], check=True)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---- the library ----------------------------------------------------------------------


def _is_asked_for() -> bool:
    return os.environ.get("ADAMEM_CUDA_JIT") == "1"


def _cached(nvcc: str, numbers: Sequence[int]) -> Path:
    """Where the library of these sources is kept once it is compiled."""
    content = repr((nvcc, numbers, FLAGS)).encode()
    content += b"".join(path.read_bytes() for path in (*headers(), *sources()))
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)) / "adamem_fused"
    return folder / f"cuda-{hashlib.sha256(content).hexdigest()[:16]}.so"


@functools.cache
def _compile_if_new() -> Path | str:
    """The library of the sources beside this package; or why it does not come about."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "ADAMEM_CUDA_JIT=1 is set, and no nvcc was found"
    if not sources():
        return f"ADAMEM_CUDA_JIT=1 is set, and there are no sources in {SOURCES}"
    try:
        numbers = architectures(nvcc)
        path = _cached(nvcc, numbers)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"adamem_fused: compiling the CUDA kernels into {path}", file=sys.stderr)
            compile_library(nvcc, path, numbers)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"ADAMEM_CUDA_JIT=1 is set, and the kernels do not compile: {error}"
    return path


def _find() -> Path | str:
    """The library, or why it is not there."""
    if _is_asked_for():
        return _compile_if_new()
    if LIBRARY.exists():
        return LIBRARY
    return (
        "its kernels were not compiled; reinstall where nvcc is found, with a CUDA build of torch "
        "or ADAMEM_CUDA=1, or set ADAMEM_CUDA_JIT=1 in a source checkout"
    )


def unavailable() -> str | None:
    """Why the library is not there, or None."""
    found = _find()
    return found if isinstance(found, str) else None


def load() -> ctypes.CDLL:
    """The library. Raises RuntimeError where it is not there, OSError where it does not load."""
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(found)
    return ctypes.CDLL(str(found))

"""The cuda backend on the CPU: its kernels compiled by g++, see cuda_emulation/cuda_runtime.h.

As a pytest plugin (-p cuda_emulator) it makes the backend available for CPU tensors in the
whole process, so that tests of all backends take it in.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from adamem_fused.backends import cuda, cuda_library

HEADERS = Path(__file__).parent / "cuda_emulation"
COMMAND = [
    *os.environ.get("CXX", "g++").split(),
    *["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno"],
    *["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{HEADERS}"],
]


def compile_cpp(path: Path, *arguments: str | Path) -> Path:
    """Compiles with CUDA's headers emulated."""
    command = [*COMMAND, *map(str, arguments), "-o", str(path), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated library; compiled once for the same sources."""
    files = [*cuda_library.headers(), *cuda_library.sources(), *HEADERS.rglob("*")]
    texts = [path.read_bytes() for path in sorted(files) if path.is_file()]
    key = hashlib.sha256(repr(COMMAND).encode() + b"".join(texts)).hexdigest()[:16]
    path = HEADERS.parent.parent / "build" / f"cuda-emulation-{key}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        sources = [*cuda_library.sources(), HEADERS / "shared_memory.cpp"]
        compile_cpp(unfinished, "-shared", "-fPIC", "-x", "c++", *sources)
        unfinished.replace(path)
    return ctypes.CDLL(str(path))


def set_blocks(resident: int, running: int) -> None:
    """How many blocks launches take the device to hold, and how many run at a time."""
    library().emulation_configure(resident, running)


def play(driver: int = 13000, has_code: bool = True, is_capturing: bool = False) -> None:
    """The driver's version, whether the library has code for the device, and a graph's capture."""
    library().emulation_play(driver, has_code, is_capturing)


def traffic() -> tuple[int, int]:
    """The bytes read and written since the last call, by accesses of several elements."""
    read, written = ctypes.c_int64(), ctypes.c_int64()
    library().emulation_traffic(ctypes.byref(read), ctypes.byref(written))
    return read.value, written.value


@contextmanager
def _on(device: torch.device) -> Iterator[ctypes.c_void_p]:
    yield ctypes.c_void_p()


def _unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"emulated on the CPU, and these are on {device}"


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Gives the cuda backend the emulated library, for tensors on the CPU."""
    patch.setattr(cuda, "_library", library)
    patch.setattr(cuda, "_on", _on)
    patch.setattr(cuda, "unavailable", _unavailable)
    cuda._kernels.cache_clear()
    cuda._longest_row.cache_clear()
    set_blocks(resident=3, running=1)
    play()


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("cuda_emulator"):
        emulate(pytest.MonkeyPatch())

"""The CUDA kernels compiled with other sizes than those of csrc/cuda/config.h, for the sweep.

    python -m bench.gpu_check.cuda_sizes FOLDER

leaves there one library for each; its name says what is other in it. Takes nvcc, and neither
torch nor a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIZES: tuple[dict[str, int], ...] = (
    {"kChunk": 4096},
    {"kChunk": 16384},
    {"kThreads": 128, "kBlocksFloat": 8},
    {"kThreads": 512, "kBlocksFloat": 2},
    {"kBlocksFloat": 3},
    {"kBlocksFloat": 5},
    {"kElementsEach": 4},
    {"kElementsEach": 16},
)


def with_sizes(config: str, sizes: dict[str, int]) -> str:
    """config.h with these in place of its own. Raises ValueError where it has no such size."""
    for name, value in sizes.items():
        config, count = re.subn(rf"\b{name} = \d+", f"{name} = {value}", config)
        if count != 1:
            raise ValueError(f"config.h defines {name} {count} times")
    return config


def load_cuda_library() -> Any:
    """adamem_fused/backends/cuda_library.py, without the package, which would import torch."""
    path = ROOT / "adamem_fused" / "backends" / "cuda_library.py"
    spec = importlib.util.spec_from_file_location("cuda_library", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_sizes(folder: Path, sizes: dict[str, int]) -> None:
    cuda_library = load_cuda_library()
    nvcc = cuda_library.find_nvcc()
    if nvcc is None:
        sys.exit("cuda_sizes: no nvcc was found")
    name = "-".join(f"{key}={value}" for key, value in sizes.items())
    with tempfile.TemporaryDirectory() as temporary:
        cuda_library.SOURCES = shutil.copytree(ROOT / "csrc", Path(temporary) / "csrc") / "cuda"
        config = cuda_library.SOURCES / "config.h"
        config.write_text(with_sizes(config.read_text(), sizes))
        cuda_library.compile_library(nvcc, folder / f"{name}.so", cuda_library.architectures(nvcc))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check.cuda_sizes", description="The CUDA kernels in other sizes."
    )
    parser.add_argument("folder", type=Path, help="for the libraries; others in it are removed")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for library in folder.glob("*.so"):
        library.unlink()
    for sizes in SIZES:
        print(f"Compiling with {sizes}", flush=True)
        compile_sizes(folder, sizes)


if __name__ == "__main__":
    main()

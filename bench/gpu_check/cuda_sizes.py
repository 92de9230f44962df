"""The CUDA kernels compiled with other sizes than those of csrc/cuda/config.h, for the sweep.

    python -m bench.gpu_check.cuda_sizes FOLDER

leaves there one library for each; its name says what is other in it. Takes nvcc and no GPU.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from adamem_fused.backends import cuda_library

CSRC = cuda_library.SOURCES.parent
SIZES: tuple[dict[str, int], ...] = (
    {"kChunk": 4096},
    {"kChunk": 1024},
    {"kThreads": 128, "kStepBlocksFloat": 6, "kBlocksFloat": 8},
    {"kStepBlocksFloat": 2},
    {"kShareOfL2": 2},
    {"kShareOfL2": 6},
)


def with_sizes(config: str, sizes: dict[str, int]) -> str:
    """config.h with these in place of its own. Raises ValueError where it has no such size."""
    for name, value in sizes.items():
        config, count = re.subn(rf"\b{name} = \d+", f"{name} = {value}", config)
        if count != 1:
            raise ValueError(f"config.h defines {name} {count} times")
    return config


def compile_sizes(folder: Path, sizes: dict[str, int]) -> None:
    nvcc = cuda_library.find_nvcc()
    if nvcc is None:
        sys.exit("cuda_sizes: no nvcc was found")
    name = ",".join(f"{key}={value}" for key, value in sizes.items())
    with tempfile.TemporaryDirectory() as temporary:
        sources = shutil.copytree(CSRC, Path(temporary) / "csrc") / "cuda"
        config = sources / "config.h"
        config.write_text(with_sizes(config.read_text(), sizes))
        vars(cuda_library).update(SOURCES=sources)
        cuda_library.compile_library(nvcc, folder / f"{name}.so", cuda_library.architectures(nvcc))


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for sizes in SIZES:
        print(f"Compiling with {sizes}", flush=True)
        compile_sizes(folder, sizes)


if __name__ == "__main__":
    main()

"""What the numbers depend on: versions, the CPU and its caches."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import adamem_fused

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def environment() -> dict[str, str]:
    """Versions and the machine, for a file of results."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adamem_fused": adamem_fused.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    """The CPU's name as Linux has it, and else what platform knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def cache_sizes(folder: Path = _CACHES) -> dict[int, int]:
    """Bytes of the first core's data caches by level, as Linux has them; {} if it has none."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            sizes[int((index / "level").read_text())] = int(size[:-1]) * _UNITS[size[-1]]
    return sizes

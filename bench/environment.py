"""What the numbers depend on: versions, the CPU and its caches."""

from __future__ import annotations

import platform
import re
import subprocess
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


def cpu_clocks() -> dict[str, str]:
    """MHz of each core at this moment, as Linux has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    clocks = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu MHz")]
    return {f"core {core}": f"{clock} MHz" for core, clock in enumerate(clocks)}


def gpu_clocks() -> dict[str, str]:
    """The first GPU's clocks at this moment, as nvidia-smi has them."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def folder_name(device: str) -> str:
    """A device's name as the name of a folder of results."""
    return re.sub(r"\W+", "-", device).strip("-").lower()

"""All that the check asks of torch.cuda. A run without a GPU puts something else in its place."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

device = torch.device("cuda")


def is_available() -> bool:
    return torch.cuda.is_available()


def describe() -> dict[str, Any]:
    """The device, for a file of results; sizes in bytes."""
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def multiprocessors() -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def free_bytes() -> int:
    """Memory that is free once what nobody uses is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def synchronize() -> None:
    torch.cuda.synchronize()


def mark() -> Any:
    """A moment in the current stream."""
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Between two marks that the device has come to."""
    return float(first.elapsed_time(second)) / 1e3


def capture(work: Callable[[], object]) -> Callable[[], object]:
    """The work as a CUDA graph: its replay. Capturing does not do the work."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def profiled() -> Iterator[None]:
    """What a profiler that waits for a start is to look at."""
    synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    yield
    synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]

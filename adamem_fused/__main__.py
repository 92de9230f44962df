"""Prints what is there: versions, devices, and each backend or why it is missing.

python -m adamem_fused
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from adamem_fused import __version__
from adamem_fused.backends import BACKENDS, Backend, cpu, ops


def devices() -> Iterator[tuple[torch.device, str]]:
    """The devices that torch sees, with their names."""
    capability = torch.backends.cpu.get_cpu_capability()
    yield (
        torch.device("cpu"),
        f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads",
    )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else accelerator.type
        yield device, name


def status(backend: Backend, device: torch.device) -> str:
    """Whether the backend is there for tensors on `device`, or why not."""
    reason = backend.unavailable(device)
    if reason is not None:
        return f"missing: {reason}"
    if backend is not cpu:
        return "available"
    caller = "the C++ extension"
    if ops.unavailable is not None:
        caller = f"ctypes, which is slower with many small tensors: {ops.unavailable}"
    return f"available: {cpu.kernels()} kernels, called by {caller}"


def main() -> None:
    print(f"adamem_fused {__version__}")
    print(f"torch        {torch.__version__}")
    print(f"Python       {platform.python_version()}, {platform.system()}")
    for device, description in devices():
        print(f"\n{device}: {description}")
        for backend in BACKENDS.values():
            print(f"  {backend.name:<10} {status(backend, device)}")


if __name__ == "__main__":
    main()

"""What timing needs of a device: its caches and memory, and the measurements of a step.

Cpu and Cuda have the same methods. Cuda has not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from bench.environment import cache_sizes, cpu_clocks, cpu_model, gpu_clocks
from bench.kernels.sides import Side

# Where the system does not say.
USUAL_L2, USUAL_LAST_LEVEL = 2**19, 2**25
COPIES = 10


class Sample(NamedTuple):
    """Seconds of a step, the medians of some.

    Attributes:
        step: until its work is done.
        host: until step() returned; on the CPU the same.
        kernel: of the device alone, replayed as a CUDA graph; None where it cannot be told.
    """

    step: float
    host: float
    kernel: float | None


class Timed(Protocol):
    """Work that is timed: a side's step, say.

    Attributes:
        replays: of the work captured as a CUDA graph, if it was.
    """

    replays: list[Callable[[], None]]

    def next_gradients(self) -> None:
        """What comes before the work, and is not timed."""

    def step(self) -> object:
        """The work."""


class Device(Protocol):
    """A device, and how a step is measured on it."""

    device: torch.device
    name: str
    l2: int  # bytes of the L2 caches of the cores that work; 0 where it is the last level
    last_level: int

    def free_bytes(self) -> int:
        """Memory that is free."""

    def limited_memory(self) -> contextlib.AbstractContextManager[None]:
        """Within it, running out of memory is an exception."""

    def flush(self) -> None:
        """Streams over more than the caches hold."""

    def bandwidth(self, held: int, cold: bool) -> float:
        """Bytes a second in `held` bytes of memory, of the faster of `streams`."""

    def prepare(self, side: Side) -> None:
        """What measuring a side needs first; it has taken steps already."""

    def measure(self, side: Timed, steps: int, cold: bool) -> Sample:
        """Times some steps; with `cold`, the caches are flushed before each."""

    def temporary_bytes(self, side: Side) -> int | None:
        """Memory that a step takes for its time, or None where it cannot be told."""

    def launches(self, side: Side) -> int:
        """Kernels that a step launches; on the CPU, operators that call no other."""

    def clocks(self) -> dict[str, str]:
        """Clock rates at this moment."""


def find_device(name: str) -> Device:
    return Cuda() if name == "cuda" else Cpu()


def streams(held: int, device: torch.device) -> list[tuple[int, Callable[[], object]]]:
    """Bytes that are read and written, and work that does it, in `held` bytes of memory.

    A copy, and a change in place: a CPU reads what it is about to write, which is work that
    is not counted of a copy, and that an optimizer has to do anyway.
    """
    source = torch.ones(max(held // 8, 1), device=device)
    target = source.clone()

    def in_place() -> None:
        source.neg_()
        target.neg_()

    return [(2 * source.nbytes, lambda: target.copy_(source)), (4 * source.nbytes, in_place)]


def _profiled(side: Side, activities: list[ProfilerActivity]) -> list[Any]:
    """The profiler's events of a step, by their start.

    As it recorded them: what `events()` makes of them takes seconds for thousands.
    """
    side.next_gradients()
    profiler = profile(activities=activities)
    with profiler:
        side.step()
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    return sorted(events, key=lambda event: event.start_ns())


class Cpu:
    """The CPU, with torch.get_num_threads() threads."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        sizes = cache_sizes()
        self.device = torch.device("cpu")
        self.name = f"{cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
        self.l2 = sizes.get(2, USUAL_L2) * threads
        self.last_level = sizes[max(sizes)] if sizes else USUAL_LAST_LEVEL
        self._flushed = torch.ones(4 * self.last_level // 4)

    def free_bytes(self) -> int:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    @contextlib.contextmanager
    def limited_memory(self) -> Iterator[None]:
        # Linux promises more than it has, and then ends the process that uses it.
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _status_bytes("VmData") + self.free_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def flush(self) -> None:
        self._flushed.neg_()

    def bandwidth(self, held: int, cold: bool) -> float:
        found = []
        for moved, work in streams(held, self.device):
            work()
            times = []
            for _ in range(COPIES):
                if cold:
                    self.flush()
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            found.append(moved / statistics.median(times))
        return max(found)

    def prepare(self, side: Side) -> None:
        pass

    def measure(self, side: Timed, steps: int, cold: bool) -> Sample:
        times = []
        for _ in range(steps):
            side.next_gradients()
            if cold:
                self.flush()
            start = time.perf_counter()
            side.step()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        return Sample(seconds, seconds, None)

    def temporary_bytes(self, side: Side) -> int | None:
        side.next_gradients()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            return None
        before = _status_bytes("VmHWM")
        side.step()
        return _status_bytes("VmHWM") - before

    def launches(self, side: Side) -> int:
        events = _profiled(side, [ProfilerActivity.CPU])
        operators = [event for event in events if "::" in event.name()]
        # One that has ended before the next begins calls no other.
        return len(operators) - sum(bool(b.start_ns() < a.end_ns()) for a, b in pairwise(operators))

    def clocks(self) -> dict[str, str]:
        return cpu_clocks()


def _status_bytes(key: str) -> int:
    """A size from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 2**10
    raise KeyError(key)


class Cuda:
    """The current GPU. Not yet run on one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self.l2 = 0
        self.last_level = properties.L2_cache_size
        self._flushed = torch.ones(4 * self.last_level // 4, device=self.device)

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def limited_memory(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # torch.OutOfMemoryError as it is

    def flush(self) -> None:
        self._flushed.neg_()

    def _events_seconds(self, work: Callable[[], object], cold: bool) -> float:
        """Seconds of some work on the device, between two events."""
        if cold:
            self.flush()
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def bandwidth(self, held: int, cold: bool) -> float:
        found = []
        for moved, work in streams(held, self.device):
            work()
            times = [self._events_seconds(work, cold) for _ in range(COPIES)]
            found.append(moved / statistics.median(times))
        return max(found)

    def prepare(self, side: Side) -> None:
        """Captures a step as a graph for either set of gradients, where that is possible."""
        try:
            for _ in range(2):
                side.next_gradients()
                side.step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    side.step()
                side.replays.append(graph.replay)
        except RuntimeError:
            side.replays.clear()  # it reads from the device, say
            torch.cuda.synchronize()

    def measure(self, side: Timed, steps: int, cold: bool) -> Sample:
        step_times, host_times, kernel_times = [], [], []
        for _ in range(steps):
            side.next_gradients()
            if cold:
                self.flush()
            torch.cuda.synchronize()
            start = time.perf_counter()
            side.step()
            host_times.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            step_times.append(time.perf_counter() - start)
        for replay in islice(cycle(side.replays), steps):
            side.next_gradients()  # for what changes beside them
            kernel_times.append(self._events_seconds(replay, cold))
        return Sample(
            statistics.median(step_times),
            statistics.median(host_times),
            statistics.median(kernel_times) if kernel_times else None,
        )

    def temporary_bytes(self, side: Side) -> int | None:
        side.next_gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        side.step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def launches(self, side: Side) -> int:
        events = _profiled(side, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
        names = [event.name() for event in events]
        return sum("LaunchKernel" in name or "LaunchCooperativeKernel" in name for name in names)

    def clocks(self) -> dict[str, str]:
        return gpu_clocks()

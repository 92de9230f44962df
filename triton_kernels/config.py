"""Block sizes, warps and stages by device: one table, not tuned in the user's run."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    chunk: int  # elements that a program of the stats and apply kernels walks over
    block: int  # elements it holds at a time; a divisor of chunk
    num_warps: int
    num_stages: int
    partials: int  # partial sums that are added at a time
    programs: int  # of the step kernel, on each multiprocessor


# Predicted, not measured yet: `python -m bench.gpu_check` measures. A block of 8 elements a
# thread is one 16-byte access of bfloat16 and two of float32. Stages are for loads through
# shared memory; 1 is none, as the programs side by side hide the latency.
# By (vendor, major compute capability); an unknown device takes its vendor's last line.
CONFIGS: dict[tuple[str, int], Config] = {
    ("cuda", 8): Config(
        chunk=2048, block=1024, num_warps=4, num_stages=1, partials=2048, programs=4
    ),
    ("cuda", 9): Config(
        chunk=2048, block=1024, num_warps=4, num_stages=1, partials=2048, programs=4
    ),
    ("cuda", 10): Config(
        chunk=2048, block=1024, num_warps=4, num_stages=1, partials=2048, programs=4
    ),
    # A warp has 64 threads here.
    ("hip", 9): Config(
        chunk=4096, block=2048, num_warps=4, num_stages=1, partials=2048, programs=4
    ),
    # Triton's interpreter takes milliseconds a program, whatever its size.
    ("interpreter", 0): Config(
        chunk=16384, block=16384, num_warps=1, num_stages=1, partials=2048, programs=2
    ),
}


def config_for(vendor: str, major: int) -> Config:
    """The line of the table for a device; of two that fit, the nearest older one."""
    majors = [m for v, m in CONFIGS if v == vendor]
    return CONFIGS[vendor, max((m for m in majors if m <= major), default=min(majors))]

"""Block sizes, warps and stages by device: one table, not tuned in the user's run."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    chunk: int  # elements that a program walks over at a time
    block: int  # elements it holds at a time, half as many of float64; a divisor of chunk
    num_warps: int
    num_stages: int
    partials: int  # partial sums that are added at a time
    programs: int  # of the step kernel, on each multiprocessor
    registers: int | None = None  # that a thread of these may take; None: the compiler's choice

    def step_options(self, float64: bool) -> dict[str, int]:
        """How the step kernel is compiled and launched."""
        # Left to choose, the compiler may put a register on the stack so that more programs would
        # fit than there are. Arithmetic in float64 takes some 160, for 3 programs.
        if self.registers is None or float64:
            return {"num_warps": self.num_warps}
        return {"num_warps": self.num_warps, "maxnreg": self.registers}

    def walk(self, float64: bool) -> dict[str, int]:
        """The constants of the kernels that walk over chunks."""
        block = self.block // 2 if float64 else self.block
        return {"CHUNK": self.chunk, "BLOCK": block, "STAGES": self.num_stages}


# Predicted from data sheets and from what the compiler reports, not measured yet: `python -m
# bench.gpu_check` measures.
#
# A block of 8 elements a thread is one 16-byte access of bfloat16 and two of float32, to each of
# g, d, v and x: 16 KB a program in float32. By Little's law an H100 (3.35 TB/s, some 0.7 us from
# memory, 132 multiprocessors) wants 18 KB under way on each multiprocessor; 4 programs ask for 64.
# Compiled for sm_90, AM-AdamW's step takes 116 to 125 registers a thread in float32 and with 16-bit
# types, and 4 programs of 128 threads may take 128. Stages are for loads through shared memory; 1
# is none, as the programs side by side hide the latency.
#
# In the step kernel the sums are ahead of the updates by a chunk for each program: 528 of 32 KB,
# 17 of an H100's 50 MB of L2. That is about how long it takes a tensor's sums to be complete and
# its beta to be there. The rest of L2 is for the tensor itself and for what is written: a tensor
# up to 30 MB of g, d, v and x (a 1,400 x 1,400 matrix) is predicted to be read from memory once,
# 28 bytes an element; one far beyond, twice, 44. With chunks of twice the size the sums would be
# ahead by two thirds of L2. A chunk's set-up (an item, a tensor's line of the tables, scalars in
# float64: some 2 us) lies beside the other programs' 5 us or so for a chunk.
#
# The partial sums of 2^28 elements, 131,072, are added by one program, while all others wait: some
# 70 us of the step's 3.5 ms. More of them at a time, or a loop that is unrolled, takes registers
# that some of the step kernels do not have.
#
# By (vendor, major compute capability); an unknown device takes its vendor's last line.
CONFIGS: dict[tuple[str, int], Config] = {
    ("cuda", 8): Config(
        chunk=2048, block=1024, num_warps=4, num_stages=1, partials=512, programs=4, registers=128
    ),
    ("cuda", 9): Config(
        chunk=2048, block=1024, num_warps=4, num_stages=1, partials=512, programs=4, registers=128
    ),
    ("cuda", 10): Config(
        chunk=2048, block=1024, num_warps=4, num_stages=1, partials=512, programs=4, registers=128
    ),
    # A warp has 64 threads here, and takes some 210 of 512 registers. The sums of an MI300X's 304
    # multiprocessors are ahead by 40 of the 256 MB of its last-level cache.
    ("hip", 9): Config(chunk=4096, block=2048, num_warps=4, num_stages=1, partials=512, programs=2),
    # Triton's interpreter takes milliseconds a program, whatever its size, one after the other.
    ("interpreter", 0): Config(
        chunk=16384, block=16384, num_warps=1, num_stages=1, partials=512, programs=2
    ),
}


def config_for(vendor: str, major: int) -> Config:
    """The line of the table for a device; of two that fit, the nearest older one."""
    majors = [m for v, m in CONFIGS if v == vendor]
    return CONFIGS[vendor, max((m for m in majors if m <= major), default=min(majors))]

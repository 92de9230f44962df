"""Block sizes and warps by device: one table, not tuned in the user's run."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Config(NamedTuple):
    chunk: int  # elements that a program walks over
    block: int  # elements it holds at a time, half as many of float64; a divisor of chunk
    num_warps: int
    partials: int  # partial sums that are added at a time
    programs: int  # on each multiprocessor; so many are launched of finish
    longest_row: int  # elements that a program can hold of a row; half as many of float64
    registers: int | None = None  # that a thread may take; None: the compiler's choice

    def block_of(self, arithmetic: tl.dtype) -> int:
        return self.block // 2 if arithmetic == tl.float64 else self.block

    def options(self, arithmetic: tl.dtype) -> dict[str, int]:
        """How begin and finish are compiled."""
        if self.registers is None or arithmetic == tl.float64:
            return {"num_warps": self.num_warps}
        return {"num_warps": self.num_warps, "maxnreg": self.registers}

    def tile_of(self, row: int, arithmetic: tl.dtype) -> tuple[int, dict[str, int]]:
        """How many elements of rows of this length a program holds; how it is compiled.

        As many as of a block; of rows that are longer twice as many a thread.
        """
        block, options = self.block_of(arithmetic), self.options(arithmetic)
        tile = max(block, row)
        return tile, {**options, "num_warps": options["num_warps"] * max(1, tile // (2 * block))}


# Predicted from data sheets and from what the compiler reports; what an H100 has to say is in
# bench/results/nvidia-h100-80gb-hbm3/notes.md. `python -m
# bench.gpu_check` measures.
#
# A block of 8 elements a thread is one 16-byte access of bfloat16 and two of float32, to each of
# g, d, v and x: 16 KB a program in float32. By Little's law an H100 (3.35 TB/s, some 0.7 us from
# memory, 132 multiprocessors) wants 18 KB under way on each multiprocessor; 4 programs ask for 64.
# Compiled for sm_90, begin and finish take up to 122 registers a thread in float32 and with 16-bit
# types, and 4 programs of 128 threads may take 128. AM-AdamW with the guess is 36 instructions an
# element (30 of sums alone), a repair 21, an update 27: at 128 lanes a clock a sixth of the time
# that the bytes take.
#
# Bytes an element in float32: 28 where the guess holds, and 24 more where it has missed; 44 where
# none is made, as the sums come first; 28 for AM-SGD, or 32 with weight decay. A tensor of one
# chunk is read from memory once in any case. Of the others finish finds in L2 (50 MB) what begin
# came to last, as it walks backwards.
#
# With 8,192 elements a chunk is 229 KB of traffic, some 36 us beside three others, and what it
# takes beside its elements (its place, coefficients, sums over a block, the counter: some 3 us) is
# hidden by these. The partial sums of 2^28 elements, 32,768, are added 1,024 at a time by one
# program: some 25 us of the step's 2.5 ms. begin's last wave is some 1 % of it, and finish has
# looked at 32,768 chunks that are done within 5 us. In all a step is predicted to reach 95 % of the
# bandwidth of a copy, by its own bytes. Twice the chunk leaves a matrix of a million elements on
# half of the multiprocessors; half of it doubles the partial sums.
#
# Rows: 28 bytes an element in float32 and 22 with 16-bit parameters and gradients, with either
# plane, and 12 a row; through the seam up to 16 and 12 more an element, as each half reads. 27
# instructions of float32 an element. Up to 1,024 elements, of one row or of several, are 8 a
# thread; compiled for sm_90 they take up to 128 registers, and four programs have 64 KB under way
# as begin has: the same share of the bandwidth is predicted, 95 %. Of longer rows a thread holds 16
# elements in as many registers: two programs of 256 threads where a row has 4,096, and one of 512
# where it has 8,192 (128 KB). While that one computes, for a fourth of the time that its bytes
# take, nothing else is read: some 80 % of the bandwidth is predicted. 16,384 do not fit: 1,024
# threads have 64 registers each, and would put 82 more into local memory. Where a length is not a
# power of two the rest of a tile idles: no bytes, but up to half of the registers. Rows that no
# program holds are ordinary units; where the guess misses, or with the "anchored" plane, they are
# read twice as other tensors are.
#
# In few bits: 14 bytes an element where all is bfloat16, and 12 more where the guess has missed;
# with int8 memories 10, and 9 more. Random bits, rounding and codes are 40 to 80 instructions more
# an element: at 128 lanes a clock as long as 14 bytes take, so a little less of the bandwidth is
# predicted. Compiled for sm_90 a thread takes the 128 registers that it may, and has in L1 none of
# rows of up to 1,024 elements, and up to 340 bytes of longer ones; elsewhere up to 80 bytes, of
# scalars, and with codes up to 330, up to 4 % of begin's and finish's instructions.
#
# Squared norms: 4 bytes an element in float32, 2 with 16-bit types, and 8 a chunk. Compiled for
# sm_90 a thread takes 44 registers, or 40 with 16-bit types: 10 programs have 40 KB under way, or
# 12 of them 24 KB, of which a fifth waits for tables and sums. Predicted on an H100, where there is
# 256 MB or more: 90 % of the bandwidth of reading, and 85 % with 16-bit types.
#
# By (vendor, major compute capability); an unknown device takes its vendor's last line.
CONFIGS: dict[tuple[str, int], Config] = {
    **{
        ("cuda", major): Config(
            chunk=8192,
            block=1024,
            num_warps=4,
            partials=1024,
            programs=4,
            longest_row=8192,
            registers=128,
        )
        for major in (8, 9, 10)
    },
    # A warp has 64 threads here.
    ("hip", 9): Config(
        chunk=8192,
        block=2048,
        num_warps=4,
        partials=1024,
        programs=2,
        longest_row=8192,
    ),
    # Triton's interpreter takes milliseconds a program, whatever its size, one after the other.
    ("interpreter", 0): Config(
        chunk=16384,
        block=16384,
        num_warps=1,
        partials=512,
        programs=2,
        longest_row=16384,
    ),
}


def config_for(vendor: str, major: int) -> Config:
    """The line of the table for a device; of two that fit, the nearest older one."""
    majors = [m for v, m in CONFIGS if v == vendor]
    return CONFIGS[vendor, max((m for m in majors if m <= major), default=min(majors))]

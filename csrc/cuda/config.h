// Sizes, and what is predicted of them, from data sheets and from what the compiler reports. What
// an H100 has to say is in bench/results/nvidia-h100-80gb-hbm3/notes.md; `python -m
// bench.gpu_check` measures.
//
// A thread takes 16 bytes of each list at a time: with float32, 4 elements and 64 bytes of g,
// d, v and x. With 16-bit types it takes 8 elements, in two spans of 4: 16 bytes at a time of
// float32 lists and 8 of the others, so that a warp's access to any list takes whole sectors. By
// Little's law an H100 (3.35 TB/s, some 0.7 us from memory, 132 multiprocessors) wants 18 KB under
// way on each multiprocessor; 4 blocks of 256 threads ask for 64 KB, and 3 blocks with 16-bit
// types, of which a thread takes 8 elements, for 72 KB.
//
// A chunk is a block's whole work in begin. With float32 8,192 elements are 8 accesses a thread to
// each list, in some 40 us where 4 blocks share a multiprocessor's part of the bandwidth. The
// tables before them and the sums behind them take 3 us, in which the other blocks have more under
// way than is wanted. Shorter chunks would spend more on that, longer ones leave multiprocessors
// without work at a launch's end; a tensor of one chunk has its second reading, if there is one,
// from L2.
//
// AM-AdamW with float32 moves 28 bytes an element where beta is what was guessed, and 24 more where
// it is not; "anchored", whose sums are taken first, 44. It takes some 46 instructions an element
// in begin and 36 in a repair: a fifth of what an H100 can issue at that bandwidth. Launches,
// partial sums (at most 11 us, for 2^28 elements in one tensor) and the last blocks cost 2 to 3 %
// of a step of 2.5 ms. Predicted: at least 88 % of the bandwidth of a copy, by bytes counted so.
//
// Rows that have betas of their own are read and written once too, and hold what the update takes
// on chip meanwhile: 28 bytes an element with float32 and 22 with 16-bit parameters and gradients,
// on either plane, whatever beta is; AM-SGD 20 and 14. 16 bytes an element are held (AM-SGD: 12). A
// thread has 8 elements of a row, or 4 to 8: so 1,024 threads, as many as registers allow, hold
// 128 KB of the 227 KB that an H100's multiprocessor has, and ask for 64 KB at a time. With 16-bit
// types it is 640 threads and 60 KB, in blocks of 128 for rows of 768 elements. A block can hold
// rows of 14,336 elements on an H100, of 10,240 on an A100, of 6,144 where it has 99 KB, and of
// 3,840 where it has 64. The longest are one block to a multiprocessor, which reads nothing while
// it adds up its sums and writes: some 2 us of 16. While a row is taken its block's next one is on
// its way from memory to L2, so that of a chunk's rows the first alone is waited for at full
// length. An element takes some 50 instructions, and a row's coefficients, sums and beta 300 a
// thread, or 40 an element: 40 % of what an H100 can issue at that bandwidth with float32, and half
// with 16-bit types. Some 70 of them are in float64, which GPUs for graphics do at 1/32 or 1/64 of
// the rate: there they are the limit. Predicted of an H100: 92 % of the bandwidth of a copy with
// float32 and rows of 768 to 4,096 elements (it was 82, without what is asked for ahead, and with
// exact square roots and quotients, one element after the other), 80 % with 16-bit types (58), 75 %
// with 14,336 elements; rows of a number of elements that is no multiple of a vector are accessed
// element by element, and may take twice as long.
//
// State in few bits is read once by rows, and where AM-AdamW guesses: with bfloat16 memories 20
// bytes an element, 14 where parameters and gradients are too, and 18 and 12 more where beta is
// another; with codes 16 and 10, and 15 and 9 more. Else it is read twice: AM-SGD 16 with bfloat16
// and 13 with codes (10 and 8 by row). Random bits take some 12 instructions an element for both
// memories and 12 for the parameter. A guess takes 70 instructions an element with float32
// parameters and 100 with bfloat16: 35 and 70 % of what an H100 issues at that bandwidth; with
// codes some 195, by the length of their code, 20 % more than it issues. Predicted, over 28 bytes
// with float32: 0.75 of the time with bfloat16 memories, 0.60 where parameters and gradients are
// too (0.55 by row), 0.80 with codes: 1.13 was measured of two readings, of 275 instructions. Where
// there are codes registers allow for 2 blocks, which ask for 24 KB.
//
// Squared norms read gradients once, 4 bytes an element with float32 and 2 with 16-bit types, and
// write 8 bytes a chunk. A thread asks for two times 16 bytes, and takes 32 registers at most: 8
// blocks, all the threads that a multiprocessor has (6 on graphics GPUs, 4 on those of 7.5), ask
// for 64 KB. A chunk's 32 KB take 10 us of an eighth of the bandwidth, or 5 us with 16-bit types;
// the tables before them, 3 loads that wait for each other, and the sum behind them take some 2 us,
// in which 5 other blocks have 40 KB under way or more. Some 4 instructions an element are an
// eighth of what an H100 can issue at that bandwidth, and 5 with 16-bit types a third. In float64
// are 6 additions for a thread's 32 elements: on GPUs for graphics a sixth of the time, with 16-bit
// types. A block a tensor then adds up its chunks: 3 us, and 11 for 2^28 elements in one tensor, of
// 320 us and more. Predicted on an H100: at least 90 % of the bandwidth of reading, where there are
// 256 MB or more. The chunks are taken backwards: begin, which comes next, finds up to 50 MB in L2.
#pragma once

#include <cstdint>

namespace am::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kChunk = 8192;

// How many elements a thread has of a row, of those that the row may have at most.
constexpr int kElementsEach = 8;

// Blocks on a multiprocessor that registers have to allow for (65,536 of them): with float32,
// with 16-bit types, and where arithmetic is in float64, dtypes are known at run time only, or
// there are codes.
constexpr int kBlocksFloat = 4;
constexpr int kBlocks16Bit = 3;
constexpr int kBlocksWide = 2;
// And of squared norms: what the compiler takes, which is not told.
constexpr int kBlocksNorm = 8;

}  // namespace am::cuda

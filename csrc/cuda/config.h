// Sizes. Predicted from data sheets and from what the compiler reports, not measured yet:
// `python -m bench.gpu_check` measures.
//
// A thread takes 16 bytes of each list at a time: with float32, 4 elements and 64 bytes of g,
// d, v and x. With 16-bit types it takes 8 elements, in two spans of 4: 16 bytes at a time of
// float32 lists and 8 of the others, so that a warp's access to any list takes whole sectors. By
// Little's law an H100 (3.35 TB/s, some 0.7 us from memory, 132 multiprocessors) wants 18 KB under
// way on each multiprocessor; 3 blocks of 256 threads ask for 48 KB, and 2 blocks with 16-bit
// types, of which a thread takes 8 elements, for as much.
//
// A chunk is what a block does between two looks at the tables. 2,048 elements of float32 are
// two accesses a thread to each list. Its set-up (an item, a tensor's line of the tables: about
// 0.5 us) lies beside the other blocks' 4 us or so for a chunk.
//
// In the one launch that does a whole step the sums are ahead of the updates by what takes a
// third of L2: on an H100 (50 MB) 16.7 MB, or 508 chunks of float32, more than there are blocks
// (396), so that a tensor's sums and beta (two chunks' time, and 2 us) are ready when its
// updates begin. The other two thirds are for the tensor itself and for what is written. A
// tensor up to 30 MB (a 1,400 x 1,400 matrix in float32) is predicted to be read from memory
// once: 28 bytes an element; one far beyond, twice: 44, of which L2 spares 16 for as many
// elements as it still holds at the tensor's end.
#pragma once

#include <cstdint>

namespace am::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kChunk = 8192;

// Blocks on a multiprocessor that registers have to allow for (65,536 of them): with float32,
// with 16-bit types, and where arithmetic is in float64 or dtypes are known at run time only.
constexpr int kBlocksFloat = 4;
constexpr int kBlocks16Bit = 3;
constexpr int kBlocksWide = 2;

}  // namespace am::cuda

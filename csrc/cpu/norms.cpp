// The squared norms of gradients.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "library.h"
#include "threads.h"

namespace am::cpu {
namespace {

// A partial sum covers this many elements.
constexpr int64_t kChunk = 1 << 14;
// Tensors up to this size are done where they are looked up, by 256 for a thread.
constexpr int64_t kSmall = 1 << 12;

struct Chunk {
  int64_t tensor, begin, numel;
  double squares;
};

double squares(const Elements& elements, int64_t begin, int64_t n) {
  const auto dtype = static_cast<DType>(elements.dtype);
  return kernels().squares[dtype](static_cast<const char*>(elements.data) + begin * bytes_of(dtype),
                                  n);
}

}  // namespace
}  // namespace am::cpu

void adamem_cpu_squares(const am::cpu::Elements* elements, int64_t size,
                        const am::cpu::Threads* threads, double* result) {
  using namespace am::cpu;
  for_each_tensor(*threads, size, [&](int64_t i) {
    const bool is_small = elements[i].numel <= kSmall;
    result[i] = is_small ? squares(elements[i], 0, elements[i].numel) : 0.0;
  });
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t numel = elements[i].numel;
    for (int64_t begin = 0; numel > kSmall && begin < numel; begin += kChunk)
      chunks.push_back({i, begin, std::min(kChunk, numel - begin), 0.0});
  }
  for_each(*threads, static_cast<int64_t>(chunks.size()), 1, [&](int64_t k) {
    Chunk& chunk = chunks[k];
    chunk.squares = squares(elements[chunk.tensor], chunk.begin, chunk.numel);
  });
  for (const Chunk& chunk : chunks) result[chunk.tensor] += chunk.squares;
}

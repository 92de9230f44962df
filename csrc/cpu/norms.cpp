#include "norms.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace am::cpu {
namespace {

using at::Tensor;

// A tensor's elements, in the order in which they lie in memory.
struct Elements {
  DType dtype = kFloat32;
  int64_t numel = 0;
  const char* data = nullptr;
  Tensor copy;  // of what does not lie densely

  void open(const Tensor& t, size_t i) {
    dtype = dtype_of(t, "grad", i);
    TORCH_CHECK_TYPE(t.layout() == at::kStrided, "grad of tensor ", i, " is ", t.layout(),
                     "; it has to be dense");
    TORCH_CHECK_VALUE(t.is_cpu(), "grad of tensor ", i, " is on ", t.device(),
                      ", its parameter on the CPU");
    numel = t.numel();
    const bool direct = t.is_non_overlapping_and_dense();
    if (!direct) copy = t.contiguous();
    data = static_cast<const char*>((direct ? t : copy).const_data_ptr());
  }

  double squares(int64_t begin, int64_t n) const {
    return kernels().squares[dtype](data + begin * bytes_of(dtype), n);
  }
};

// A partial sum covers this many elements.
constexpr int64_t kChunk = 1 << 14;
// Tensors up to this size are done where they are looked up, by 256 for a thread.
constexpr int64_t kSmall = 1 << 12;

struct Chunk {
  size_t tensor;
  int64_t begin, numel;
  double squares;
};

}  // namespace

Tensor squared_norms(const TensorRefs& tensors) {
  const size_t n = tensors.size();
  const Tensor result = at::empty({static_cast<int64_t>(n)}, at::kDouble);
  double* const norms = result.mutable_data_ptr<double>();
  std::vector<Elements> elements(n);
  for_each_tensor(n, [&](size_t i) {
    if (i + 16 < n) prefetch_impl(tensors[i + 16]);
    if (i + 8 < n) prefetch_storage(tensors[i + 8]);
    elements[i].open(tensors[i], i);
    norms[i] = elements[i].numel <= kSmall ? elements[i].squares(0, elements[i].numel) : 0.0;
  });
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < n; ++i) {
    const int64_t numel = elements[i].numel;
    for (int64_t begin = 0; numel > kSmall && begin < numel; begin += kChunk)
      chunks.push_back({i, begin, std::min(kChunk, numel - begin), 0.0});
  }
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k)
      chunks[k].squares = elements[chunks[k].tensor].squares(chunks[k].begin, chunks[k].numel);
  });
  for (const Chunk& chunk : chunks) norms[chunk.tensor] += chunk.squares;
  return result;
}

}  // namespace am::cpu

#include "norms.h"

#include <ATen/ops/empty.h>

#include <vector>

#include "tensors.h"

namespace am::cpu {
namespace {

using at::Tensor;

// A tensor's elements, in the order in which they lie in memory. copy: of what does not lie
// densely.
Elements open_elements(const Tensor& t, Tensor& copy, size_t i) {
  const DType dtype = dtype_of(t, "grad", i);
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, "grad of tensor ", i, " is ", t.layout(),
                   "; it has to be dense");
  TORCH_CHECK_VALUE(t.is_cpu(), "grad of tensor ", i, " is on ", t.device(),
                    ", its parameter on the CPU");
  const bool direct = t.is_non_overlapping_and_dense();
  if (!direct) copy = t.contiguous();
  return {(direct ? t : copy).const_data_ptr(), dtype, t.numel()};
}

}  // namespace

Tensor squared_norms(const TensorRefs& tensors) {
  const size_t n = tensors.size();
  const Tensor result = at::empty({static_cast<int64_t>(n)}, at::kDouble);
  std::vector<Elements> elements(n);
  std::vector<Tensor> copies(n);
  for_each_tensor(n, [&](size_t i) {
    if (i + 16 < n) prefetch_impl(tensors[i + 16]);
    if (i + 8 < n) prefetch_storage(tensors[i + 8]);
    elements[i] = open_elements(tensors[i], copies[i], i);
  });
  const Threads threads = torch_threads();
  adamem_cpu_squares(elements.data(), static_cast<int64_t>(n), &threads,
                     result.mutable_data_ptr<double>());
  return result;
}

}  // namespace am::cpu

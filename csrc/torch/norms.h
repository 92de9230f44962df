// The squared norms of gradients on the CPU. Two callers, as those of step.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "tensor_refs.h"

namespace am::cpu {

// The sum of each tensor's squares, [tensors] float64. The same bits with any number of threads.
at::Tensor squared_norms(const TensorRefs& tensors);

}  // namespace am::cpu

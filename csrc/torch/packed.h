// The table of what a step is given of tensors that are stored in few bits: `Packed` of
// adamem_fused/backends/batch.py, checked as it is there.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../cpu/library.h"
#include "tensor_refs.h"

namespace am::cpu {

template <size_t kMemories>
class PackedTable {
 public:
  // packed: the scales of each memory, n tensors, and the remainders; or nothing.
  PackedTable(const TensorRefs& packed, const std::optional<at::Tensor>& rounding, size_t n)
      : packed_(packed), n_(n) {
    if (packed.size() == 0 && !rounding.has_value()) return;
    TORCH_CHECK_VALUE(packed.size() == (kMemories + 1) * n, "packed holds ", packed.size(),
                      " tensors; it has to hold ", kMemories + 1, " for each of ", n);
    TORCH_CHECK_VALUE(
        rounding.has_value() && rounding->is_cpu() && rounding->scalar_type() == at::kLong &&
            rounding->dim() == 2 && rounding->size(0) == kRows &&
            rounding->size(1) == static_cast<int64_t>(n) && rounding->is_contiguous(),
        "rounding has to be a contiguous int64 CPU tensor of shape [", int{kRows}, ", ", n, "]");
    rounding_ = rounding->const_data_ptr<int64_t>();
    tensors_.resize(n);
  }

  // Opens tensor i, and returns its row here; or null, where all of it is stored as in other
  // batches. by_row: each row has a beta.
  const PackedTensor* open(StepTensor& tensor, const at::Tensor& param, const at::Tensor& grad,
                           const at::Tensor* const (&memories)[kMemories],
                           const char* const (&names)[kMemories], bool by_row, size_t i) {
    if (rounding_ == nullptr) return nullptr;
    const at::Tensor& remainder = packed_[kMemories * n_ + i];
    bool is_low = remainder.numel() > 0 || row(kRounds, i) != 0;
    for (const at::Tensor* memory : memories) is_low = is_low || format_of(*memory) != kFloats;
    if (!is_low) return nullptr;

    PackedTensor& packed = tensors_[i];
    TORCH_CHECK_TYPE(param.scalar_type() == at::kFloat || param.scalar_type() == at::kBFloat16,
                     "param of tensor ", i, " is ", param.scalar_type(),
                     "; what is stored in few bits has to be float32 or bfloat16");
    TORCH_CHECK_TYPE(grad.scalar_type() == param.scalar_type(), "grad of tensor ", i, " is ",
                     grad.scalar_type(), "; where its parameter or state is stored in few bits it ",
                     "has to be ", param.scalar_type(), ", as its parameter is");
    tensor.dtype = param.scalar_type() == at::kFloat ? kFloat32 : kBFloat16;
    check(param, param, "param", i);
    check(grad, param, "grad", i);
    tensor.param = param.data_ptr();
    tensor.grad = grad.const_data_ptr();
    for (size_t k = 0; k < kMemories; ++k) {
      check(*memories[k], param, names[k], i);
      tensor.memories[k] = memories[k]->data_ptr();
      packed.formats[k] = format_of(*memories[k]);
      const bool is_float = memories[k]->scalar_type() == at::kFloat;
      TORCH_CHECK_TYPE(packed.formats[k] != kFloats || is_float, names[k], " of tensor ", i, " is ",
                       memories[k]->scalar_type(),
                       "; where something else of it is stored in few bits it has to be float32, "
                       "bfloat16 or int8");
      open_scales(packed, k, packed_[k * n_ + i], param, names[k], by_row, i);
    }
    if (remainder.numel() > 0) {
      check(remainder, param, "param_remainder", i);
      TORCH_CHECK_VALUE(remainder.scalar_type() == at::kChar && tensor.dtype == kBFloat16,
                        "param_remainder of tensor ", i, " is ", remainder.scalar_type(),
                        "; it has to be int8, of a bfloat16 parameter");
      packed.remainder = static_cast<uint8_t*>(remainder.data_ptr());
    }
    packed.rounds = row(kRounds, i);
    packed.key = row(kKey, i);
    packed.offset = row(kOffset, i);
    packed.stretch = row(kStretch, i);
    packed.skip = row(kSkip, i);
    return &packed;
  }

 private:
  enum Row { kKey, kOffset, kStretch, kSkip, kRounds, kRows };

  int64_t row(Row row, size_t i) const { return rounding_[row * n_ + i]; }

  static Format format_of(const at::Tensor& memory) {
    switch (memory.scalar_type()) {
      case at::kBFloat16:
        return kShorts;
      case at::kChar:
        return kSignedCodes;
      case at::kByte:
        return kSquareCodes;
      default:
        return kFloats;
    }
  }

  static void check(const at::Tensor& t, const at::Tensor& param, const char* name, size_t i) {
    TORCH_CHECK_VALUE(t.sizes() == param.sizes(), name, " of tensor ", i, " has shape ", t.sizes(),
                      ", its parameter ", param.sizes());
    TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided && t.is_contiguous(), name,
                      " of tensor ", i, " has to be contiguous on the CPU");
  }

  static void open_scales(PackedTensor& packed, size_t k, const at::Tensor& scales,
                          const at::Tensor& param, const char* name, bool by_row, size_t i) {
    const int64_t format = packed.formats[k];
    if (format != kSignedCodes && format != kSquareCodes) return;
    const int64_t numel = param.numel(), n = scales.numel();
    const int64_t block = n > 0 && numel % n == 0 ? numel / n : 0;
    const int64_t run = by_row ? numel / std::max<int64_t>(1, param.size(0)) : numel;
    TORCH_CHECK_VALUE((block == 64 || block == 128 || block == 256) && run % block == 0 &&
                          scales.is_contiguous() && scales.is_cpu() &&
                          format == (k == 0 ? kSignedCodes : kSquareCodes),
                      name, "_scales of tensor ", i, " has ", n, " elements, and ", name, "_codes ",
                      numel,
                      "; it has to have one for each block, and exp_avg_sq's "
                      "codes are uint8, others int8");
    TORCH_CHECK_TYPE(scales.scalar_type() == at::kFloat, name, "_scales of tensor ", i, " is ",
                     scales.scalar_type(), ", not float32");
    packed.scales[k] = static_cast<float*>(scales.data_ptr());
    packed.blocks[k] = block;
  }

  const TensorRefs& packed_;
  size_t n_;
  const int64_t* rounding_ = nullptr;
  std::vector<PackedTensor> tensors_;
};

}  // namespace am::cpu

// A step's tensors by reference. Thousands of them are read at every step, and counting
// references to each would take longer than updating it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace am {

// Refers to tensors that somebody else keeps alive.
class TensorRefs {
 public:
  TensorRefs() = default;
  explicit TensorRefs(at::TensorList list) {
    reserve(list.size());
    for (const at::Tensor& tensor : list) push_back(tensor);
  }

  void reserve(size_t size) { refs_.reserve(size); }
  void push_back(const at::Tensor& tensor) { refs_.push_back(&tensor); }
  size_t size() const { return refs_.size(); }
  const at::Tensor& operator[](size_t i) const { return *refs_[i]; }

 private:
  std::vector<const at::Tensor*> refs_;
};

// Asks for all cache lines of `size` bytes ahead of their use: they may begin anywhere in one.
inline void prefetch(const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  for (size_t offset = 0; offset < size; offset += 64) __builtin_prefetch(bytes + offset);
  __builtin_prefetch(bytes + size - 1);
}

// Tensors lie all over memory, and thousands of them do not fit in the fast caches.
inline void prefetch_impl(const at::Tensor& tensor) {
  prefetch(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
}

// Its StorageImpl, once the TensorImpl is there: its first 64 bytes have the address of the
// data, and whether that may be had without more ado.
inline void prefetch_storage(const at::Tensor& tensor) {
  prefetch(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(), 64);
}

// Tells autograd that a tensor was written to: a graph that still needs its old values then
// raises. One made in inference mode has no counter.
inline void bump_version(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (impl->version_counter().enabled()) impl->bump_version();
}

// A version lies apart from its TensorImpl, and counting it up waits until it is there.
inline void prefetch_version(const at::Tensor& tensor) {
  const c10::VariableVersion& version = tensor.unsafeGetTensorImpl()->version_counter();
  static_assert(sizeof(version) == sizeof(void*));  // a pointer, which torch does not give
  __builtin_prefetch(*reinterpret_cast<void* const*>(&version), 1);
}

// For the tensors of a list in order, as for_each_ahead.
inline void bump_version_ahead(const TensorRefs& refs, size_t i) {
  const size_t n = refs.size();
  if (i + 16 < n) __builtin_prefetch(&refs[i + 16].unsafeGetTensorImpl()->version_counter());
  if (i + 8 < n) prefetch_version(refs[i + 8]);
  bump_version(refs[i]);
}

// Calls f(i) for the tensors of a list in order, each one asked for in time.
template <class F>
void for_each_ahead(const TensorRefs& refs, F f) {
  const size_t n = refs.size();
  for (size_t i = 0; i < n; ++i) {
    if (i + 16 < n) prefetch_impl(refs[i + 16]);
    if (i + 8 < n) prefetch_storage(refs[i + 8]);
    f(i);
  }
}

}  // namespace am

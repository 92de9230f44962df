// How the blocks of one launch that does a whole step keep to its order.
//
// The items and their order are those of adamem_fused/backends/schedule.py. Blocks claim them one
// by one, in order, from a counter. An update waits for items before its own alone, and these were
// claimed before it, by blocks that are running: so the walk comes to its end with any number of
// blocks, whether all of them are resident or not, and whatever else the GPU is doing.
#pragma once

#include <cuda/atomic>

#include "tables.h"

namespace am::cuda {

// One chunk of one tensor: its sums, or, where `chunk` is negative, the update of chunk
// ~chunk. A tensor without elements has one item, sums of nothing, so that its beta is taken.
struct Item {
  int32_t tensor, chunk;
};

// Where blocks meet, in device memory: all zero before the first launch, and left as the next
// launch needs it. A launch has a number of its own, so that nothing has to be reset.
struct Control {
  unsigned long long next;  // the first item that nobody has claimed
  uint32_t left;            // blocks that are through
  uint32_t launches;
};

struct Progress {      // of a tensor
  uint32_t summed;     // chunks whose sums are there
  uint32_t published;  // the number of the launch whose beta is there
};

struct Schedule {
  const Item* items;
  int64_t count;
  Control* control;
  Progress* progress;  // [tensors]
};

template <class T>
__device__ inline auto shared_by_all(T& value) {
  return ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(value);
}

__device__ inline uint32_t launch_number(Control& control) {
  return shared_by_all(control.launches).load(::cuda::std::memory_order_relaxed) + 1;
}

// Not by an atomic_ref: what that is compiled to asks first whether the counter lies in shared
// memory, and so waits for the answer at once.
__device__ inline uint64_t claim_item(Control& control) { return atomicAdd(&control.next, 1ull); }

// Counts a chunk whose sums were written. True for a tensor's last: all of its sums can be
// read then.
__device__ inline bool is_last_of_tensor(Progress& tensor, uint32_t chunks) {
  const uint32_t before =
      shared_by_all(tensor.summed).fetch_add(1, ::cuda::std::memory_order_acq_rel);
  if (before + 1 < chunks) return false;
  shared_by_all(tensor.summed).store(0, ::cuda::std::memory_order_relaxed);
  return true;
}

__device__ inline void publish(Progress& tensor, uint32_t launch) {
  shared_by_all(tensor.published).store(launch, ::cuda::std::memory_order_release);
}

__device__ inline bool is_published(Progress& tensor, uint32_t launch) {
  return shared_by_all(tensor.published).load(::cuda::std::memory_order_acquire) == launch;
}

// The last block to leave makes all ready for the next launch.
__device__ inline void leave(Control& control, uint32_t blocks, uint32_t launch) {
  const uint32_t before =
      shared_by_all(control.left).fetch_add(1, ::cuda::std::memory_order_acq_rel);
  if (before + 1 < blocks) return;
  control.next = 0;
  control.left = 0;
  control.launches = launch;
}

// What one block does. Block:
//   int64_t claim();                the number of the next item
//   Item item(int64_t k);
//   void sum(Item);                 writes the sums of a chunk
//   bool is_last(int32_t tensor);   counts it; true for the tensor's last
//   void set_beta(int32_t tensor);  from all of the tensor's sums; publishes it
//   void wait(int32_t tensor);      until the tensor's beta is there
//   void update(Item);
template <class Block>
__device__ inline void walk(Block& block, int64_t items) {
  for (int64_t k = block.claim(); k < items; k = block.claim()) {
    const Item item = block.item(k);
    if (item.chunk >= 0) {
      block.sum(item);
      if (block.is_last(item.tensor)) block.set_beta(item.tensor);
    } else {
      block.wait(item.tensor);
      block.update({item.tensor, ~item.chunk});
    }
  }
}

}  // namespace am::cuda

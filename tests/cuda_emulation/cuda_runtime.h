// As much of CUDA as csrc/cuda needs, on the CPU, so that g++ compiles the kernels as they
// are and tests can run them. Found in place of CUDA's header of the same name.
//
// A thread of a block is a fiber: it runs until it has to wait at a barrier, and the others
// run meanwhile, beginning with another one and in another direction at every round, so that
// what a barrier is missing for comes out. A block stays on one thread of the CPU; several blocks
// at a time (emulation_configure) run on as many threads, with the CPU's own atomics between them.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned n) : x(n) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a launch asks for of the shared memory that has no size of its own, in shared_memory.cpp.
namespace am::cuda {
extern thread_local uint4 shared_memory[];
}

// ---- fibers -----------------------------------------------------------------------

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr int kSharedBytes = 227 * 1024;  // of a block at most, as on an H100

// Set by emulation_configure.
inline int resident_blocks = 1;  // what a launch is told the device holds
inline int running_blocks = 1;   // how many of them run at a time

// Set by emulation_play.
inline int driver_version = 13000;
inline bool has_code = true;  // for the device
inline bool is_capturing = false;

// Bytes that accesses of several elements have taken, since they were last asked for.
inline std::atomic<int64_t> read_bytes{0}, written_bytes{0};

inline std::set<const void*> loaded;                 // kernels
inline std::map<const void*, size_t> allowed_bytes;  // of shared memory, where it was asked for

struct Barrier {
  unsigned expected = 0, waiting = 0, round = 0;
};

class Block;
inline thread_local Block* current = nullptr;

class Block {
 public:
  explicit Block(unsigned threads) : fibers_(threads), warps_((threads + kWarp - 1) / kWarp) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
  }

  unsigned threads() const { return static_cast<unsigned>(fibers_.size()); }

  void run(const std::function<void()>& body) {
    current = this;
    body_ = &body;
    alive_ = threads();
    all_ = {threads(), 0, 0};
    for (unsigned w = 0; w < warps_.size(); ++w)
      warps_[w].barrier = {std::min<unsigned>(kWarp, threads() - w * kWarp), 0, 0};
    for (Fiber& fiber : fibers_) fiber.is_done = false;
    while (alive_ > 0) {
      has_moved_ = false;
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      const unsigned first = static_cast<unsigned>(random_ >> 40) % threads();
      const bool backwards = random_ >> 33 & 1;
      // Now and then a warp gets as far ahead of the others as it can.
      if (random_ >> 60 == 0) run_ahead(first / kWarp * kWarp);
      for (unsigned k = 0; k < threads(); ++k) {
        index_ = (first + (backwards ? threads() - k : k)) % threads();
        if (!fibers_[index_].is_done) resume(fibers_[index_]);
      }
      if (!has_moved_) {
        std::fprintf(stderr, "emulation: threads of a block wait at different barriers\n");
        std::abort();
      }
    }
    check_accesses();
  }

  // Notes an access of several elements at once.
  template <class Word>
  void note_access(const Word* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Word) != 0) {
      std::fprintf(stderr, "emulation: misaligned address\n");
      std::abort();
    }
    fibers_[index_].accesses.push_back({reinterpret_cast<const char*>(p), sizeof(Word)});
  }

  void sync() {
    // Now and then another block gets ahead of this one.
    if (running_blocks > 1 && random_ >> 58 == 0) sched_yield();
    if (all_.waiting + 1 == all_.expected) check_accesses();
    wait(all_);
  }

  void sync_warp() { wait(warps_[index_ / kWarp].barrier); }

  unsigned lane() const { return index_ % kWarp; }

  // The value of another thread of the warp, or the own where there is none. The mask's lanes wait
  // for each other, and all that are there where it has all.
  double shuffle(unsigned mask, double value, unsigned from) {
    Warp& warp = warps_[index_ / kWarp];
    if ((mask >> lane() & 1) == 0 || (from < kWarp && (mask >> from & 1) == 0)) {
      std::fprintf(stderr, "emulation: a lane shuffles beside its mask\n");
      std::abort();
    }
    Barrier& barrier = mask == ~0u ? warp.barrier : warp.parts[mask];
    if (mask != ~0u) barrier.expected = static_cast<unsigned>(__builtin_popcount(mask));
    warp.values[lane()] = value;
    wait(barrier);
    const double result = from < kWarp ? warp.values[from] : value;
    wait(barrier);
    return result;
  }

 private:
  struct Access {
    const char* address;
    size_t bytes;
  };
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    std::vector<Access> accesses;  // since the last barrier
    bool is_started = false, is_done = false;
  };
  struct Warp {
    Barrier barrier;
    std::map<unsigned, Barrier> parts;  // by their masks
    double values[kWarp];
  };

  // Where all threads of a warp have made as many, each access of theirs has to take whole sectors
  // of 32 bytes that lie side by side: else it moves more than it uses.
  void check_accesses() {
    for (size_t first = 0; first < fibers_.size(); first += kWarp) {
      const size_t end = std::min(first + kWarp, fibers_.size());
      const auto& own = fibers_[first].accesses;
      bool is_whole = true;
      for (size_t i = first; i < end; ++i)
        is_whole = is_whole && fibers_[i].accesses.size() == own.size();
      for (size_t k = 0; is_whole && k < own.size(); ++k) {
        size_t run = 0;
        for (size_t i = first; i < end; ++i) {
          const Access& access = fibers_[i].accesses[k];
          run += access.bytes;
          const bool goes_on =
              i + 1 < end && fibers_[i + 1].accesses[k].address == access.address + access.bytes;
          if (goes_on) continue;
          if (run % 32 != 0) {
            std::fprintf(stderr, "emulation: a warp's access takes parts of sectors\n");
            std::abort();
          }
          run = 0;
        }
      }
    }
    for (Fiber& fiber : fibers_) fiber.accesses.clear();
  }

  static void enter() {
    for (;;) {
      Block* block = current;
      (*block->body_)();
      block->fibers_[block->index_].is_done = true;
      --block->alive_;
      block->leave(block->all_);
      block->leave(block->warps_[block->index_ / kWarp].barrier);
      block->has_moved_ = true;
      block->yield();
    }
  }

  void wait(Barrier& barrier) {
    has_moved_ = true;
    const unsigned round = barrier.round;
    if (++barrier.waiting == barrier.expected) {
      barrier.waiting = 0;
      ++barrier.round;
    }
    while (barrier.round == round) yield();
  }

  // As a thread that has returned does: the others do not wait for it.
  static void leave(Barrier& barrier) {
    if (--barrier.expected > 0 && barrier.waiting == barrier.expected) {
      barrier.waiting = 0;
      ++barrier.round;
    }
  }

  void run_ahead(unsigned begin) {
    const unsigned end = std::min(begin + kWarp, threads());
    do {
      has_moved_ = false;
      for (index_ = begin; index_ < end; ++index_)
        if (!fibers_[index_].is_done) resume(fibers_[index_]);
    } while (has_moved_);
    has_moved_ = true;
  }

  void resume(Fiber& fiber) {
    threadIdx = dim3(index_);
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.is_started) _longjmp(fiber.place, 1);
    fiber.is_started = true;
    setcontext(&fiber.context);
  }

  void yield() {
    if (_setjmp(fibers_[index_].place) == 0) _longjmp(scheduler_, 1);
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier all_;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  unsigned index_ = 0, alive_ = 0;
  bool has_moved_ = false;
  uint64_t random_ = 1;
};

// Beginning with another block, and in the other direction, at every launch.
inline void run_blocks(unsigned blocks, unsigned threads, size_t bytes,
                       const std::function<void()>& body) {
  static unsigned launches = 0;
  const unsigned first = ++launches * 2654435761u % blocks;
  const bool backwards = launches % 2;
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    thread_local std::unique_ptr<Block> block;
    if (!block || block->threads() != threads) block.reset(new Block(threads));
    gridDim = dim3(blocks);
    blockDim = dim3(threads);
    // Numbers that are none, in what is asked for and behind it.
    auto* const shared = reinterpret_cast<unsigned char*>(am::cuda::shared_memory);
    for (unsigned k = next++; k < blocks; k = next++) {
      blockIdx = dim3((first + (backwards ? blocks - k : k)) % blocks);
      std::memset(shared, 0xFF, bytes + kGuardBytes);
      block->run(body);
      for (size_t i = bytes; i < bytes + kGuardBytes; ++i) {
        if (shared[i] == 0xFF) continue;
        std::fprintf(stderr, "emulation: a block writes behind its shared memory\n");
        std::abort();
      }
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < running_blocks && i < static_cast<int>(blocks); ++i)
    others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace emulation

inline void __syncthreads() { emulation::current->sync(); }
inline void __syncwarp() { emulation::current->sync_warp(); }
inline double __shfl_down_sync(unsigned mask, double value, int offset) {
  return emulation::current->shuffle(mask, value, emulation::current->lane() + offset);
}
inline double __shfl_xor_sync(unsigned mask, double value, int other) {
  return emulation::current->shuffle(mask, value, emulation::current->lane() ^ other);
}
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int other) {
  return static_cast<uint32_t>(__shfl_xor_sync(mask, static_cast<double>(value), other));
}

inline uint32_t __float_as_uint(float f) {
  uint32_t word;
  std::memcpy(&word, &f, sizeof(word));
  return word;
}
inline float __uint_as_float(uint32_t word) {
  float f;
  std::memcpy(&f, &word, sizeof(f));
  return f;
}
inline uint32_t __float2uint_rz(float f) { return f > 0.0f ? static_cast<uint32_t>(f) : 0; }
inline int __clz(int i) { return i == 0 ? 32 : __builtin_clz(static_cast<unsigned>(i)); }

template <class Word>
Word __ldcs(const Word* p) {
  emulation::current->note_access(p);
  emulation::read_bytes += sizeof(Word);
  return *p;
}
template <class Word>
Word __ldcg(const Word* p) {
  return __ldcs(p);
}
template <class Word>
void __stcs(Word* p, Word value) {
  emulation::current->note_access(p);
  emulation::written_bytes += sizeof(Word);
  *p = value;
}

// ---- the runtime ------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
typedef void* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct cudaFuncAttributes {};

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::driver_version;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (emulation::driver_version < 13000) return cudaErrorInsufficientDriver;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
template <class... Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*kernel)(Args...)) {
  if (!emulation::has_code) return cudaErrorNoKernelImageForDevice;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (emulation::loaded.count(address) == 0 && emulation::is_capturing)
    return cudaErrorStreamCaptureUnsupported;
  emulation::loaded.insert(address);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : emulation::kSharedBytes;
  return cudaSuccess;
}
template <class... Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    emulation::allowed_bytes[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  *blocks = emulation::resident_blocks;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "invalid argument";
  }
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual... args) {
  if (config->gridDim.x == 0) return cudaErrorInvalidValue;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const auto found = emulation::allowed_bytes.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = found == emulation::allowed_bytes.end() ? 48 * 1024 : found->second;
  if (config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  emulation::run_blocks(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                        [&] { kernel(args...); });
  return cudaSuccess;
}

extern "C" {

inline __attribute__((used, visibility("default"))) void emulation_configure(int resident_blocks,
                                                                             int running_blocks) {
  emulation::resident_blocks = resident_blocks;
  emulation::running_blocks = running_blocks;
}

inline __attribute__((used, visibility("default"))) void emulation_play(int driver_version,
                                                                        int has_code,
                                                                        int is_capturing) {
  emulation::driver_version = driver_version;
  emulation::has_code = has_code;
  emulation::is_capturing = is_capturing;
}

inline __attribute__((used, visibility("default"))) void emulation_traffic(int64_t* read,
                                                                           int64_t* written) {
  *read = emulation::read_bytes.exchange(0);
  *written = emulation::written_bytes.exchange(0);
}

// As in a new process.
inline __attribute__((used, visibility("default"))) void emulation_unload() {
  emulation::loaded.clear();
  emulation::allowed_bytes.clear();
}

}  // extern "C"

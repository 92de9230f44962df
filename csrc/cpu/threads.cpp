#include "threads.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace am::cpu {
namespace {

// Functions of the OpenMP that is in the process already: torch's own threads, where others would
// be in their way.
struct OpenMP {
  void (*parallel)(void (*f)(void* data), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;

  OpenMP() {
    find(parallel, "GOMP_parallel");
    find(thread, "omp_get_thread_num");
    find(threads, "omp_get_num_threads");
  }

  bool is_there() const { return parallel != nullptr && thread != nullptr && threads != nullptr; }

 private:
  template <class F>
  static void find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
};

}  // namespace

void run_in_parallel(int64_t parts, void (*f)(void* context, int64_t part), void* context) {
  static const OpenMP openmp;
  if (openmp.is_there()) {
    const auto run = [&] {
      // There may be fewer threads than were asked for.
      for (int64_t part = openmp.thread(); part < parts; part += openmp.threads()) f(context, part);
    };
    const auto call = [](void* data) { (*static_cast<decltype(run)*>(data))(); };
    openmp.parallel(call, const_cast<void*>(static_cast<const void*>(&run)),
                    static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) threads.emplace_back(f, context, part);
  f(context, 0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace am::cpu

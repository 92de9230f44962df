#include "threads.h"

#include <thread>
#include <vector>

namespace am::cpu {

void run_on_new_threads(int64_t parts, void (*f)(void* context, int64_t part), void* context) {
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) threads.emplace_back(f, context, part);
  f(context, 0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace am::cpu

// Which of the kernels run.
#include "kernels.h"

#include <string_view>

#include "library.h"

namespace am::cpu {
namespace {

#if defined(__aarch64__)
const Kernels* chosen = &kernels_neon;
#else
const Kernels* chosen = &kernels_default;
#endif

}  // namespace

const Kernels& kernels() { return *chosen; }

}  // namespace am::cpu

int64_t adamem_cpu_interface() { return am::cpu::kInterface; }

// As torch chooses its own, so that ATEN_CPU_CAPABILITY rules this package too.
void adamem_cpu_choose([[maybe_unused]] const char* capability) {
#if defined(__x86_64__)
  using namespace am::cpu;
  const std::string_view given = capability;
  const auto starts_with = [&](std::string_view name) {
    return given.substr(0, name.size()) == name;
  };
  if (starts_with("AVX512") || starts_with("AVX10")) {
    chosen = &kernels_avx512;
  } else if (starts_with("AVX2")) {
    chosen = &kernels_avx2;
  } else {
    chosen = &kernels_default;
  }
#endif
}

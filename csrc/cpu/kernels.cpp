// Which of the kernels run: torch's own choice.
#include "kernels.h"

#include <ATen/Version.h>

#include <string>

namespace am::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    const auto starts_with = [&](const char* name) { return capability.rfind(name, 0) == 0; };
    if (starts_with("AVX512") || starts_with("AVX10")) return kernels_avx512;
    if (starts_with("AVX2")) return kernels_avx2;
    return kernels_default;
  }();
  return chosen;
#else
  return kernels_default;
#endif
}

}  // namespace am::cpu

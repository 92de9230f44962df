// CUDA's bfloat16 on the CPU, see cuda_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t word = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &word, sizeof(f));
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (std::isnan(f)) return {0x7FFF};
  uint32_t word;
  std::memcpy(&word, &f, sizeof(word));
  return {static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16)};
}

// Rounded once: to float towards the odd neighbour, so that no tie is made on the way.
inline __nv_bfloat16 __double2bfloat16(double d) {
  float f = static_cast<float>(d);
  if (std::isfinite(f) && static_cast<double>(f) != d) {
    uint32_t word;
    std::memcpy(&word, &f, sizeof(word));
    if (word % 2 == 0) f = std::nextafter(f, static_cast<double>(f) < d ? INFINITY : -INFINITY);
  }
  return __float2bfloat16_rn(f);
}

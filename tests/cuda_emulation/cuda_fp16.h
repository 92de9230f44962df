// CUDA's float16 on the CPU, see cuda_runtime.h.
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline __half __double2half(double d) { return {static_cast<_Float16>(d)}; }

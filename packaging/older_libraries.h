// Put before every C++ source of the wheel, which takes no function that torch's own wheels could
// not take: what they ask for is in glibc 2.28 and in the C++ library of GCC 8.
#pragma once

#include <new>

// pow of glibc 2.29 computes the same as the one before; they differ in how errors are reported.
#if defined(__x86_64__)
__asm__(".symver pow,pow@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver pow,pow@GLIBC_2.17");
#endif

// In the C++ library from GCC 11 on.
namespace std {
[[noreturn, gnu::visibility("hidden")]] inline void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std

// Put before every source of the wheel: of the C library's functions, the versions that glibc 2.28
// has too, as torch's own wheels ask for no newer one. That of pow computes the same as 2.29's, which
// differs in how errors are reported.
#pragma once

#if defined(__x86_64__)
__asm__(".symver pow,pow@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver pow,pow@GLIBC_2.17");
#endif

#define AM_KERNELS kernels_avx512
#include "kernels_impl.h"

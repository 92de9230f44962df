#define AM_KERNELS kernels_avx2
#include "kernels_impl.h"

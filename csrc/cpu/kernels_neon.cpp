#define AM_KERNELS kernels_neon
#include "kernels_impl.h"

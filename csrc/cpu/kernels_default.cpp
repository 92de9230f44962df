#define AM_KERNELS kernels_default
#include "kernels_impl.h"

// A block's shared memory whose size its launch tells, see cuda_runtime.h.
#include "cuda_runtime.h"

thread_local uint4
    am::cuda::shared_memory[(emulation::kSharedBytes + emulation::kGuardBytes) / sizeof(uint4)];

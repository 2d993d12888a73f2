// The last block to arrive finishes what all blocks of a group began.
#pragma once

#include "device/simt.h"

namespace tokensieve {
namespace simt {

// True in all threads of the last of `expected` blocks to arrive; what the others wrote before is visible. The counter returns to 0.
__device__ __forceinline__ bool arrive_last(int32_t* counter, int expected, int* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicAdd(counter, 1) == expected - 1;
    __threadfence();
  }
  __syncthreads();
  if (*is_last == 0) return false;
  if (threadIdx.x == 0) atomicExch(counter, 0);
  return true;
}

}  // namespace simt
}  // namespace tokensieve

// allocate_budget on CUDA: token budgets of the parts of a row.
//
// In: weights [B, P] float32 or float64, totals and caps int64. Out: budget int64 [B, P], shares [B, P].
// Algorithm: budget_row.h, one block a row. Divisions, exponentials and truncations run on all threads; sums run on one thread from the first
//   part on, because an order of its own would round otherwise than the methods' Python loops, and a budget would differ by one.
// Work: a few operations a part; 2 P elements of shared memory. Floor on H200: the launch (2 us); P = 160 costs about 160 x 10 cycles a sum.
// Bound by latency. What it saves is the host: budgets feed select_topk on the device, so no .tolist(), no sync.
// Launch: grid.x = B, up to 128 threads. Deterministic; bits equal the CPU's (products and fused multiply-adds round once on both).
// Limits: 4096 parts (64 KB of shared memory).
#pragma once

#include "device/simt.h"
#include "select/budget_row.h"

namespace tokensieve {
namespace select {

struct BudgetBlock {
  template <typename Body>
  __device__ void each(int64_t n, Body&& body) const {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) body(i);
    __syncthreads();
  }
  template <typename Body>
  __device__ void once(Body&& body) const {
    if (threadIdx.x == 0) body();
    __syncthreads();
  }
  static __device__ float product(float a, float b) { return __fmul_rn(a, b); }
  static __device__ double product(double a, double b) { return __dmul_rn(a, b); }
  static __device__ double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
};

template <typename F>
__global__ void __launch_bounds__(128) budget_kernel(const BudgetParams p) {
  SIMT_DYN_SHARED(F, share);
  SIMT_SHARED(F, scalar, [4]);
  SIMT_SHARED(int64_t, integer, [2]);
  BudgetBlock group;
  const BudgetRow<F, BudgetBlock> row = {p, static_cast<int64_t>(blockIdx.x), group, share, share + p.P, scalar, integer};
  row.run();
}

}  // namespace select
}  // namespace tokensieve

// score_quantiles: quantiles of the scores of every row. One block a quantile of a row, no sort.
//
// In: scores [B, N] float32/float16/bfloat16, optional candidates [B, N]. Out: float32 [B, Q].
// Algorithm: the radix select of topk_kernel.cuh down to the last bit gives the order statistic at or below the quantile and how many of its
//   ties are above it in rank; if that is none, the smallest order word above it is the next one.
// Work: bytes = B Q N e (from L2 after the first quantile of a row). Floor on H200: launch-bound (2 us); about 16 barriers, an estimated
//   3 us at N = 4096. Launch: grid.x = B Q. Deterministic: the answer is unique. Limits: N < 2^31, 16 quantiles, B Q < 2^31.
#pragma once

#include "select/quantile_value.h"
#include "select/topk_kernel.cuh"

namespace tokensieve {
namespace select {

__device__ __forceinline__ float score_of_order(uint32_t order) {
  return __uint_as_float((order & 0x80000000u) != 0 ? order ^ 0x80000000u : ~order);
}

// Whether a candidate of the row is NaN. All threads.
template <typename R>
__device__ inline bool any_nan(const R& row) {
  int nan = 0;
  for (int tile = 0; tile < row.tiles; ++tile) {
    const auto items = row.load(tile);
    constexpr int kItems = sizeof(items.order) / sizeof(uint32_t);
#pragma unroll
    for (int i = 0; i < kItems; ++i) nan |= (items.candidate >> i & 1u) != 0 && items.order[i] == 0 ? 1 : 0;
  }
  return __syncthreads_or(nan) != 0;
}

// Ordered bits of the k-th largest candidate, 1 <= k <= candidates; `left`: which of its ties it is. All threads.
template <typename R>
__device__ inline uint32_t kth_largest(const R& row, const TopkShared& s, int64_t k, int& left) {
  Cut cut;
  int need = static_cast<int>(k);
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) s.histogram[i] = 0;
    __syncthreads();
    for (int tile = 0; tile < row.tiles; ++tile) count_items(row.load(tile), cut, shift, pass == 2 ? 1023u : 2047u, s.histogram);
    __syncthreads();
    find_bin(s, need);
    __syncthreads();
    cut.lower |= static_cast<uint32_t>(s.found[0]) << shift;
    cut.upper = cut.lower + ((1u << shift) - 1u);
    need = s.found[1];
  }
  left = need;
  return cut.lower;
}

// Smallest ordered bits of a candidate above `order`, all ones if none. All threads.
template <typename R>
__device__ inline uint32_t least_above(const R& row, uint32_t order, unsigned* least) {
  if (threadIdx.x == 0) *least = 0xffffffffu;
  __syncthreads();
  unsigned mine = 0xffffffffu;
  for (int tile = 0; tile < row.tiles; ++tile) {
    const auto items = row.load(tile);
    constexpr int kItems = sizeof(items.order) / sizeof(uint32_t);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((items.candidate >> i & 1u) != 0 && items.order[i] > order && items.order[i] < mine) mine = items.order[i];
    }
  }
  mine = simt::warp::min(mine);
  if (threadIdx.x % 32 == 0) atomicMin(least, mine);
  __syncthreads();
  return *least;
}

template <typename T, int kItems, Hold kHold>
__global__ void __launch_bounds__(1024, 1) quantiles_kernel(const QuantilesParams p) {
  TS_TOPK_SHARED(shared);
  SIMT_SHARED(unsigned, least);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  const int64_t b = blockIdx.x / static_cast<unsigned>(p.Q);
  const Row<T, kItems, kHold> row(p.rows, static_cast<int>(b), dynamic);
  int64_t n = p.rows.N;
  if (p.rows.candidates != nullptr) {
    count_classes(row, shared);
    n = shared.found[0];
  }
  float value = __builtin_nanf("");
  if (!any_nan(row) && n > 0) {
    const QuantileRank rank = quantile_rank(p.q[blockIdx.x % static_cast<unsigned>(p.Q)], n);
    int left;
    const uint32_t low = kth_largest(row, shared, n - rank.below, left);
    const uint32_t high = rank.weight > 0.0f && left < 2 ? least_above(row, low, &least) : low;
    value = quantile_between(score_of_order(low), score_of_order(high), rank.weight);
  }
  if (threadIdx.x == 0) p.out[blockIdx.x] = value;
}

}  // namespace select
}  // namespace tokensieve

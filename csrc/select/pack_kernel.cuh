// pack_index on CUDA: slots of the used tokens of a padded index, and cumulative lengths, without a look at the host.
//
// In: index int64 [B, K], -1 = unused. Out: rows int64 [capacity], slots int64 [B, K], cu_seqlens int32 [B + 1], total int64.
// Algorithm: two launches of one block a row. The first counts the row's tokens; the second adds up the counts before its row (4 B bytes from
//   L2) and numbers its own tokens, a tile of one token a thread after the other: ballots within warps, then the warps' counts. What is left
//   of rows is filled with -1 by all blocks.
// Work: 8 (3 B K + capacity) bytes. B = 64, K = 197: 0.4 MB, so it is bound by two launches (4 us). One launch that counts all rows before
//   its own would read 8 B^2 K / 2 bytes: 3 MB there, 0.8 GB at B = 1024.
// Deterministic: no atomics, slots in the order of the index. Limits: B, K, capacity below 2^31.
#pragma once

#include "device/simt.h"
#include "select/pack.h"

namespace tokensieve {
namespace select {

constexpr int kPackWarps = 16;

__device__ __forceinline__ bool used_token(int64_t n, int64_t N) { return n >= 0 && n < N; }

// Sum over the block; every thread gets it. `parts` is [kPackWarps] and free again afterwards.
__device__ __forceinline__ int64_t block_sum(int64_t value, int64_t* parts) {
  value = simt::warp::sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += parts[w];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(32 * kPackWarps) pack_count_kernel(const PackParams p) {
  SIMT_SHARED(int64_t, parts, [kPackWarps]);
  const int64_t* const index = p.index + blockIdx.x * p.index_stride;
  int64_t count = 0;
  for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) count += used_token(index[k], p.N) ? 1 : 0;
  count = block_sum(count, parts);
  if (threadIdx.x == 0) static_cast<int32_t*>(p.workspace)[blockIdx.x] = static_cast<int32_t>(count);
}

__global__ void __launch_bounds__(32 * kPackWarps) pack_write_kernel(const PackParams p) {
  SIMT_SHARED(int64_t, parts, [kPackWarps]);
  const int64_t b = blockIdx.x;
  const int32_t* const counts = static_cast<const int32_t*>(p.workspace);
  int64_t before = 0, all = 0;
  for (int64_t i = threadIdx.x; i < p.B; i += blockDim.x) {
    all += counts[i];
    before += i < b ? counts[i] : 0;
  }
  before = block_sum(before, parts);
  all = block_sum(all, parts);
  for (int64_t i = all + b * blockDim.x + threadIdx.x; i < p.capacity; i += static_cast<int64_t>(gridDim.x) * blockDim.x) p.rows[i] = -1;
  if (b == 0 && threadIdx.x == 0) {
    *p.total = all;
    p.cu_seqlens[0] = 0;
  }
  if (b >= p.B) return;  // the one block of an empty batch
  const int64_t* const index = p.index + b * p.index_stride;
  int64_t first = before;
  for (int64_t tile = 0; tile < p.K; tile += blockDim.x) {
    const int64_t k = tile + threadIdx.x, n = k < p.K ? index[k] : -1;
    const bool used = used_token(n, p.N);
    const unsigned lanes = simt::warp::ballot(used);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = __popc(lanes);
    __syncthreads();
    int64_t at = first + __popc(lanes & ((1u << threadIdx.x % 32) - 1u));
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
      at += w < static_cast<int>(threadIdx.x) / 32 ? parts[w] : 0;
      first += parts[w];
    }
    __syncthreads();
    const bool fits = used && at < p.capacity;
    if (k < p.K) p.slots[b * p.K + k] = fits ? at : -1;
    if (fits) p.rows[at] = b * p.N + n;
  }
  if (threadIdx.x == 0) p.cu_seqlens[b + 1] = static_cast<int32_t>(first < p.capacity ? first : p.capacity);
}

}  // namespace select
}  // namespace tokensieve

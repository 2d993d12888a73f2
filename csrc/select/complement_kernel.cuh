// complement_index: the positions of [0, N) that a row of indices does not name, ascending by construction.
//
// In: index int64 [B, K], -1 names nothing. Out: int64 [B, capacity], -1 behind the last.
// Algorithm: a bit for every position in shared memory (in the workspace above 1.8 million), one pass that sets the named ones (atomicOr, so
//   a position named twice is no harm), then a block scan over the counts of 8 positions a thread gives every position its slot.
// Work: bytes = 8 B (K + capacity). Floor on H200: 8 x (640 + 2304) x 8 = 188 KB, 40 ns of HBM: launch- and barrier-bound (about 6 barriers).
// Launch: grid.x = B; a thread for every 8 positions, 64 to 1024. Deterministic: the answer is unique.
// Limits: N < 2^31 - 8192. Indices outside [-1, N) are passed by; a row's positions beyond capacity are cut.
#pragma once

#include "device/simt.h"
#include "select/complement_args.h"
#include "select/topk_kernel.cuh"

namespace tokensieve {
namespace select {

__global__ void __launch_bounds__(1024, 1) complement_kernel(const ComplementParams p, const int words, const bool held) {
  SIMT_SHARED(uint32_t, warp_sums, [32]);
  SIMT_DYN_SHARED(unsigned, dynamic);
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), N = static_cast<int>(p.N);
  unsigned* const named = held ? dynamic : static_cast<unsigned*>(p.workspace) + b * words;
  for (int i = thread; i < words; i += threads) named[i] = 0;
  __syncthreads();
  for (int64_t i = thread; i < p.K; i += threads) {
    const int64_t position = p.index[b * p.index_stride + i];
    if (position >= 0 && position < p.N) atomicOr(&named[position / 32], 1u << (position % 32));
  }
  __syncthreads();
  int64_t* const out = p.out + b * p.capacity;
  int64_t slots = 0;  // of the tiles before
  for (int tile = 0; tile < N; tile += threads * kComplementItems) {
    const int first = tile + thread * kComplementItems, left = N - first;
    const unsigned valid = left >= kComplementItems ? 0xffu : left > 0 ? (1u << left) - 1u : 0u;
    const unsigned others = valid == 0 ? 0u : ~(named[first / 32] >> (first % 32)) & valid;
    uint32_t total;
    int64_t slot = slots + block_exclusive_sum(static_cast<uint32_t>(__popc(others)), warp_sums, total);
    for (unsigned rest = others; rest != 0; rest &= rest - 1, ++slot) {
      if (slot < p.capacity) out[slot] = first + __ffs(static_cast<int>(rest)) - 1;
    }
    slots += total;
  }
  for (int64_t i = slots + thread; i < p.capacity; i += threads) out[i] = -1;
}

}  // namespace select
}  // namespace tokensieve

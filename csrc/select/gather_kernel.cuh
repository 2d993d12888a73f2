// gather_tokens and its backward: tokens of several tensors by one index list, in one launch.
//
// In: up to 8 tensors [B, N, M, W bytes], strided; index int64 [B, K]. Out: [B, K, M, W] contiguous (gather) or [B, N, M, W] (scatter).
// Algorithm: a block owns a slice of the output tokens of one batch row and copies it for all tensors. It first writes the source token of
//   every slot of its slice to shared memory: gather reads its part of the list; scatter inverts the list (reads all of it, keeps what
//   falls into the slice; unlisted tokens are zero-filled by the same loop, so there is no memset launch and nothing is written twice). A
//   power of two of lanes shares a token; each lane has up to four vectors in flight. The vector width is chosen per tensor (16 bytes for
//   a hidden state beside 8 for int64 positions), not the least of all.
// Work: bytes = 2 B K sum(M W) + 8 B K. Floor on H200: 704 x 4096 bf16 = 11.5 MB, 2.4 us at 4.8 TB/s; under about 9 MB launch-bound.
// Launch: grid.x = B x slices, 256 threads. Deterministic: plain stores, no atomics. A scatter's indices must be unique in a row.
// Limits: a token below 2^31 bytes, N and K below 2^31. Scatter reads 8 K bytes of index (L2) in every block.
#pragma once

#include "select/gather_copy.cuh"

namespace tokensieve {
namespace select {

__global__ void __launch_bounds__(1024) gather_kernel(const CopyArgs a) {
  SIMT_DYN_SHARED(int, source);
  const Slice s = this_slice(a);
  const int64_t* index = a.index + s.b * a.index_stride + s.begin;
  for (int i = static_cast<int>(threadIdx.x); i < s.count; i += static_cast<int>(blockDim.x)) {
    const int64_t token = index[i];
    source[i] = token >= 0 && token < a.N ? static_cast<int>(token) : -1;
  }
  __syncthreads();
  copy_tokens(a, s.b, s.begin, s.count, source);
}

__global__ void __launch_bounds__(1024) scatter_rows_kernel(const CopyArgs a) {
  SIMT_DYN_SHARED(int, source);
  const Slice s = this_slice(a);
  for (int i = static_cast<int>(threadIdx.x); i < s.count; i += static_cast<int>(blockDim.x)) source[i] = -1;
  __syncthreads();
  const int64_t* index = a.index + s.b * a.index_stride;
  for (int k = static_cast<int>(threadIdx.x); k < a.K; k += static_cast<int>(blockDim.x)) {
    const int64_t at = index[k] - s.begin;
    if (at >= 0 && at < s.count) source[at] = k;
  }
  __syncthreads();
  copy_tokens(a, s.b, s.begin, s.count, source);
}

}  // namespace select
}  // namespace tokensieve

// The first sweep (colsum_rows.cuh) on the warpgroup tensor cores of sm_90a, without a bias. Behind the plan, off unless asked for
// (TOKENSIEVE_WGMMA=1): it has only run in the host SIMT runtime so far.
//
// In, out, splits, determinism: as row_kernel. Algorithm: query rows stationary, keys streamed, as colsum_wgmma_tiles.cuh says; every thread
//   keeps the maximum and the sum of its own columns of four rows.
// Work: the products and exponentials of colsum_wgmma_columns.cuh, and 4 instructions an element where that has 3 (the maximum).
//   ESTIMATE, nothing was measured: 0.7 of the floor.
#pragma once

#include "score/colsum_rows.cuh"
#include "score/colsum_wgmma_tiles.cuh"

namespace tokensieve {
namespace colsum {

template <typename T, int kSteps>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_row_kernel(const Args a) {
  SIMT_SHARED(int, last_key, [kWgmmaThreads / 32]);
  SIMT_SHARED(int, is_last);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  const ScoreParams& p = a.p;
  const RowBlock block(a);
  const int b = block.b, h = block.h, D = static_cast<int>(p.D), thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = static_cast<int64_t>(block.tile) * kWgmmaRows;
  const int count = clamp_to(p.L - first_row, kWgmmaRows);
  const WarpRows rows_at = {wgmma_warp_row(), kCols};
  const float scale = row_scale(p.scale);

  Halves<T, kSteps> halves(dynamic);
  halves.load(static_cast<const T*>(p.query) + b * p.query_stride[0] + h * p.query_stride[1] + first_row * p.query_stride[2],
              p.query_stride[2], count, D, row_flip<T>(p.scale));

  const RowEnds<2> ends(a, rows_at, b, first_row);
  if (thread % 32 == 0) last_key[thread / 32] = ends.most;
  __syncthreads();
  int block_most = 0;
#pragma unroll
  for (int most : last_key) block_most = max(block_most, most);
  const int begin = static_cast<int>(a.scan_begin), tiles = block_most <= begin ? 0 : (block_most - begin + kCols - 1) / kCols;
  const int items = tiles <= block.split ? 0 : (tiles - block.split + a.row_splits - 1) / a.row_splits;

  const int keys = static_cast<int>(a.scan_end);
  const T* key = static_cast<const T*>(p.key) + b * p.key_stride[0] + h / (p.H / p.Hkv) * p.key_stride[1];
  float maximum[2][2] = {{-infinity(), -infinity()}, {-infinity(), -infinity()}}, sum[2][2] = {};
  const auto key_of = [&](int item) { return begin + (block.split + item * a.row_splits) * kCols; };
  const auto fetch = [&](int item) {
    stream_swizzled<T, kSteps>(halves.buffer(item), key, p.key_stride[2], key_of(item), keys, D);
    return 0;
  };
  const auto keep = [](int, int) {};
  const auto take = [&](int half, const float (&acc)[1][8][4], int item) {
    const int k0 = key_of(item);
    if (k0 >= ends.most) return;  // the whole warp
    const bool masked = k0 + kCols > ends.least;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float value[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) value[n] = acc[0][n / 2][2 * i + n % 2];
      if (masked) mask_row<false>(a, b, h, 0, k0 + thread % 4 * 2, ends.end[half][i], scale, value);
      add_to_row(value, scale, maximum[half][i], sum[half][i]);
    }
  };
  halves.sweep(items, fetch, keep, take);
  finish_row_block(a, block, rows_at, first_row, count, maximum, sum, &is_last);
}

template <typename T, int kSteps>
Status launch_wgmma_rows(const Args& a, void* stream) {
  const int64_t blocks = a.p.B * a.p.H * a.row_tiles * a.row_splits;
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  return simt::launch(wgmma_row_kernel<T, kSteps>, dim3(static_cast<unsigned>(blocks)), dim3(kWgmmaThreads),
                      static_cast<size_t>(wgmma_shared_bytes(kSteps)), stream, a);
}

}  // namespace colsum
}  // namespace tokensieve

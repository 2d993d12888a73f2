// The second sweep of colsum_kernel.cuh on the warpgroup tensor cores of sm_90a: softmax, sums over rows, no bias but a mask of keys.
// Behind the plan, off unless asked for (TOKENSIEVE_WGMMA=1): it has only run in the host SIMT runtime so far.
//
// In, out, partial results, determinism: as column_kernel, whose plan, row table and last step it shares. Algorithm: keys stationary, query
//   rows streamed, as colsum_wgmma_tiles.cuh says.
// Work: as column_kernel. A tile of 64 rows at D = 128 is 1024 clocks of an SM's tensor cores and 1024 of its MUFU. Floor on H200:
//   LLaVA-NeXT 2944 x 32 x 128 causal 45 us, Qwen 16k 28/4 x 128 causal 1218 us. ESTIMATE, nothing was measured: 0.75 of it where both pipes
//   overlap, 60 us and 1.6 ms; at D <= 80 the exponentials bound both forms and little is won. The 4 tiles that the causal diagonal
//   crosses are computed whole: 9 % of NeXT's, 2 % of Qwen's.
// Code (nvcc 13.0, sm_90a, SASS, D = 128): no wgmma is serialised. Of the about 460 instructions of a warp and tile 208 are FFMA, MUFU, FFMA
//   and shared loads of its 64 elements a thread, 16 HGMMA, 100 the descriptors around them, 55 the copies; two warps a scheduler
//   issue 920 in the tile's 1024 clocks. 209 registers at D = 128, 180 at D = 64, no spills: one block of 8 warps an SM.
#pragma once

#include "score/colsum_kernel.cuh"
#include "score/colsum_wgmma_tiles.cuh"

namespace tokensieve {
namespace colsum {

// A tile added to the sums of a half's keys. `key`: the warp's first; `buffer`: the row table's.
__device__ __forceinline__ void add_half(const float (&acc)[1][8][4], const RowTable& table, int buffer, int key, float scale,
                                         float (&sum)[1][2]) {
  const int* range = table.bounds + buffer * (kCols / 16);
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const float4* facts = table.facts + buffer * (kCols / 2);
  const int* ends = table.end + buffer * kCols;
  if (key >= max(range[1], range[3])) return;
  if (key + 16 > min(range[0], range[2])) {
    add_lean<true>(acc, facts, ends, key + g, scale, sum);
  } else {
    add_lean<false>(acc, facts, ends, key + g, scale, sum);
  }
}

template <typename T, int kSteps>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_column_kernel(const Args a) {
  SIMT_SHARED(float4, facts, [kWgmmaStages * kCols / 2]);
  SIMT_SHARED(int, ends, [kWgmmaStages * kCols]);
  SIMT_SHARED(int, bounds, [kWgmmaStages * kCols / 16]);
  SIMT_SHARED(float, parts, [kWgmmaThreads / 32]);
  SIMT_SHARED(int, is_last);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  const ScoreParams& p = a.p;
  const RowTable table = {facts, nullptr, ends, bounds};
  const ColumnBlock block(a);
  const int split = block.split, kv_head = block.kv_head, b = block.b;
  const int D = static_cast<int>(p.D), L = static_cast<int>(p.L), group = static_cast<int>(p.H / p.Hkv);
  const int64_t R = p.range_end - p.range_begin, tile_key = p.range_begin + static_cast<int64_t>(block.tile) * kWgmmaRows;
  const int count = clamp_to(p.range_end - tile_key, kWgmmaRows), thread = static_cast<int>(threadIdx.x), warp_row = wgmma_warp_row();
  const int first_key = static_cast<int>(tile_key) + warp_row;
  const float scale = p.scale * kLog2E;

  Halves<T, kSteps> halves(dynamic);
  halves.load(static_cast<const T*>(p.key) + b * p.key_stride[0] + kv_head * p.key_stride[1] + tile_key * p.key_stride[2], p.key_stride[2],
              count, D, 0);

  const RowTiles rows_of(a, tile_key, kCols, split);
  const int first = rows_of.first, per_head = rows_of.count;
  float sum[2][1][2] = {};
  const auto write = [&](int64_t unit) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = quad_sum(sum[i / 2][0][i % 2]);
      const int k = warp_row + i / 2 * kCols + i % 2 * 8 + thread % 32 / 4;
      if (thread % 4 == 0 && k < count) a.partial[unit * R + (tile_key - p.range_begin) + k] = value;
    }
  };
  const auto write_head = [&](int h) { write((static_cast<int64_t>(split) * p.B + b) * p.H + h); };

  int next_head = kv_head * group, next_row = first * kCols, next_tile = 0;  // of the head
  const T* query = static_cast<const T*>(p.query) + b * p.query_stride[0] + next_head * p.query_stride[1];
  const auto fetch = [&](int item) {
    stream_swizzled<T, kSteps>(halves.buffer(item), query, p.query_stride[2], next_row, L, D);
    const RowFacts r = thread < kCols ? row_facts(a, b, next_head, next_row + thread) : RowFacts{};
    next_row += a.col_splits * kCols;
    if (++next_tile == per_head) ++next_head, next_row = first * kCols, next_tile = 0, query += p.query_stride[1];
    return r;
  };
  const auto keep = [&](int item, const RowFacts& r) { store_facts(table, item % kWgmmaStages, kCols, r, false); };
  int head = kv_head * group, tile_of_head = 0;
  const auto take = [&](int half, const float (&acc)[1][8][4], int item) {
    add_half(acc, table, item % kWgmmaStages, first_key + half * kCols, scale, sum[half]);
    if (half == 0 || !a.per_head || ++tile_of_head < per_head) return;
    write_head(head++);
    tile_of_head = 0;
    sum[0][0][0] = sum[0][0][1] = sum[1][0][0] = sum[1][0][1] = 0.0f;
  };
  halves.sweep(group * per_head, fetch, keep, take);

  if (!a.per_head) write(static_cast<int64_t>(kv_head * a.col_splits + split) * p.B + b);
  if (a.per_head && per_head == 0) {
    for (int i = 0; i < group; ++i) write_head(kv_head * group + i);
  }
  if (a.with_lse && split == 0) copy_lse(a, b, kv_head, group, block.tile);
  finish_tile<kWgmmaRows>(a, b, block.tile, parts, &is_last);
}

template <typename T, int kSteps>
Status launch_wgmma_columns(const Args& a, void* stream) {
  const int64_t blocks = a.p.B * a.p.Hkv * a.key_tiles * a.col_splits;
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  return simt::launch(wgmma_column_kernel<T, kSteps>, dim3(static_cast<unsigned>(blocks)), dim3(kWgmmaThreads),
                      static_cast<size_t>(wgmma_shared_bytes(kSteps)), stream, a);
}

}  // namespace colsum
}  // namespace tokensieve

// The second sweep of colsum_kernel.cuh on the warpgroup tensor cores of sm_90a: 16-bit types, D <= 128, softmax, sums over rows, no bias.
// Behind the plan, off unless asked for (TOKENSIEVE_WGMMA=1): it has only run in the host SIMT runtime so far.
//
// In, out, partial results, determinism: as column_kernel, whose plan, row table and last step it shares.
// Algorithm: a block of two warpgroups owns 256 keys of one key head, 128 a warpgroup, as two halves of 64 (the M side of wgmma) whose A
//   fragments stay in registers. Query rows stream by in tiles of 64 (cp.async, four buffers, 128-byte swizzle) and are the B operand,
//   which wgmma reads from shared memory by itself: no fragment loads in the loop. The halves take turns: while the exponentials of one
//   are computed, the products of the other run, across tiles too. One barrier a tile.
// Work: as column_kernel. A tile of 64 rows at D = 128 is 1024 clocks of an SM's tensor cores and 1024 of its MUFU. Floor on H200:
//   LLaVA-NeXT 2944 x 32 x 128 causal 45 us, Qwen 16k 28/4 x 128 causal 1218 us. ESTIMATE, nothing was measured: 0.75 of it where both pipes
//   overlap, 60 us and 1.6 ms; at D <= 80 the exponentials bound both forms and little is won. The 4 tiles that the causal diagonal
//   crosses are computed whole: 9 % of NeXT's, 2 % of Qwen's.
// Code (nvcc 13.0, sm_90a, SASS, D = 128): no wgmma is serialised. Of the about 460 instructions of a warp and tile 208 are FFMA, MUFU, FFMA
//   and shared loads of its 64 elements a thread, 16 HGMMA, 100 the descriptors around them, 55 the copies; two warps a scheduler
//   issue 920 in the tile's 1024 clocks. 213 registers at D = 128, 182 at D = 64, no spills: one block of 8 warps an SM.
// Limits: rows 16-byte aligned (others take column_kernel). Shared memory: 64 KB at D > 64, 32 KB below, and 1 KB to align it.
#pragma once

#include "score/colsum_kernel.cuh"

namespace tokensieve {
namespace colsum {

// Byte of 16-byte part `part` of row `row` in a tile of 64 rows: panels of 64 rows x 128 bytes, as wgmma_m64n64k16 reads them.
__device__ __forceinline__ int swizzled(int row, int part) { return part / 8 * kPanelBytes + row * 128 + (part % 8 ^ row % 8) * 16; }

// 64 rows from row `first` on (zeros from `count` on, and past D). Complete after cp_async_wait and a barrier.
template <typename T, int kSteps>
__device__ __forceinline__ void stream_swizzled(unsigned char* tile, const T* base, int64_t stride, int first, int count, int D) {
  constexpr int kLanes = wgmma_tile_bytes(kSteps) / kCols / 16,
                kRows = kWgmmaThreads / kLanes;  // 8 or 16 lanes a row, a multiple of 8 rows
  const int row = static_cast<int>(threadIdx.x) / kLanes, part = static_cast<int>(threadIdx.x) % kLanes;
  if (part >= 2 * kSteps) return;  // the second panel of D = 80
  const T* from = base + (first + row) * stride + 8 * part;
  unsigned char* to = tile + swizzled(row, part);
#pragma unroll
  for (int i = 0; i < kCols; i += kRows) {
    const bool valid = first + row + i < count && 8 * part < D;
    simt::cp_async<16>(to + i * 128, valid ? from : base, valid ? 16 : 0);
    from += kRows * stride;
  }
}

// 64 keys x 64 query rows in flight: this thread's accumulators and the fragments of its keys.
template <typename T, int kSteps>
struct Half {
  uint32_t fragment[kSteps][4];
  float acc[1][8][4];  // columns [8 n, 8 n + 8) of the warp's 16 keys
  float sum[1][2] = {};

  // The warp's keys from a tile that holds the half's 64.
  __device__ __forceinline__ void load(const unsigned char* tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) simt::ldmatrix_x4(fragment[j], tile + swizzled(row, 2 * j + lane / 16));
  }

  __device__ __forceinline__ void start(const unsigned char* tile) {
    simt::wgmma_fence();
#pragma unroll
    for (int j = 0; j < kSteps; ++j) simt::wgmma_m64n64k16<T>(acc[0], fragment[j], tile + j / 4 * kPanelBytes, j % 4, j > 0);
    simt::wgmma_commit();
  }

  // Adds a tile to the sums. `key`: the warp's first; `buffer`: the row table's.
  __device__ __forceinline__ void add(const RowTable& table, int buffer, int key, float scale) {
    const int* range = table.bounds + buffer * (kCols / 16);
    const int last = key + 16, g = static_cast<int>(threadIdx.x) % 32 / 4;
    const float4* facts = table.facts + buffer * (kCols / 2);
    const int* ends = table.end + buffer * kCols;
    if (key >= max(range[1], range[3])) return;
    if (last > min(range[0], range[2])) {
      add_lean<true>(acc, facts, ends, key + g, scale, sum);
    } else {
      add_lean<false>(acc, facts, ends, key + g, scale, sum);
    }
  }
};

template <typename T, int kSteps>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_column_kernel(const Args a) {
  constexpr int kTileBytes = wgmma_tile_bytes(kSteps);
  SIMT_SHARED(float4, facts, [kWgmmaStages * kCols / 2]);
  SIMT_SHARED(int, ends, [kWgmmaStages * kCols]);
  SIMT_SHARED(int, bounds, [kWgmmaStages * kCols / 16]);
  SIMT_SHARED(float, parts, [kWgmmaThreads / 32]);
  SIMT_SHARED(int, is_last);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  unsigned char* const tiles = dynamic + (kSwizzleAlign - reinterpret_cast<uintptr_t>(dynamic) % kSwizzleAlign) % kSwizzleAlign;
  const ScoreParams& p = a.p;
  const RowTable table = {facts, nullptr, ends, bounds};
  const ColumnBlock block(a);
  const int tile = block.tile, split = block.split, kv_head = block.kv_head, b = block.b;
  const int D = static_cast<int>(p.D), group = static_cast<int>(p.H / p.Hkv);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t R = p.range_end - p.range_begin, tile_key = p.range_begin + static_cast<int64_t>(tile) * kWgmmaKeys;
  const int count = clamp_to(p.range_end - tile_key, kWgmmaKeys);
  const int warpgroup_key = warp / 4 * 128 + warp % 4 * 16;  // the warp's first key of the first half, from tile_key on
  const int first_key = static_cast<int>(tile_key) + warpgroup_key;
  const float scale = p.scale * kLog2E;

  Half<T, kSteps> low, high;
  const T* const key = static_cast<const T*>(p.key) + b * p.key_stride[0] + kv_head * p.key_stride[1] + tile_key * p.key_stride[2];
#pragma unroll 1
  for (int i = 0; i < kWgmmaKeys / kCols; ++i) {
    stream_swizzled<T, kSteps>(tiles + i * kTileBytes, key, p.key_stride[2], i * kCols, count, D);
  }
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  __syncthreads();
  low.load(tiles + warp / 4 * 2 * kTileBytes);
  high.load(tiles + (warp / 4 * 2 + 1) * kTileBytes);
  __syncthreads();  // the buffers are free for query rows

  const RowTiles rows_of(a, tile_key, kCols, split);
  const int first = rows_of.first, per_head = rows_of.count, items = group * per_head;
  const auto write = [&](int64_t unit) {
    const int t = lane % 4, g = lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = quad_sum(i < 2 ? low.sum[0][i % 2] : high.sum[0][i % 2]);
      const int k = warpgroup_key + i / 2 * 64 + i % 2 * 8 + g;
      if (t == 0 && k < count) a.partial[unit * R + (tile_key - p.range_begin) + k] = value;
    }
  };
  const auto write_head = [&](int h) { write((static_cast<int64_t>(split) * p.B + b) * p.H + h); };
  // Asks for the next tile of query rows; always one group of copies, empty past the end.
  int next_head = kv_head * group, next_row = first * kCols, next_tile = 0;  // of the head
  const T* query = static_cast<const T*>(p.query) + b * p.query_stride[0] + next_head * p.query_stride[1];
  const auto prefetch = [&](int item) {
    RowFacts r = {};
    if (item < items) {
      stream_swizzled<T, kSteps>(tiles + item % kWgmmaStages * kTileBytes, query, p.query_stride[2], next_row, static_cast<int>(p.L), D);
      if (static_cast<int>(threadIdx.x) < kCols) r = row_facts(a, b, next_head, next_row + static_cast<int>(threadIdx.x));
      next_row += a.col_splits * kCols;
      if (++next_tile == per_head) ++next_head, next_row = first * kCols, next_tile = 0, query += p.query_stride[1];
    }
    simt::cp_async_commit();
    return r;
  };
  // Tile `item` has arrived, and nobody reads tile item - 2 any more.
  const auto arrive = [] {
    simt::cp_async_wait<kWgmmaStages - 3>();
    simt::fence_async_shared();
    __syncthreads();
  };

#pragma unroll 1
  for (int item = 0; item < kWgmmaStages - 1; ++item) store_facts(table, item, kCols, prefetch(item), false);
  simt::cp_async_wait<kWgmmaStages - 2>();
  simt::fence_async_shared();
  __syncthreads();
  low.start(tiles);
  simt::wgmma_wait<0>(low.acc[0]);
#pragma unroll 1
  for (int item = 0; item < items; ++item) {
    const int buffer = item % kWgmmaStages;
    high.start(tiles + buffer * kTileBytes);
    low.add(table, buffer, first_key, scale);
    arrive();
    const RowFacts next = prefetch(item + kWgmmaStages - 1);
    low.start(tiles + (item + 1) % kWgmmaStages * kTileBytes);  // past the last tile: of what lies there, for nobody
    simt::wgmma_wait<1>(high.acc[0]);
    high.add(table, buffer, first_key + 64, scale);
    simt::wgmma_wait<0>(low.acc[0]);
    store_facts(table, (item + kWgmmaStages - 1) % kWgmmaStages, kCols, next, false);
    if (a.per_head && (item + 1) % per_head == 0) {
      write_head(kv_head * group + item / per_head);
      low.sum[0][0] = low.sum[0][1] = high.sum[0][0] = high.sum[0][1] = 0.0f;
    }
  }
  simt::cp_async_wait<0>();
  if (!a.per_head) write(static_cast<int64_t>(kv_head * a.col_splits + split) * p.B + b);
  if (a.per_head && per_head == 0) {
    for (int i = 0; i < group; ++i) write_head(kv_head * group + i);
  }
  if (a.with_lse && split == 0) copy_lse(a, b, kv_head, group, tile);
  finish_tile(a, b, tile, tile_key - p.range_begin, count, parts, &is_last);
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

// Tiles of the sweeps over all query rows on the warpgroup tensor cores of sm_90a: as colsum_tiles.cuh, with other hands. A block of two
// warpgroups owns 256 rows of the stationary operand, 128 a warpgroup, as two halves of 64 (the M side of wgmma) whose A fragments stay in
// registers. The other operand streams by in tiles of 64 rows (cp.async, four buffers, 128-byte swizzle) and is B, which wgmma reads from
// shared memory by itself: no fragment loads in the loop. The halves take turns: while the exponentials of one are computed, the products
// of the other run, across tiles too. One barrier a tile.
// For 16-bit types, D <= 128 and rows that are 16-byte aligned. Shared memory: 64 KB at D > 64, 32 KB below, and 1 KB to align it.
#pragma once

#include "device/simt.h"
#include "score/colsum_args.h"

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

// 64 stationary rows (a warp 16 of them) x 64 streamed ones: the fragments of the first and the accumulators.
template <typename T, int kSteps>
struct Half {
  uint32_t fragment[kSteps][4];
  float acc[1][8][4];  // [0][n]: streamed rows [8 n, 8 n + 8), the accumulator fragment of mma_m16n8k16

  // From a tile that holds the half's 64 rows. flip: the sign bits to turn over.
  __device__ __forceinline__ void load(const unsigned char* tile, uint32_t flip) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      simt::ldmatrix_x4(fragment[j], tile + swizzled(row, 2 * j + lane / 16));
#pragma unroll
      for (uint32_t& r : fragment[j]) r ^= flip;
    }
  }

  __device__ __forceinline__ void start(const unsigned char* tile) {
    simt::wgmma_fence();
#pragma unroll
    for (int j = 0; j < kSteps; ++j) simt::wgmma_m64n64k16<T>(acc[0], fragment[j], tile + j / 4 * kPanelBytes, j % 4, j > 0);
    simt::wgmma_commit();
  }
};

// Rows of the block that this warp holds: 16 from the first on, 16 from 64 further on.
__device__ __forceinline__ int wgmma_warp_row() {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return warp / 4 * 2 * kCols + warp % 4 * 16;
}

template <typename T, int kSteps>
struct Halves {
  static constexpr int kTileBytes = wgmma_tile_bytes(kSteps);
  unsigned char* tiles;  // [kWgmmaStages]
  Half<T, kSteps> low, high;

  // Takes the block's dynamic shared memory.
  __device__ __forceinline__ explicit Halves(unsigned char* dynamic)
      : tiles(dynamic + (kSwizzleAlign - reinterpret_cast<uintptr_t>(dynamic) % kSwizzleAlign) % kSwizzleAlign) {}
  __device__ __forceinline__ unsigned char* buffer(int item) const { return tiles + item % kWgmmaStages * kTileBytes; }

  // The stationary rows, base + row * stride for row < count, through the buffers, which are free afterwards.
  __device__ __forceinline__ void load(const T* base, int64_t stride, int count, int D, uint32_t flip) {
#pragma unroll 1
    for (int i = 0; i < kWgmmaStages; ++i) stream_swizzled<T, kSteps>(buffer(i), base, stride, i * kCols, count, D);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    __syncthreads();
    const int first = wgmma_warp_row() / kCols;
    low.load(buffer(first), flip);
    high.load(buffer(first + 1), flip);
    __syncthreads();
  }

  // fetch(item) streams a tile to buffer(item) and returns what keep(item, ...) puts beside it; take(half, acc, item) reads both.
  template <typename Fetch, typename Keep, typename Take>
  __device__ __forceinline__ void sweep(int items, const Fetch& fetch, const Keep& keep, const Take& take) {
    const auto ask = [&](int item) {
      decltype(fetch(0)) beside = {};
      if (item < items) beside = fetch(item);
      simt::cp_async_commit();  // always a group, so that waits can count; the last ones are empty
      return beside;
    };
#pragma unroll 1
    for (int item = 0; item < kWgmmaStages - 1; ++item) keep(item, ask(item));
    simt::cp_async_wait<kWgmmaStages - 2>();
    simt::fence_async_shared();
    __syncthreads();
    low.start(buffer(0));
    simt::wgmma_wait<0>(low.acc[0]);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      high.start(buffer(item));
      take(0, low.acc, item);
      simt::cp_async_wait<kWgmmaStages - 3>();
      simt::fence_async_shared();
      __syncthreads();  // tile item + 1 has arrived, and nobody reads tile item - 1 any more
      const auto beside = ask(item + kWgmmaStages - 1);
      low.start(buffer(item + 1));  // past the last tile: of what lies there, for nobody
      simt::wgmma_wait<1>(high.acc[0]);
      take(1, high.acc, item);
      keep(item + kWgmmaStages - 1, beside);
      simt::wgmma_wait<0>(low.acc[0]);  // no product is in flight where the loop turns: ptxas would make them wait for each other
    }
  }
};

}  // namespace colsum
}  // namespace tokensieve

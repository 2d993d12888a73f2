// Dot products of all pairs of tokens of an image, 64 x 64 tiles at a time: what select_diverse and knn_density read their distances from.
// 16 to 64 channels a step from shared memory (tile.cuh); the upper half of the matrix is computed and written to both of its places.
#pragma once

#include "similarity/tile.cuh"

namespace tokensieve {
namespace similarity {

struct Gram {
  const void* x;  // [B, N, C]
  int64_t batch_stride, row_stride, N, C;
  float* dots;     // [B][rows][N], from row tile `first_tile` on; null: the diagonal alone
  float* squares;  // [B][N]: the diagonal; null: not wanted
  int first_tile, row_tiles, tiles;
  bool wide;

  // The whole matrix takes half of the products; a strip takes all of its own.
  __host__ __device__ __forceinline__ bool whole() const { return row_tiles == tiles; }
  __host__ __device__ __forceinline__ int blocks_per_image() const { return dots == nullptr ? tiles : row_tiles * tiles; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) gram_kernel(const Gram a) {
  SIMT_DYN_SHARED(unsigned char, shared);
  const int64_t b = blockIdx.x / a.blocks_per_image();
  const int at = static_cast<int>(blockIdx.x % a.blocks_per_image());
  const int ti = a.dots == nullptr ? at : a.first_tile + at / a.tiles, tj = a.dots == nullptr ? at : at % a.tiles;
  if (a.whole() && ti > tj) return;
  const T* base = static_cast<const T*>(a.x) + b * a.batch_stride;
  float acc[8][4];
  tile_dots<T>(acc, shared, {base, a.row_stride, int64_t{ti} * kTile, a.N, a.wide}, {base, a.row_stride, int64_t{tj} * kTile, a.N, a.wide},
               a.C);
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{ti} * kTile + static_cast<int>(threadIdx.x) / 32 * 16 + g, first_row = int64_t{a.first_tile} * kTile;
  const int64_t end = first_row + int64_t{a.row_tiles} * kTile, rows = (end < a.N ? end : a.N) - first_row;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first + 8 * (i / 2), column = int64_t{tj} * kTile + 8 * n + 2 * t + i % 2;
      if (row >= a.N || column >= a.N || (a.whole() && row > column)) continue;
      if (row == column && a.squares != nullptr) a.squares[b * a.N + row] = acc[n][i];
      if (a.dots == nullptr) continue;
      a.dots[(b * rows + row - first_row) * a.N + column] = acc[n][i];
      if (a.whole()) a.dots[(b * a.N + column) * a.N + row] = acc[n][i];
    }
  }
}

}  // namespace similarity
}  // namespace tokensieve

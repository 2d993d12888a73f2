// Tiles of the sweeps over all query rows: a stationary operand (16-row tensor-core tiles a warp owns) and a streamed one, whose tiles
// arrive by cp.async in two buffers. Both sweeps use the same code with the roles of queries and keys exchanged.
//
// As in score_dots.cuh, a dot product does not care how the elements of D are paired: lane (g = lane / 4, t = lane % 4) holds the 16 bytes
// [32 j + 8 t, 32 j + 8 t + 8) of a row, registers 0, 1 for one mma and 2, 3 for the next. So the stationary rows go from global memory
// straight to registers, once per block and head, and stay there (16 steps x row_tiles x 4 registers), and a streamed row is read from
// shared memory with one 16-byte load a lane for two steps: 512 bytes a warp, without conflicts, as fast as ldmatrix. An odd last step
// (D = 80) has 8 bytes a lane. Each loaded fragment feeds row_tiles mma: 4 mma (2048 FMA each) per 256 bytes.
#pragma once

#include "device/simt.h"
#include "score/colsum_args.h"
#include "score/score_dots.cuh"

namespace tokensieve {
namespace colsum {

// Half of a 16-byte part: elements [d, d + 4) of a row of D 16-bit elements; zero past D.
template <typename T>
__device__ __forceinline__ uint2 load_half_part(const T* row, int d, int D, bool wide) {
  if (wide) return d < D ? *reinterpret_cast<const uint2*>(row + d) : make_uint2(0, 0);
  const uint4 part = score::load_row_part(row, d, D < d + 4 ? D : d + 4, false);
  return make_uint2(part.x, part.y);
}

template <typename T, int kSteps>
struct Core {
  static constexpr int kTiles = row_tiles(kSteps);     // of 16 stationary rows
  static constexpr int kNTiles = kSteps <= 8 ? 2 : 4;  // of 8 streamed rows whose accumulators are alive at once: 32 registers
  static constexpr int kChunk = 8 * kNTiles;
  static constexpr int kRowBytes = tile_row_bytes(kSteps);
  uint32_t fragment[kTiles][kSteps][4];

  static __device__ __forceinline__ int cols(int /*D*/) { return kCols; }
  static __device__ __forceinline__ int row_bytes(int /*D*/) { return kRowBytes; }
  static __device__ __forceinline__ int stationary_bytes(int /*D*/) { return 0; }

  // Rows of this warp: base + row * stride for row < count, zeros beyond. flip: the sign bits to turn over.
  __device__ __forceinline__ void load(const T* base, int64_t stride, int count, int D, bool wide, uint32_t flip,
                                       unsigned char* /*shared*/) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const int first = static_cast<int>(threadIdx.x) / 32 * 16 * kTiles;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int low = first + 16 * m + g;
      const T* row[2] = {base + low * stride, base + (low + 8) * stride};
      const int dim[2] = {low < count ? D : 0, low + 8 < count ? D : 0};
#pragma unroll
      for (int j = 0; j < kSteps / 2; ++j) {
        const uint4 a = score::load_row_part(row[0], 32 * j + 8 * t, dim[0], wide);
        const uint4 b = score::load_row_part(row[1], 32 * j + 8 * t, dim[1], wide);
        set(fragment[m][2 * j], a.x, b.x, a.y, b.y, flip);
        set(fragment[m][2 * j + 1], a.z, b.z, a.w, b.w, flip);
      }
      if constexpr (kSteps % 2 == 1) {
        const uint2 a = load_half_part(row[0], 16 * (kSteps - 1) + 4 * t, dim[0], wide);
        const uint2 b = load_half_part(row[1], 16 * (kSteps - 1) + 4 * t, dim[1], wide);
        set(fragment[m][kSteps - 1], a.x, b.x, a.y, b.y, flip);
      }
    }
  }
  static __device__ __forceinline__ void set(uint32_t (&to)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t flip) {
    to[0] = a ^ flip, to[1] = b ^ flip, to[2] = c ^ flip, to[3] = d ^ flip;
  }

  // acc[m][n] = the warp's rows times streamed rows [8 n, 8 n + 8) of `tile`: the accumulator fragment of device/ptx.h.
  template <int kN>
  __device__ __forceinline__ void dots(float (&acc)[kTiles][kN][4], const unsigned char* /*shared*/, const unsigned char* tile,
                                       int /*D*/) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
    }
    const unsigned char* from = tile + g * kRowBytes + 16 * t;
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
      uint4 part[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) part[n] = *reinterpret_cast<const uint4*>(from + 8 * n * kRowBytes + 64 * j);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) simt::mma_m16n8k16<T>(acc[m][n], fragment[m][2 * j], {part[n].x, part[n].y});
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) simt::mma_m16n8k16<T>(acc[m][n], fragment[m][2 * j + 1], {part[n].z, part[n].w});
      }
    }
    if constexpr (kSteps % 2 == 1) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint2 part = *reinterpret_cast<const uint2*>(tile + (8 * n + g) * kRowBytes + 32 * (kSteps - 1) + 8 * t);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) simt::mma_m16n8k16<T>(acc[m][n], fragment[m][kSteps - 1], {part.x, part.y});
      }
    }
  }
};

// float32: FFMA (no TF32: 10 mantissa bits would change selections), with the accumulators where the tensor cores would have them, so
// that everything after the dot products is the same. Both operands in shared memory: 12 16-byte loads for 128 FFMA.
template <>
struct Core<float, 0> {
  static constexpr int kTiles = 1, kNTiles = 4, kChunk = 32;

  static __device__ __forceinline__ int cols(int D) { return float_cols(D); }
  static __device__ __forceinline__ int row_bytes(int D) { return static_cast<int>(float_row_bytes(D)); }
  static __device__ __forceinline__ int stationary_bytes(int D) { return stationary_rows(0) * row_bytes(D); }

  // All rows of the block; the caller's next barrier makes them visible.
  __device__ __forceinline__ void load(const float* base, int64_t stride, int count, int D, bool wide, uint32_t flip,
                                       unsigned char* shared) {
    const int parts = (D + 3) / 4;
    for (int i = static_cast<int>(threadIdx.x); i < stationary_rows(0) * parts; i += kThreads) {
      const int row = i / parts, d = i % parts * 4;
      uint4 part = score::load_row_part(base + row * stride, d, row < count ? D : 0, wide);
      part.x ^= flip, part.y ^= flip, part.z ^= flip, part.w ^= flip;
      *reinterpret_cast<uint4*>(shared + row * row_bytes(D) + 4 * d) = part;
    }
  }

  __device__ __forceinline__ void dots(float (&acc)[1][4][4], const unsigned char* shared, const unsigned char* tile, int D) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4, bytes = row_bytes(D);
    const unsigned char* rows = shared + (static_cast<int>(threadIdx.x) / 32 * 16 + g) * bytes;
#pragma unroll
    for (int n = 0; n < 4; ++n) acc[0][n][0] = acc[0][n][1] = acc[0][n][2] = acc[0][n][3] = 0.0f;
#pragma unroll 1
    for (int d = 0; d < D; d += 4) {
      const float4 low = *reinterpret_cast<const float4*>(rows + 4 * d), high = *reinterpret_cast<const float4*>(rows + 8 * bytes + 4 * d);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 part = *reinterpret_cast<const uint4*>(tile + (8 * n + 2 * t + i) * bytes + 4 * d);
          acc[0][n][i] = score::dot4(acc[0][n][i], low, part);
          acc[0][n][2 + i] = score::dot4(acc[0][n][2 + i], high, part);
        }
      }
    }
  }
};

// Rows [first, first + cols) of `base` (zeros from `count` on) to one of the two buffers. Complete after cp_async_wait and a barrier.
template <typename T, int kSteps>
__device__ __forceinline__ void stream_tile(unsigned char* buffer, const T* base, int64_t stride, int first, int count, int D, bool wide) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  using Core = Core<T, kSteps>;
  const int parts = kSteps > 0 ? 2 * kSteps : (D + 3) / 4, bytes = Core::row_bytes(D);
  for (int i = static_cast<int>(threadIdx.x); i < Core::cols(D) * parts; i += static_cast<int>(blockDim.x)) {
    const int row = i / parts, d = i % parts * kElements;
    const bool valid = first + row < count && d < D;
    const T* from = base + (valid ? (first + row) * stride + d : 0);
    unsigned char* to = buffer + row * bytes + i % parts * 16;
    if (wide) {
      simt::cp_async<16>(to, from, valid ? 16 : 0);
    } else {
      *reinterpret_cast<uint4*>(to) = score::load_row_part(from, 0, valid ? D - d : 0, false);
    }
  }
  simt::cp_async_commit();
}

}  // namespace colsum
}  // namespace tokensieve

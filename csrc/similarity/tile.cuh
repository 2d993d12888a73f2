// A 64 x 64 tile of dot products of rows over C channels, by one block of 4 warps: the shared first half of all similarity kernels.
//
// Chunks of 128 bytes a row arrive by cp.async in two buffers. As in score_dots.cuh, a dot product does not care how its elements are paired:
// lane (g = lane / 4, t = lane % 4) reads the 16 bytes at 64 j + 16 t of a row, two tensor-core steps, for both operands: no ldmatrix. Rows
// are 144 bytes apart in shared memory, so the 16-byte loads of a warp meet no bank twice. 16-bit floats go through mma.sync, float32 through
// FFMA (TF32's 10 bits would change selections) with the accumulators where the tensor cores would leave them.
// The sum of an element depends on its two rows alone, never on its place, so equal rows give equal dot products.
// Work: 2 * 64 * 64 * C flops for 128 * C elements: 32 FMA a byte in 16 bit. ESTIMATE: mma.sync reaches half of an H200's 790 TF/s here.
#pragma once

#include "device/simt.h"

namespace tokensieve {
namespace similarity {

constexpr int kTile = 64, kThreads = 128, kWarps = 4;
constexpr int kChunkBytes = 128, kRowBytes = 144;
constexpr int kOperandBytes = kTile * kRowBytes, kTileBytes = 4 * kOperandBytes;  // two operands, two buffers: 36 KB

// Rows of one operand: [first, count) of them exist, the others are zeros.
template <typename T>
struct Rows {
  const T* base;
  int64_t stride;
  int64_t first, count;
  bool wide;  // base and stride are multiples of 16 bytes

  __device__ __forceinline__ int64_t place(int64_t row) const { return row; }  // in the tensor; negative: a row of zeros
};

struct Nothing {
  __device__ __forceinline__ void operator()(const unsigned char*, const unsigned char*) const {}
};

template <typename T>
__device__ __forceinline__ bool is_wide(const T* base, int64_t batch_stride, int64_t stride) {
  constexpr int64_t kPart = 16 / static_cast<int64_t>(sizeof(T));
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && batch_stride % kPart == 0 && stride % kPart == 0;
}

// Channels [c, c + 128 bytes) of 64 rows to `buffer`; zeros beyond the rows and beyond C.
template <typename T, typename Source>
__device__ inline void load_chunk(unsigned char* buffer, const Source& rows, int64_t c, int64_t C) {
  constexpr int kPart = 16 / static_cast<int>(sizeof(T)), kParts = kChunkBytes / 16;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kParts; i += kThreads) {
    const int64_t row = rows.first + i / kParts, from = c + i % kParts * kPart;
    const int64_t place = row < rows.count ? rows.place(row) : -1, left = place >= 0 ? C - from : 0;
    const int valid = left <= 0 ? 0 : left < kPart ? static_cast<int>(left) : kPart;
    unsigned char* to = buffer + i / kParts * kRowBytes + i % kParts * 16;
    const T* source = rows.base + (valid > 0 ? place * rows.stride + from : 0);
    if (rows.wide) {
      simt::cp_async<16>(to, source, valid * static_cast<int>(sizeof(T)));
    } else {
      T part[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) part[j] = j < valid ? source[j] : T(0.0f);
#pragma unroll
      for (int j = 0; j < kPart; ++j) reinterpret_cast<T*>(to)[j] = part[j];
    }
  }
}

__device__ __forceinline__ float dot4(float sum, const float4& a, const float4& b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// acc[n] += the warp's 16 rows of `x` times rows [8 n, 8 n + 8) of `y`, of one chunk; fragments as in device/ptx.h.
template <typename T>
__device__ __forceinline__ void add_chunk(float (&acc)[8][4], const unsigned char* x, const unsigned char* y) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const unsigned char* low = x + (static_cast<int>(threadIdx.x) / 32 * 16 + g) * kRowBytes;
  const unsigned char* high = low + 8 * kRowBytes;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kChunkBytes / 64; ++j) {
      const uint4 a = *reinterpret_cast<const uint4*>(low + 64 * j + 16 * t), b = *reinterpret_cast<const uint4*>(high + 64 * j + 16 * t);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint4 c = *reinterpret_cast<const uint4*>(y + (8 * n + g) * kRowBytes + 64 * j + 16 * t);
        simt::mma_m16n8k16<T>(acc[n], {a.x, b.x, a.y, b.y}, {c.x, c.y});
        simt::mma_m16n8k16<T>(acc[n], {a.z, b.z, a.w, b.w}, {c.z, c.w});
      }
    }
  } else {
#pragma unroll 2
    for (int j = 0; j < kChunkBytes / 16; ++j) {
      const float4 a = *reinterpret_cast<const float4*>(low + 16 * j), b = *reinterpret_cast<const float4*>(high + 16 * j);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 c = *reinterpret_cast<const float4*>(y + (8 * n + 2 * t + i) * kRowBytes + 16 * j);
          acc[n][i] = dot4(acc[n][i], a, c);
          acc[n][2 + i] = dot4(acc[n][2 + i], b, c);
        }
      }
    }
  }
}

// acc = dot products of the warp's 16 rows of x with 64 rows of y. `shared` has kTileBytes. All threads; ends with a barrier, so that the
// buffers can be used again. each(x, y) sees every chunk: 64 rows of 128 bytes, kRowBytes apart.
template <typename T, typename X = Rows<T>, typename Y = Rows<T>, typename Each = Nothing>
__device__ inline void tile_dots(float (&acc)[8][4], unsigned char* shared, const X& x, const Y& y, int64_t C, const Each& each = {}) {
  constexpr int kStep = kChunkBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int n = 0; n < 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
  const auto prefetch = [&](int64_t c, int buffer) {
    load_chunk<T>(shared + 2 * buffer * kOperandBytes, x, c, C);
    load_chunk<T>(shared + (2 * buffer + 1) * kOperandBytes, y, c, C);
    simt::cp_async_commit();
  };
  prefetch(0, 0);
  int buffer = 0;
#pragma unroll 1
  for (int64_t c = 0; c < C; c += kStep, buffer ^= 1) {
    simt::cp_async_wait<0>();
    __syncthreads();  // this chunk has arrived, and nobody reads the other buffer any more
    if (c + kStep < C) prefetch(c + kStep, buffer ^ 1);
    const unsigned char *const of_x = shared + 2 * buffer * kOperandBytes, *const of_y = of_x + kOperandBytes;
    add_chunk<T>(acc, of_x, of_y);
    each(of_x, of_y);
  }
  simt::cp_async_wait<0>();  // C = 0: the first prefetch is still on its way
  __syncthreads();
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

}  // namespace similarity
}  // namespace tokensieve

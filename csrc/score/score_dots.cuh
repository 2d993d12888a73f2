// Dot products of one pass: up to 64 query rows (shared memory) with the keys of a chunk (global memory), into shared memory.
//
// Keys go straight from global memory to registers, never through shared memory: every key element is used by one warp only, so staging it
// (cp.async + ldmatrix) would add a round trip and take room from the logits. What makes that possible is that a dot product does not
// care in which order the elements of D are paired, so a lane may hold 16 contiguous bytes of a row where ldmatrix would hand it 4 + 4:
//   lane (g = lane / 4, t = lane % 4) loads elements [32 j + 8 t, 32 j + 8 t + 8) of keys g and g + 8, four registers each; registers 0, 1
//   are its A fragment (k = 2t.., 2t + 8..) of one mma, 2, 3 of the next; the query fragments (B) are read with the same permutation.
// One load instruction of a warp touches 8 rows x 64 bytes, whole sectors, each byte once. In flight: a warp asks for 16 keys x 256 bytes
// (D = 128) before its first mma, so 16 warps an SM have up to 64 KB outstanding; 4.3 TB/s x 0.7 us / 132 SMs needs 23 KB.
// Keys are the M side of m16n8k16 (16 keys x 8 query rows): a single row wastes 7/8 of the tensor cores, which still leaves them idle:
// 2 x 8 x 128 FLOP a key of 256 bytes is 8 FLOP a byte, 34 TF/s at 4.3 TB/s of the 790 that the card has.
#pragma once

#include <type_traits>

#include "device/simt.h"
#include "score/score_args.h"

namespace tokensieve {
namespace score {

// Elements [d, d + 16 bytes) of a row of D elements; zero past D. wide (the same for the whole launch): every row is 16-byte aligned and D
// a multiple of 16 bytes. The narrow side shifts one element in at a time: unrolled, its loads cost 60 bytes of spills.
template <typename T>
__device__ __forceinline__ uint4 load_row_part(const T* row, int d, int D, bool wide) {
  if (wide) return d < D ? *reinterpret_cast<const uint4*>(row + d) : make_uint4(0, 0, 0, 0);
  constexpr int kElements = 16 / sizeof(T), kBits = 8 * sizeof(T);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = kElements - 1; i >= 0; --i) {
    high = high << kBits | low >> (64 - kBits);
    low = low << kBits | (d + i < D ? reinterpret_cast<const Bits*>(row)[d + i] : Bits{0});
  }
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}

// Parts `step` elements apart of the rows row + 8 * i * stride of which `valid` (bit i) exist, all asked for before the first is used.
template <int kRows, int kSteps, typename T>
__device__ __forceinline__ void load_parts(uint4 (&out)[kRows][kSteps], const T* row, int64_t stride, unsigned valid, int d, int step,
                                           int D, bool wide) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      out[i][j] = load_row_part(row + 8 * i * stride, d + j * step, (valid >> i & 1u) != 0 ? D : 0, wide);
    }
  }
}

struct DotArgs {
  const unsigned char* queries;  // shared: row_tiles x 8 rows of query_row_bytes, zero-padded
  float* logits;                 // shared: [rows][stride]
  int query_bytes, stride;
  int rows, keys;      // valid ones
  int64_t key_stride;  // elements
  int D;
  bool wide;
};

// 16-bit types: one warp takes 16 keys at a time through the tensor cores.
template <typename T, int kRowTiles>
__device__ __forceinline__ void dots(const T* keys, const DotArgs& a) {
  constexpr int kSteps = 4;  // 128 elements of 16 keys in flight a warp: 32 registers
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int tile = static_cast<int>(threadIdx.x) / 32; tile * kKeyTile < a.keys; tile += warps) {
    const int key = tile * kKeyTile + g;
    const bool low = key < a.keys, high = key + 8 < a.keys;
    const T* const row = keys + static_cast<int64_t>(key) * a.key_stride;
    const unsigned valid = (low ? 1u : 0u) | (high ? 2u : 0u);
    float acc[kRowTiles][4] = {};
#pragma unroll 1
    for (int d0 = 0; d0 < a.D; d0 += 32 * kSteps) {
      uint4 k[2][kSteps];
      load_parts(k, row, a.key_stride, valid, d0 + 8 * t, 32, a.D, a.wide);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        if (d0 + 32 * j >= a.D) break;  // the same for the whole block
        const uint32_t first[4] = {k[0][j].x, k[1][j].x, k[0][j].y, k[1][j].y};
        const uint32_t second[4] = {k[0][j].z, k[1][j].z, k[0][j].w, k[1][j].w};
        const unsigned char* q = a.queries + g * a.query_bytes + (d0 + 32 * j + 8 * t) * static_cast<int>(sizeof(T));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const uint4 part = *reinterpret_cast<const uint4*>(q + r * 8 * a.query_bytes);
          simt::mma_m16n8k16<T>(acc[r], first, {part.x, part.y});
          simt::mma_m16n8k16<T>(acc[r], second, {part.z, part.w});
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = r * 8 + 2 * t;
      float* out = a.logits + row * a.stride + key;
      if (row < a.rows && low) out[0] = acc[r][0];
      if (row + 1 < a.rows && low) out[a.stride] = acc[r][1];
      if (row < a.rows && high) out[8] = acc[r][2];
      if (row + 1 < a.rows && high) out[a.stride + 8] = acc[r][3];
    }
  }
}

__device__ __forceinline__ float dot4(float acc, const float4& a, const uint4& bits) {
  acc = fmaf(a.x, __uint_as_float(bits.x), acc);
  acc = fmaf(a.y, __uint_as_float(bits.y), acc);
  acc = fmaf(a.z, __uint_as_float(bits.z), acc);
  return fmaf(a.w, __uint_as_float(bits.w), acc);
}

// float32: FFMA (no TF32: 10 mantissa bits would change selections). A warp takes 32 keys, a lane a quarter of D of four of them; the four
// partial sums of a key meet in a transpose of three shuffles. 8 rows share a load; more rows read the keys again from L1 and L2.
__device__ __forceinline__ void dots_float(const float* keys, const DotArgs& a) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int tile = static_cast<int>(threadIdx.x) / 32; tile * 32 < a.keys; tile += warps) {
    const float* const row = keys + static_cast<int64_t>(tile * 32 + g) * a.key_stride;
    unsigned valid = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) valid |= tile * 32 + 8 * j + g < a.keys ? 1u << j : 0u;
#pragma unroll 1
    for (int r0 = 0; r0 < a.rows; r0 += 8) {
      float acc[8][4] = {};
#pragma unroll 1
      for (int d = 4 * t; d - 4 * t < a.D; d += 16) {
        uint4 k[4][1];
        load_parts(k, row, a.key_stride, valid, d, 0, a.D, a.wide);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(a.queries + (r0 + r) * a.query_bytes + d * 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[r][j] = dot4(acc[r][j], q, k[j][0]);
        }
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {  // lane t ends with the sum of key 8 t + g
        const bool upper = (t & 2) != 0, odd = (t & 1) != 0;
        const float s0 = (upper ? acc[r][2] : acc[r][0]) + __shfl_xor_sync(simt::kFullMask, upper ? acc[r][0] : acc[r][2], 2);
        const float s1 = (upper ? acc[r][3] : acc[r][1]) + __shfl_xor_sync(simt::kFullMask, upper ? acc[r][1] : acc[r][3], 2);
        const float sum = (odd ? s1 : s0) + __shfl_xor_sync(simt::kFullMask, odd ? s0 : s1, 1);
        const int key = tile * 32 + 8 * t + g;
        if (r0 + r < a.rows && key < a.keys) a.logits[(r0 + r) * a.stride + key] = sum;
      }
    }
  }
}

template <typename T, int kRowTiles>
__device__ __forceinline__ void block_dots(const T* keys, const DotArgs& a) {
  if constexpr (sizeof(T) == 4) {
    dots_float(keys, a);
  } else {
    dots<T, kRowTiles>(keys, a);
  }
}

}  // namespace score
}  // namespace tokensieve

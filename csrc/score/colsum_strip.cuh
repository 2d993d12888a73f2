// attention_scores of all query rows where all keys fit the registers of one block (float16, bfloat16; D <= 64 and N <= 640: CLIP; D <= 80 and
// N <= 768: SigLIP): one product and one exponential an element, the normalisers on the way.
//
// In, out: as colsum_kernel.cuh, for softmax, query_reduction mean and sum, no bias but a mask of keys, no given lse.
// Algorithm: a block owns (batch, key head, a share of the query rows): each warp holds 64 keys in registers for good, rows stream by in
//   tiles of 64 (cp.async, two buffers) and are taken in strips of 16 (D <= 64) or 8. S^T = K Q^T has the keys on the M side, so a row's
//   maximum and sum are over threads and warps, and the keys' scores stay in their thread. Two strips are in flight: while one's
//   exponentials are computed, the next one's products are; one barrier a strip passes on the sums of the one and the maxima of the other.
//   Partial scores [key heads x splits, B, R] (or of every head) are added by finish_kernel (colsum_cuda.cu), a second launch with a block
//   for 32 keys: at batch 1 a single last block would have to read 16 heads x 8 splits x 577 floats alone (5 us).
// Work: 2 D E flops, E exponentials, E = B H L N. Floor on H200, mma / exp: CLIP 577 x 16 x 64 b64 55 / 92 us, b1 0.9 / 1.4; SigLIP
//   729 x 16 x 72 b64 99 / 147 us. Bound by exponentials, if the instructions around them fit: per element FFMA, MUFU, FADD, FFMA and half a
//   FMNMX, beside 8 (4) shuffles and 16 (8) shared loads a thread and strip for the rows' maxima and sums.
//   ESTIMATE, nothing was measured: 0.5 to 0.6 of the exponentials' rate, 170 us (CLIP b64), 270 us (SigLIP b64).
// Launch: one block of up to 12 warps an SM, 161 registers at D = 72, 168 and 88 spilled bytes at D = 64 (loop constants: strips of 8
//   rows would not spill there, but would pay the exchange twice). The plan picks the splits that fill the card and even out the last round.
// Deterministic: every sum has a fixed order. Not finite: a NaN logit makes its row NaN.
#pragma once

#include "score/colsum_finish.cuh"
#include "score/colsum_rows.cuh"

namespace tokensieve {
namespace colsum {

// A strip's place: 8 or 16 rows of one head. Strips of a block follow each other head by head.
struct Strip {
  int head = 0, index = 0;  // of the group; of the head's strips
};

template <bool kMax>
__device__ __forceinline__ float combine(float a, float b) {
  return kMax ? fmaxf(a, b) : a + b;
}

// Over the eight lanes (g) that hold the same 2 kN rows of a strip, and on to `to` [rows]. Each step halves what a lane still holds: 4 or 3
// shuffles where a butterfly for every row takes 12 or 6.
template <bool kMax, int kN>
__device__ __forceinline__ void reduce_keys(const float (&value)[2 * kN], float2* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  const bool upper = (lane & 16) != 0, middle = (lane & 8) != 0;
  float x;
  int column;
  if constexpr (kN == 2) {
    const float first = combine<kMax>(upper ? value[2] : value[0], __shfl_xor_sync(simt::kFullMask, upper ? value[0] : value[2], 16));
    const float second = combine<kMax>(upper ? value[3] : value[1], __shfl_xor_sync(simt::kFullMask, upper ? value[1] : value[3], 16));
    x = combine<kMax>(middle ? second : first, __shfl_xor_sync(simt::kFullMask, middle ? first : second, 8));
    column = (upper ? 8 : 0) + 2 * t + (middle ? 1 : 0);
  } else {
    x = combine<kMax>(upper ? value[1] : value[0], __shfl_xor_sync(simt::kFullMask, upper ? value[0] : value[1], 16));
    x = combine<kMax>(x, __shfl_xor_sync(simt::kFullMask, x, 8));
    column = 2 * t + (upper ? 1 : 0);
  }
  x = combine<kMax>(x, __shfl_xor_sync(simt::kFullMask, x, 4));
  if ((lane & 4) == 0 && (kN == 2 || !middle)) reinterpret_cast<float*>(to)[column] = x;
}

// What all warps left of this thread's 2 kN rows: lane g reads warps g and g + 8, three exchanges give all to all.
template <bool kMax, int kN>
__device__ __forceinline__ void reduce_warps(const float2* from, int warps, float (&value)[2 * kN]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < 2 * kN; ++c) value[c] = kMax ? -infinity() : 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (g + 8 * i >= warps) continue;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 pair = from[(g + 8 * i) * 4 * kN + 4 * n + t];
      value[2 * n] = combine<kMax>(value[2 * n], pair.x), value[2 * n + 1] = combine<kMax>(value[2 * n + 1], pair.y);
    }
  }
#pragma unroll
  for (int c = 0; c < 2 * kN; ++c) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) value[c] = combine<kMax>(value[c], __shfl_xor_sync(simt::kFullMask, value[c], step));
  }
}

template <typename T, int kSteps>
__global__ void __launch_bounds__(32 * max_strip_warps(kSteps), 1) strip_kernel(const Args a) {
  using Core = Core<T, kSteps>;
  constexpr int kRows = strip_rows(kSteps), kN = kRows / 8, kTiles = Core::kTiles, kStripsPerTile = kCols / kRows;
  static_assert(kTiles * 16 == kStripKeys, "a warp holds 64 keys");
  SIMT_SHARED(float2, top_of, [2][max_strip_warps(kSteps)][kRows / 2]);  // of a warp's keys; two strips are in flight
  SIMT_SHARED(float2, sum_of, [2][max_strip_warps(kSteps)][kRows / 2]);
  SIMT_CARVE(unsigned char, even_tile, 0, kCols* Core::kRowBytes);
  SIMT_CARVE(unsigned char, odd_tile, kCols* Core::kRowBytes, kCols* Core::kRowBytes);
  const ScoreParams& p = a.p;
  const int D = static_cast<int>(p.D), group = static_cast<int>(p.H / p.Hkv), warps = static_cast<int>(blockDim.x) / 32;
  const int split = static_cast<int>(blockIdx.x) % a.col_splits, unit = static_cast<int>(blockIdx.x) / a.col_splits;
  const int kv_head = unit % static_cast<int>(p.Hkv), b = unit / static_cast<int>(p.Hkv);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int first_row = split * a.rows_per_split, last_row = min(first_row + a.rows_per_split, static_cast<int>(p.L));
  const int strips = (last_row - first_row + kRows - 1) / kRows, total = group * strips;
  const int key0 = static_cast<int>(a.scan_begin) + warp * kStripKeys;
  const bool causal = p.causal || p.query_positions != nullptr;

  Core core;
  const uint32_t flip = p.scale >= 0 ? 0 : 0x80008000u;  // the maximum wants a scale >= 0
  core.load(static_cast<const T*>(p.key) + b * p.key_stride[0] + kv_head * p.key_stride[1] + a.scan_begin * p.key_stride[2],
            p.key_stride[2], static_cast<int>(a.scan_end - a.scan_begin), D, a.wide_loads, flip, nullptr);
  const float scale = fmaxf(fabsf(p.scale) * kLog2E, 1e-37f);
  unsigned hidden = 0;  // bit 2 m + i: key 16 m + 8 i + g is past the end or masked
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int key = key0 + 8 * i + g;
    const bool visible = key < a.scan_end && (a.key_mask == nullptr || a.key_mask[b * a.key_mask_stride + key] != 0);
    hidden |= visible ? 0u : 1u << i;
  }
  const bool masked = causal || __any_sync(simt::kFullMask, hidden != 0);

  const auto after = [&](Strip s) { return s.index + 1 == strips ? Strip{s.head + 1, 0} : Strip{s.head, s.index + 1}; };
  const int tiles = (strips + kStripsPerTile - 1) / kStripsPerTile, all_tiles = group * tiles;
  const auto tile_of = [&](const Strip& s) { return s.head * tiles + s.index / kStripsPerTile; };
  const auto stream = [&](int tile) {
    const T* query = static_cast<const T*>(p.query) + b * p.query_stride[0] + (kv_head * group + tile / tiles) * p.query_stride[1];
    stream_tile<T, kSteps>(tile % 2 == 0 ? even_tile : odd_tile, query, p.query_stride[2], first_row + tile % tiles * kCols, last_row, D,
                           a.wide_loads);
  };
  const auto row_of = [&](const Strip& s, int column) { return first_row + s.index * kRows + column / 2 * 8 + 2 * t + column % 2; };

  const auto products = [&](Strip s, float (&acc)[kTiles][kN][4]) {
    core.dots(acc, nullptr, (tile_of(s) % 2 == 0 ? even_tile : odd_tile) + s.index % kStripsPerTile * kRows * Core::kRowBytes, D);
  };
  // -inf where not visible, and the maxima of this warp's keys.
  const auto tops = [&](Strip s, int parity, float (&acc)[kTiles][kN][4]) {
    if (masked) {
#pragma unroll
      for (int c = 0; c < 2 * kN; ++c) {
        const int end = causal ? row_end(p, b, row_of(s, c)) : 0x7fffffff;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if ((hidden >> (2 * m + i) & 1u) != 0 || key0 + 16 * m + 8 * i + g >= end) acc[m][c / 2][2 * i + c % 2] = -infinity();
          }
        }
      }
    }
    float top[2 * kN];
#pragma unroll
    for (int c = 0; c < 2 * kN; ++c) {
      top[c] = -infinity();
#pragma unroll
      for (int m = 0; m < kTiles; ++m) top[c] = fmaxf(top[c], fmaxf(acc[m][c / 2][c % 2], acc[m][c / 2][2 + c % 2]));
    }
    reduce_keys<true, kN>(top, top_of[parity][warp]);
  };

  float sum[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) sum[m][0] = sum[m][1] = 0.0f;
  const int64_t R = p.range_end - p.range_begin;
  const auto write = [&](int64_t plane) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = key0 + 16 * m + 8 * i + g;
        const float value = quad_sum(sum[m][i]);
        if (t == 0 && key >= p.range_begin && key < p.range_end) a.partial[plane * R + key - p.range_begin] = value;
        sum[m][i] = 0.0f;
      }
    }
  };

  // One strip: the next one's dot products are under way while its own exponentials are computed; one barrier; its share of the scores.
  const auto step = [&](Strip s, int i, float (&acc)[kTiles][kN][4], float (&other)[kTiles][kN][4]) {
    const int parity = i % 2;
    const Strip next = after(s);
    if (i + 1 < total) {
      const int tile = tile_of(next);
      if (tile != tile_of(s) && tile + 1 < all_tiles) stream(tile + 1);  // the buffer before last: nobody reads it since the last barrier
      products(next, other);
    }
    float base[2 * kN], part[2 * kN];
    reduce_warps<true, kN>(top_of[parity][0], warps, base);
#pragma unroll
    for (int c = 0; c < 2 * kN; ++c) base[c] = base[c] == -infinity() ? 0.0f : base[c] * scale;
#pragma unroll
    for (int c = 0; c < 2 * kN; ++c) {
      part[c] = 0.0f;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = acc[m][c / 2][2 * j + c % 2];
          x = simt::fast_exp2(fmaf(x, scale, -base[c]));
          part[c] += x;
        }
      }
    }
    reduce_keys<false, kN>(part, sum_of[parity][warp]);
    if (i + 1 < total) tops(next, 1 - parity, other);
    if (i + 2 < total && tile_of(after(next)) != tile_of(next)) simt::cp_async_wait<0>();
    __syncthreads();
    const int h = kv_head * group + s.head;
    const float head = a.per_head ? 1.0f : score::head_weight(p, b, h);
    reduce_warps<false, kN>(sum_of[parity][0], warps, part);
#pragma unroll
    for (int c = 0; c < 2 * kN; ++c) {
      const float all = part[c];
      const int l = row_of(s, c);
      const bool used = l < last_row;
      const float weight = !used || all == 0.0f ? 0.0f : head * (p.row_weights == nullptr ? 1.0f : p.row_weights[b * p.L + l]) / all;
      if (used && warp == 0 && g == 0 && p.lse_out != nullptr) {
        p.lse_out[(static_cast<int64_t>(b) * p.H + h) * p.L + l] = all == 0.0f ? -infinity() : base[c] * kLn2 + logf(all);
      }
      if (head != 0.0f) {  // a head of weight 0 counts for nothing, even NaN
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) sum[m][j] = fmaf(weight, acc[m][c / 2][2 * j + c % 2], sum[m][j]);
        }
      }
    }
    if (a.per_head && s.index + 1 == strips) write((static_cast<int64_t>(split) * p.B + b) * p.H + h);
  };

  if (total > 0) {
    stream(0);
    simt::cp_async_wait<0>();
    __syncthreads();
    if (all_tiles > 1) stream(1);
    float even[kTiles][kN][4], odd[kTiles][kN][4];
    Strip s;
    products(s, even);
    tops(s, 0, even);
    if (total > 1 && tile_of(after(s)) != tile_of(s)) simt::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < total; i += 2) {
      step(s, i, even, odd);
      s = after(s);
      if (i + 1 == total) break;
      step(s, i + 1, odd, even);
      s = after(s);
    }
  }
  if (!a.per_head) write(static_cast<int64_t>(kv_head * a.col_splits + split) * p.B + b);
}

template <typename T, int kSteps>
Status launch_strips(const Args& a, int warps, void* stream) {
  const int64_t blocks = a.p.B * a.p.Hkv * a.col_splits;
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  const Status status = simt::launch(strip_kernel<T, kSteps>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * warps)),
                                     static_cast<size_t>(strip_shared_bytes(kSteps)), stream, a);
  return status.ok() ? launch_finish(a, stream) : status;
}

}  // namespace colsum
}  // namespace tokensieve

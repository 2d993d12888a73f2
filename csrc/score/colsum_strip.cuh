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
// Launch: one block of up to 12 warps an SM, 168 registers, 4 spilled bytes at D = 72 and 72 at D = 64 (loop constants: strips of 8
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

// dots -> 2^(dot * scale - base of the row), in place; their sums over this thread's keys.
template <int kTiles, int kN>
__device__ __forceinline__ void exponentiate(float (&acc)[kTiles][kN][4], float scale, const float (&base)[2 * kN], float (&part)[2 * kN]) {
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
}

// The maxima of this thread's keys, of every row.
template <int kTiles, int kN>
__device__ __forceinline__ void maxima(const float (&acc)[kTiles][kN][4], float (&top)[2 * kN]) {
#pragma unroll
  for (int c = 0; c < 2 * kN; ++c) {
    top[c] = -infinity();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) top[c] = fmaxf(top[c], fmaxf(acc[m][c / 2][c % 2], acc[m][c / 2][2 + c % 2]));
  }
}

// The warp's scores of its keys to a plane of `partial`, and back to zero.
template <int kTiles>
__device__ __forceinline__ void write_scores(const Args& a, int64_t plane, int first_key, float (&sum)[kTiles][2]) {
  const ScoreParams& p = a.p;
  const int64_t R = p.range_end - p.range_begin;
  const bool first = threadIdx.x % 4 == 0;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first_key + 16 * m + 8 * i;
      const float value = quad_sum(sum[m][i]);
      if (first && key >= p.range_begin && key < p.range_end) a.partial[plane * R + key - p.range_begin] = value;
      sum[m][i] = 0.0f;
    }
  }
}

// -inf where a key is hidden (bit 2 m + i: key first_key + 16 m + 8 i), or not before the end that end_of(column) gives.
template <int kTiles, int kN, typename EndOf>
__device__ __forceinline__ void hide(float (&acc)[kTiles][kN][4], unsigned hidden, int first_key, EndOf&& end_of) {
#pragma unroll
  for (int c = 0; c < 2 * kN; ++c) {
    const int end = end_of(c);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((hidden >> (2 * m + i) & 1u) != 0 || first_key + 16 * m + 8 * i >= end) acc[m][c / 2][2 * i + c % 2] = -infinity();
      }
    }
  }
}

// What a strip adds to the scores: acc holds exponentials, weight their row's weight / sum.
template <int kTiles, int kN>
__device__ __forceinline__ void add_row(const float (&acc)[kTiles][kN][4], int c, float weight, float (&sum)[kTiles][2]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int j = 0; j < 2; ++j) sum[m][j] = fmaf(weight, acc[m][c / 2][2 * j + c % 2], sum[m][j]);
  }
}

// Bit i: key first_key + 8 i is past the end or masked.
template <int kTiles>
__device__ __forceinline__ unsigned hidden_keys(const Args& a, int b, int first_key) {
  unsigned hidden = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int key = first_key + 8 * i;
    const bool visible = key < a.scan_end && (a.key_mask == nullptr || a.key_mask[b * a.key_mask_stride + key] != 0);
    hidden |= visible ? 0u : 1u << i;
  }
  return hidden;
}

// weight / sum of a row, whose sum over all keys is `all`; 0 for rows past the block's and such that see nothing. One thread of the block
// (`writes`) leaves the row's normaliser; `base` is its maximum in units of log2.
__device__ __forceinline__ float row_weight(const Args& a, int b, int h, int l, int last_row, float head, float base, float all,
                                            bool writes) {
  const ScoreParams& p = a.p;
  const bool used = l < last_row;
  if (used && writes && p.lse_out != nullptr) {
    p.lse_out[(static_cast<int64_t>(b) * p.H + h) * p.L + l] = all == 0.0f ? -infinity() : base * kLn2 + logf(all);
  }
  return !used || all == 0.0f ? 0.0f : head * (p.row_weights == nullptr ? 1.0f : p.row_weights[b * p.L + l]) / all;
}

// What a block owns: the query rows [first_row, last_row) of the heads of one key head, cut into strips of kRows, in streamed tiles of 64.
template <int kRows>
struct StripPlace {
  static constexpr int kStripsPerTile = kCols / kRows;
  int b, kv_head, split, group;  // heads of the group
  int first_row, last_row, strips, tiles;

  __device__ __forceinline__ explicit StripPlace(const Args& a) {
    const int unit = static_cast<int>(blockIdx.x) / a.col_splits, key_heads = static_cast<int>(a.p.Hkv);
    group = static_cast<int>(a.p.H / a.p.Hkv), split = static_cast<int>(blockIdx.x) % a.col_splits;
    kv_head = unit % key_heads, b = unit / key_heads;
    first_row = split * a.rows_per_split, last_row = min(first_row + a.rows_per_split, static_cast<int>(a.p.L));
    strips = (last_row - first_row + kRows - 1) / kRows, tiles = (strips + kStripsPerTile - 1) / kStripsPerTile;
  }
  __device__ __forceinline__ Strip after(Strip s) const {
    return s.index + 1 == strips ? Strip{s.head + 1, 0} : Strip{s.head, s.index + 1};
  }
  __device__ __forceinline__ int head_of(Strip s) const { return kv_head * group + s.head; }
  __device__ __forceinline__ int tile_of(Strip s) const { return s.head * tiles + s.index / kStripsPerTile; }
  // The query row of a thread's column of a strip.
  __device__ __forceinline__ int row_of(Strip s, int column) const {
    return first_row + s.index * kRows + column / 2 * 8 + 2 * (static_cast<int>(threadIdx.x) % 4) + column % 2;
  }
};

template <typename T, int kSteps>
__device__ __forceinline__ void load_keys(const Args& a, int b, int kv_head, Core<T, kSteps>& core) {
  const ScoreParams& p = a.p;
  const uint32_t flip = p.scale >= 0 ? 0 : 0x80008000u;  // the maximum wants a scale >= 0
  core.load(static_cast<const T*>(p.key) + b * p.key_stride[0] + kv_head * p.key_stride[1] + a.scan_begin * p.key_stride[2],
            p.key_stride[2], static_cast<int>(a.scan_end - a.scan_begin), static_cast<int>(p.D), a.wide_loads, flip, nullptr);
}

// Query rows of a tile on their way to its buffer.
template <typename T, int kSteps>
__device__ __forceinline__ void stream_rows(const Args& a, const StripPlace<strip_rows(kSteps)>& at, int tile, unsigned char* buffer) {
  const ScoreParams& p = a.p;
  const T* query =
      static_cast<const T*>(p.query) + at.b * p.query_stride[0] + (at.kv_head * at.group + tile / at.tiles) * p.query_stride[1];
  stream_tile<T, kSteps>(buffer, query, p.query_stride[2], at.first_row + tile % at.tiles * kCols, at.last_row, static_cast<int>(p.D),
                         a.wide_loads);
}

// The maxima of the rows, over all warps, in units of log2; 0 for a row that sees nothing.
template <int kN>
__device__ __forceinline__ void row_bases(const float2* top_of, int warps, float scale, float (&base)[2 * kN]) {
  reduce_warps<true, kN>(top_of, warps, base);
#pragma unroll
  for (int c = 0; c < 2 * kN; ++c) base[c] = base[c] == -infinity() ? 0.0f : base[c] * scale;
}

// A strip's exponentials, weighted, on top of the scores; its rows' sums of all warps are in sum_of.
template <int kRows, int kTiles, int kN>
__device__ __forceinline__ void add_strip(const Args& a, const StripPlace<kRows>& at, Strip s, const float2* sum_of, int warps,
                                          const float (&acc)[kTiles][kN][4], const float (&base)[2 * kN], float (&sum)[kTiles][2]) {
  const int h = at.head_of(s);
  const float head = a.per_head ? 1.0f : score::head_weight(a.p, at.b, h);
  const bool writes = threadIdx.x < 4;  // one thread a column
  float all[2 * kN];
  reduce_warps<false, kN>(sum_of, warps, all);
#pragma unroll
  for (int c = 0; c < 2 * kN; ++c) {
    const float weight = row_weight(a, at.b, h, at.row_of(s, c), at.last_row, head, base[c], all[c], writes);
    if (head != 0.0f) add_row(acc, c, weight, sum);  // a head of weight 0 counts for nothing, even NaN
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
  const StripPlace<kRows> at(a);
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_key = static_cast<int>(a.scan_begin) + warp * kStripKeys + static_cast<int>(threadIdx.x) % 32 / 4;
  const int total = at.group * at.strips, all_tiles = at.group * at.tiles;
  const bool causal = p.causal || p.query_positions != nullptr;
  Core core;
  load_keys<T, kSteps>(a, at.b, at.kv_head, core);
  const float scale = fmaxf(fabsf(p.scale) * kLog2E, 1e-37f);
  const unsigned hidden = hidden_keys<kTiles>(a, at.b, first_key);
  const bool masked = causal || __any_sync(simt::kFullMask, hidden != 0);
  float sum[kTiles][2] = {};

  const auto buffer = [&](int tile) { return tile % 2 == 0 ? even_tile : odd_tile; };
  const auto stream = [&](int tile) { stream_rows<T, kSteps>(a, at, tile, buffer(tile)); };
  const auto products = [&](Strip s, float (&acc)[kTiles][kN][4]) {
    core.dots(acc, nullptr, buffer(at.tile_of(s)) + s.index % kStripsPerTile * kRows * Core::kRowBytes, static_cast<int>(p.D));
  };
  // -inf where not visible, and the maxima of this warp's keys.
  const auto tops = [&](Strip s, int parity, float (&acc)[kTiles][kN][4]) {
    if (masked) hide(acc, hidden, first_key, [&](int c) { return causal ? row_end(p, at.b, at.row_of(s, c)) : 0x7fffffff; });
    float top[2 * kN];
    maxima(acc, top);
    reduce_keys<true, kN>(top, top_of[parity][warp]);
  };
  // One strip: the next one's dot products are under way while its own exponentials are computed; one barrier; its share of the scores.
  const auto step = [&](Strip s, int i, float (&acc)[kTiles][kN][4], float (&other)[kTiles][kN][4]) {
    const Strip next = at.after(s);
    if (i + 1 < total) {
      const int tile = at.tile_of(next);
      if (tile != at.tile_of(s) && tile + 1 < all_tiles)
        stream(tile + 1);  // the buffer before last: nobody reads it since the last barrier
      products(next, other);
    }
    float base[2 * kN], part[2 * kN];
    row_bases<kN>(top_of[i % 2][0], warps, scale, base);
    exponentiate(acc, scale, base, part);
    reduce_keys<false, kN>(part, sum_of[i % 2][warp]);
    if (i + 1 < total) tops(next, 1 - i % 2, other);
    if (i + 2 < total && at.tile_of(at.after(next)) != at.tile_of(next)) simt::cp_async_wait<0>();
    __syncthreads();
    add_strip(a, at, s, sum_of[i % 2][0], warps, acc, base, sum);
    if (a.per_head && s.index + 1 == at.strips) {
      write_scores(a, (static_cast<int64_t>(at.split) * p.B + at.b) * p.H + at.head_of(s), first_key, sum);
    }
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
    if (total > 1 && at.tile_of(at.after(s)) != at.tile_of(s)) simt::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < total; i += 2) {
      step(s, i, even, odd);
      s = at.after(s);
      if (i + 1 == total) break;
      step(s, i + 1, odd, even);
      s = at.after(s);
    }
  }
  if (!a.per_head) write_scores(a, static_cast<int64_t>(at.kv_head * a.col_splits + at.split) * p.B + at.b, first_key, sum);
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

// First sweep over all query rows: the normaliser of every row. A block holds row_tiles(steps) x 64 query rows of one head in registers
// and streams its keys; every thread keeps the maximum and the sum of its own columns and they meet once, at the end: no shuffles in the
// loop. The running maximum moves only when it is beaten by 2^64: float32 has the range, and the rescaling is one branch, rarely taken.
#pragma once

#include "score/colsum_tiles.cuh"
#include "score/score_device.cuh"

namespace tokensieve {
namespace colsum {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

using score::arrive_last;
using score::bias_offset;
using score::clamp_to;
using score::infinity;
using score::load_bias;
using score::nan_max;

// Row l sees keys [0, row_end). 0 for rows past L.
__device__ __forceinline__ int row_end(const ScoreParams& p, int b, int64_t l) { return l < p.L ? score::row_end(p, b, l) : 0; }

// Sum over the four lanes of a quad, the same bits in all of them.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(simt::kFullMask, x, 1);
  return x + __shfl_xor_sync(simt::kFullMask, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  const float y = nan_max(x, __shfl_xor_sync(simt::kFullMask, x, 1));
  return nan_max(y, __shfl_xor_sync(simt::kFullMask, y, 2));
}

// The running maximum wants a scale >= 0: a negative one turns over the signs of the queries instead.
template <typename T>
__device__ __forceinline__ uint32_t row_flip(float scale) {
  return scale >= 0 ? 0 : sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
}
// -inf of a masked key times a scale of 0 would be NaN.
__device__ __forceinline__ float row_scale(float scale) { return fmaxf(fabsf(scale) * kLog2E, 1e-37f); }

// 2^(value * scale) of one row's accumulators on top of (maximum, sum); scale >= 0.
template <int kCount>
__device__ __forceinline__ void add_to_row(const float (&value)[kCount], float scale, float& maximum, float& sum) {
  float top = value[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, value[i]);
  top *= scale;
  if (top > maximum + 64.0f) {
    sum *= simt::fast_exp2(maximum - top);
    maximum = top;
  }
  const float base = maximum == -infinity() ? 0.0f : maximum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += simt::fast_exp2(fmaf(value[i], scale, -base));
}

// (maximum, sum) of another part of the row. Not NaN-safe in the maximum, which never is NaN.
__device__ __forceinline__ void merge_into(float& maximum, float& sum, float other_maximum, float other_sum) {
  const float most = other_maximum > maximum ? other_maximum : maximum;
  sum = (maximum == -infinity() ? sum : sum * simt::fast_exp2(maximum - most)) +
        (other_maximum == -infinity() ? other_sum : other_sum * simt::fast_exp2(other_maximum - most));
  maximum = most;
}

// What later sweeps read, and the caller's lse. A row of NaN logits alone has maximum -inf, but it is no row that sees nothing.
__device__ __forceinline__ void write_row(const Args& a, int64_t row, float maximum, float sum) {
  const bool empty = sum == 0.0f;
  const float top = !empty && maximum == -infinity() ? 0.0f : maximum;
  if (a.stats != nullptr) a.stats[2 * row] = empty ? -infinity() : top, a.stats[2 * row + 1] = empty ? 0.0f : 1.0f / sum;
  if (a.p.lse_out != nullptr) a.p.lse_out[row] = empty ? -infinity() : top * kLn2 + logf(sum);
}

// Dot products of a row with this thread's columns of the keys from `key` on: -inf where not visible; with a bias, logits in units of log2.
template <bool kBias, int kCount>
__device__ __forceinline__ void mask_row(const Args& a, int b, int h, int64_t l, int key, int end, float scale, float (&value)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const int at_key = key + n / 2 * 8 + n % 2;
    float x = -infinity();
    if (at_key < end) {
      x = value[n];
      if constexpr (kBias) x = fmaf(load_bias(a.p, bias_offset(a.p, b, h, l, at_key)), kLog2E, x * scale);
    }
    value[n] = x;
  }
}

// Which of a block's rows a warp holds: 16 from `first` on, 16 from first + step on, ...
struct WarpRows {
  int first, step;
};

// The quads' rows: normalisers, or what a split knows of them.
template <int kTiles>
__device__ __forceinline__ void finish_rows(const Args& a, WarpRows at, int64_t row0, int count, int64_t split_rows,
                                            const float (&maximum)[kTiles][2], const float (&sum)[kTiles][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = quad_max(maximum[m][i]);
      const float part = maximum[m][i] == -infinity() ? sum[m][i] : sum[m][i] * simt::fast_exp2(maximum[m][i] - top);
      const float total = quad_sum(part);
      const int r = at.first + m * at.step + 8 * i + g;
      const bool mine = t == 0 && r < count;
      if (mine && a.row_splits == 1) write_row(a, row0 + r, top, total);
      if (mine && a.row_splits > 1) {
        a.split_stats[2 * (split_rows + row0 + r)] = top, a.split_stats[2 * (split_rows + row0 + r) + 1] = total;
      }
    }
  }
}

// The last of a tile's splits puts their rows together, in order.
__device__ __forceinline__ void merge_splits(const Args& a, int64_t row0, int count) {
  const int64_t rows = a.p.B * a.p.H * a.p.L;
  for (int r = static_cast<int>(threadIdx.x); r < count; r += static_cast<int>(blockDim.x)) {
    float top = -infinity(), total = 0.0f;
    for (int s = 0; s < a.row_splits; ++s) {
      const float* other = a.split_stats + 2 * (s * rows + row0 + r);
      merge_into(top, total, other[0], other[1]);
    }
    write_row(a, row0 + r, top, total);
  }
}

// Where this thread's 2 kTiles rows end, and the least and the greatest of the warp's. Rows past L count for nothing in the least: their
// results are not written, but a bias must not be read for them.
template <int kTiles>
struct RowEnds {
  int end[kTiles][2], least = 0x7fffffff, most = 0;

  __device__ __forceinline__ RowEnds(const Args& a, WarpRows at, int b, int64_t first_row) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t l = first_row + at.first + m * at.step + 8 * i + g;
        end[m][i] = clamp_to(row_end(a.p, b, l), a.scan_end);
        if (l < a.p.L) least = min(least, end[m][i]);
        most = max(most, end[m][i]);
      }
    }
    least = simt::warp::min(least), most = simt::warp::max(most);
  }
};

// What a block computes: a share (`split`) of the keys for a tile of rows of a head. Late rows see most keys: they start first.
struct RowBlock {
  int tile, split, bh, b, h;

  __device__ __forceinline__ explicit RowBlock(const Args& a) {
    const unsigned units = static_cast<unsigned>(a.p.B * a.p.H) * static_cast<unsigned>(a.row_splits);
    const int rest = static_cast<int>(blockIdx.x % units);
    tile = a.row_tiles - 1 - static_cast<int>(blockIdx.x / units), split = rest % a.row_splits, bh = rest / a.row_splits;
    b = bh / static_cast<int>(a.p.H), h = bh % static_cast<int>(a.p.H);
  }
};

// What is left of a row block once its keys are through.
template <int kTiles>
__device__ __forceinline__ void finish_row_block(const Args& a, const RowBlock& block, WarpRows at, int64_t first_row, int count,
                                                 const float (&maximum)[kTiles][2], const float (&sum)[kTiles][2], int* is_last) {
  const ScoreParams& p = a.p;
  const int64_t rows = p.B * p.H * p.L, row0 = static_cast<int64_t>(block.bh) * p.L + first_row;
  finish_rows(a, at, row0, count, block.split * rows, maximum, sum);
  if (a.row_splits == 1 || !arrive_last(p.semaphores + block.tile * p.B * p.H + block.bh, a.row_splits, is_last)) return;
  merge_splits(a, row0, count);
}

template <typename T, int kSteps, bool kBias>
__global__ void __launch_bounds__(kThreads, 2) row_kernel(const Args a) {
  using Core = Core<T, kSteps>;
  constexpr int kRows = stationary_rows(kSteps), kTiles = Core::kTiles;
  SIMT_SHARED(int, last_key, [kWarps]);
  SIMT_SHARED(int, is_last);
  const ScoreParams& p = a.p;
  const int D = static_cast<int>(p.D), cols = Core::cols(D);
  const int stationary_bytes = Core::stationary_bytes(D), buffer_bytes = cols * Core::row_bytes(D);
  SIMT_CARVE(unsigned char, stationary, 0, stationary_bytes);
  SIMT_CARVE(unsigned char, even, stationary_bytes, buffer_bytes);
  SIMT_CARVE(unsigned char, odd, stationary_bytes + buffer_bytes, buffer_bytes);
  const RowBlock block(a);
  const int split = block.split, b = block.b, h = block.h;
  const int64_t first_row = static_cast<int64_t>(block.tile) * kRows;
  const int count = clamp_to(p.L - first_row, kRows);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const WarpRows rows_at = {warp * kTiles * 16, 16};

  Core core;
  const uint32_t flip = row_flip<T>(p.scale);
  core.load(static_cast<const T*>(p.query) + b * p.query_stride[0] + h * p.query_stride[1] + first_row * p.query_stride[2],
            p.query_stride[2], count, D, a.wide_loads, flip, stationary);
  const float scale = row_scale(p.scale);

  const RowEnds<kTiles> ends(a, rows_at, b, first_row);
  if (lane == 0) last_key[warp] = ends.most;
  __syncthreads();
  const int block_most = max(max(last_key[0], last_key[1]), max(last_key[2], last_key[3]));
  const int begin = static_cast<int>(a.scan_begin), tiles = block_most <= begin ? 0 : (block_most - begin + cols - 1) / cols;
  const int items = tiles <= split ? 0 : (tiles - split + a.row_splits - 1) / a.row_splits;

  const int keys = static_cast<int>(a.scan_end);
  const T* key = static_cast<const T*>(p.key) + b * p.key_stride[0] + h / (p.H / p.Hkv) * p.key_stride[1];
  float maximum[kTiles][2], sum[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) maximum[m][0] = maximum[m][1] = -infinity(), sum[m][0] = sum[m][1] = 0.0f;

  if (items > 0) stream_tile<T, kSteps>(even, key, p.key_stride[2], begin + split * cols, keys, D, a.wide_loads);
#pragma unroll 1
  for (int item = 0; item < items; ++item) {
    const int k0 = begin + (split + item * a.row_splits) * cols;
    simt::cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the other buffer any more
    if (item + 1 < items) {
      stream_tile<T, kSteps>(item % 2 == 0 ? odd : even, key, p.key_stride[2], k0 + a.row_splits * cols, keys, D, a.wide_loads);
    }
    if (k0 >= ends.most) continue;  // the whole warp
    const unsigned char* at = item % 2 == 0 ? even : odd;
#pragma unroll 1
    for (int chunk = 0; chunk < cols; chunk += Core::kChunk) {
      float acc[kTiles][Core::kNTiles][4];
      core.dots(acc, stationary, at + chunk * Core::row_bytes(D), D);
      const bool masked = kBias || k0 + chunk + Core::kChunk > ends.least;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float value[2 * Core::kNTiles];
#pragma unroll
          for (int n = 0; n < 2 * Core::kNTiles; ++n) value[n] = acc[m][n / 2][2 * i + n % 2];
          if (masked) {
            const int64_t l = first_row + rows_at.first + m * rows_at.step + 8 * i + g;
            mask_row<kBias>(a, b, h, l, k0 + chunk + 2 * t, ends.end[m][i], scale, value);
          }
          add_to_row(value, kBias ? 1.0f : scale, maximum[m][i], sum[m][i]);
        }
      }
    }
  }

  finish_row_block(a, block, rows_at, first_row, count, maximum, sum, &is_last);
}

template <typename T, int kSteps>
Status launch_rows(const Args& a, int64_t smem_bytes, void* stream) {
  const int64_t blocks = a.p.B * a.p.H * a.row_tiles * a.row_splits;
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  const auto kernel = a.p.bias == nullptr ? row_kernel<T, kSteps, false> : row_kernel<T, kSteps, true>;
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), static_cast<size_t>(smem_bytes), stream, a);
}

}  // namespace colsum
}  // namespace tokensieve

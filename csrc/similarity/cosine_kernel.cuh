// cosine_match and cosine_scores: a [B, M, C], b [B, N, C] (float32, float16, bfloat16) -> the T best columns of every row, or the maximum,
// or every similarity, or mean / sum over the candidates. Sources: ToMe (arXiv 2210.09461, section 3), DART (arXiv 2502.11494, section 3.3).
//
// Algorithm: (1) norms_kernel, a warp a row: 1 / norm of every row, candidates folded in as a sign; (2) match_kernel: 64 x 64 tiles of a . b
//   (tile.cuh) on the rows as they are, scaled in the epilogue, so no normalised copy and no M x N matrix is written. A block walks its
//   share of the column tiles upwards. One best (T = 1, max): rank and index of a thread's two rows in registers, a strict comparison keeps
//   the lowest column. Lists: the tile's ranks pass through shared memory, a warp takes a row at a time, a ballot finds columns above the
//   list's last place (random data: T ln(N / T) of N), each enters with one ballot and one shift of the lanes. Blocks that share a row tile
//   leave their lists in the workspace; the last one merges them in column order.
//   Mean and sum: a_hat . (sum of the unit rows of b): sum_kernel, a thread 16 bytes of channels, rows in chunks, the last block adds the
//   chunks in order; dot_kernel, a warp a row of a. No products.
// Work: 2 B M N C flops. Floor on H200: M = N = 577, C = 64 a launch (43 MFLOP); 2880 x 2880 x 1024 bfloat16 17 GFLOP, 22 us of tensor cores
//   (790 TF/s); 16 x 2880 x 4096 reading b, 24 MB or 5.5 us at 4.3 TB/s. ESTIMATES, nothing was measured: 6, 60 and 50 us. Bound by shared
//   memory: 10 loads of 16 bytes a lane for 16 tensor-core steps. With few rows of a bound by latency: 45 blocks wait for 64 chunks one after
//   the other; more chunks in flight would give about 10 us.
// Norms apart (one more launch, 1 to 3 us) because beside the products they would cost each tile 8 more shared loads to the 20 of a chunk.
// Deterministic: fixed orders, no float atomics, the same bits for any alignment and any number of column shares. Ties to the lowest
// column, NaN last.
// Limits: N < 2^31.
#pragma once

#include "device/arrive.h"
#include "similarity/cosine_args.h"
#include "similarity/tile.cuh"

namespace tokensieve {
namespace cosine {

using similarity::kThreads;
using similarity::kTile;
using similarity::kWarps;

constexpr int kStageStride = 72;    // floats between staged rows: 8 rows x 4 pairs of a warp's store meet no bank twice
constexpr float kNanRank = -4.0f;   // below every cosine, above an empty place (-inf)
constexpr float kNoColumn = -1.0f;  // instead of 1 / norm: no candidate
static_assert(kTile * kStageStride * 4 <= similarity::kTileBytes, "ranks pass through the tile's buffers");

enum class Keep { kOne, kList, kAll };

struct Args {
  CosineParams p;
  float *inverse_a, *inverse_b, *rank, *partial, *sum;
  int32_t *index, *counts, *count;
  int64_t padded_m, padded_n, padded_c;
  int64_t row_tiles, column_tiles, splits, channel_blocks;
  int keep;
  bool wide_a, wide_b;
};

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Channels [c, c + 16 bytes) of a row as floats, zeros beyond C. Both ways give the same values, so alignment never changes a sum.
template <typename T, int kPart>
__device__ __forceinline__ void load_part(float (&out)[kPart], const T* row, int64_t c, int64_t C, bool wide) {
  if (wide && c + kPart <= C) {
    union Both {
      uint4 bits;
      T part[kPart];
      __device__ Both() {}
    } both;
    both.bits = *reinterpret_cast<const uint4*>(row + c);
#pragma unroll
    for (int j = 0; j < kPart; ++j) out[j] = similarity::to_float(both.part[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kPart; ++j) out[j] = c + j < C ? similarity::to_float(row[c + j]) : 0.0f;
  }
}

// ---- (1) norms -------------------------------------------------------------------------------------------------------------------------
template <typename T>
__global__ void __launch_bounds__(kThreads) norms_kernel(const Args a) {
  constexpr int kPart = 16 / static_cast<int>(sizeof(T));
  const CosineParams& p = a.p;
  // padded_m and padded_n are multiples of 64, so the warps come out even.
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread(), per_image = a.padded_m + a.padded_n;
  const int64_t b = at / per_image, i = at % per_image, n = i - a.padded_m;
  const bool of_a = n < 0;
  const bool exists = of_a ? i < p.M : n < p.N && (p.candidates == nullptr || p.candidates[b * p.candidates_stride + n] != 0);
  float squares = 0;
  if (exists) {
    const T* row = of_a ? static_cast<const T*>(p.a) + b * p.a_stride[0] + i * p.a_stride[1]
                        : static_cast<const T*>(p.b) + b * p.b_stride[0] + n * p.b_stride[1];
    const bool wide = of_a ? a.wide_a : a.wide_b;
    for (int64_t c = lane_of_thread() * kPart; c < p.C; c += 32 * kPart) {
      float x[kPart];
      load_part(x, row, c, p.C, wide);
#pragma unroll
      for (int j = 0; j < kPart; ++j) squares = fmaf(x[j], x[j], squares);
    }
  }
  squares = simt::warp::sum(squares);
  if (lane_of_thread() != 0) return;
  const float inverse = !exists ? kNoColumn : squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares);
  if (of_a) {
    a.inverse_a[b * a.padded_m + i] = inverse;
  } else {
    a.inverse_b[b * a.padded_n + n] = inverse;
  }
}

// ---- (2) products ----------------------------------------------------------------------------------------------------------------------
struct Best {
  float rank = -infinity();
  int32_t index = -1;
};

// A rank is a similarity, negative where the lowest is wanted. `at` counts rows times keep.
__device__ __forceinline__ void emit(const CosineParams& p, int64_t at, float rank, int32_t index) {
  const float value = rank == kNanRank ? __uint_as_float(0x7fc00000u) : p.largest ? rank : 0.0f - rank;
  p.value[at] = index < 0 ? 0.0f : value;
  if (p.reduction == CosineReduction::kMatch) p.index[at] = index;
}

struct Place {  // of a block, and in it of a thread's accumulators
  int64_t b, first_row, split;
  int g, t;

  __device__ explicit Place(const Args& a) {
    split = blockIdx.x % a.splits;
    const int64_t unit = blockIdx.x / a.splits;
    b = unit / a.row_tiles;
    first_row = unit % a.row_tiles * kTile;
    g = lane_of_thread() / 4;
    t = lane_of_thread() % 4;
  }
  __device__ int local_row(int half) const { return warp_of_thread() * 16 + g + 8 * half; }
};

// The rank of one product; -inf where the column is no candidate.
__device__ __forceinline__ float rank_of(float dot, float scale, float inverse, bool is_self) {
  if (inverse < 0.0f || is_self) return -infinity();
  const float v = dot * scale * inverse;
  return v == v ? v : kNanRank;
}

// Columns above the last place of a row's list enter it. A lane holds one place; lanes beyond `keep` hold what fell off.
__device__ __forceinline__ void insert(float& list, int32_t& index, int keep, float rank, int32_t column) {
  float last = simt::warp::shfl(list, keep - 1);
  unsigned pending = simt::warp::ballot(rank > last);
  while (pending != 0) {
    const int source = __ffs(static_cast<int>(pending)) - 1;
    pending &= pending - 1;
    const float x = simt::warp::shfl(rank, source);
    if (!(x > last)) continue;
    const int32_t c = simt::warp::shfl(column, source);
    const int place = __popc(simt::warp::ballot(list >= x));  // after its equals, whose columns are lower
    const float shifted = simt::warp::shfl_up(list, 1);
    const int32_t shifted_index = simt::warp::shfl_up(index, 1);
    if (lane_of_thread() >= place) {
      list = lane_of_thread() == place ? x : shifted;
      index = lane_of_thread() == place ? c : shifted_index;
    }
    last = simt::warp::shfl(list, keep - 1);
  }
}

template <Keep kKeep>
__device__ __forceinline__ void take_tile(const Args& a, const Place& at, const float (&acc)[8][4], const float (&scale)[2], int64_t column,
                                          Best (&best)[2], unsigned char* shared) {
  const CosineParams& p = a.p;
  const float* inverse = a.inverse_b + at.b * a.padded_n + column;
  float* stage = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 of_pair = *reinterpret_cast<const float2*>(inverse + 8 * n + 2 * at.t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = at.first_row + at.local_row(i / 2), c = column + 8 * n + 2 * at.t + i % 2;
      const float of_column = i % 2 == 0 ? of_pair.x : of_pair.y;
      const bool is_self = p.exclude_self && row == c;
      if constexpr (kKeep == Keep::kAll) {
        if (row < p.M && c < p.N)
          p.value[(at.b * p.M + row) * p.N + c] = of_column < 0.0f || is_self ? 0.0f : acc[n][i] * scale[i / 2] * of_column;
      } else {
        const float rank = rank_of(acc[n][i], scale[i / 2], of_column, is_self);
        if constexpr (kKeep == Keep::kList) {
          stage[at.local_row(i / 2) * kStageStride + 8 * n + 2 * at.t + i % 2] = rank;
        } else if (rank > best[i / 2].rank) {
          best[i / 2].rank = rank;
          best[i / 2].index = static_cast<int32_t>(c);
        }
      }
    }
  }
}

// The staged ranks of a tile into the lists [64][keep] of the block's rows; every warp its own 16 rows.
__device__ inline void scan_tile(const Args& a, const Place& at, int64_t column, const float* stage, float* ranks, int32_t* indices) {
  const int lane = lane_of_thread(), first = warp_of_thread() * 16;
  for (int r = first; r < first + 16 && at.first_row + r < a.p.M; ++r) {
    float list = lane < a.keep ? ranks[r * a.keep + lane] : -infinity();
    int32_t index = lane < a.keep ? indices[r * a.keep + lane] : -1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      insert(list, index, a.keep, stage[r * kStageStride + 32 * half + lane], static_cast<int32_t>(column + 32 * half + lane));
    }
    if (lane < a.keep) {
      ranks[r * a.keep + lane] = list;
      indices[r * a.keep + lane] = index;
    }
  }
}

// Each quad has seen its two rows in four parts: better rank, then the lower column.
__device__ __forceinline__ Best quad_best(Best x) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float rank = simt::tile<4>::shfl_xor(x.rank, step);
    const int32_t index = simt::tile<4>::shfl_xor(x.index, step);
    const bool better = rank > x.rank || (rank == x.rank && static_cast<uint32_t>(index) < static_cast<uint32_t>(x.index));
    x.rank = better ? rank : x.rank;
    x.index = better ? index : x.index;
  }
  return x;
}

__device__ inline void merge_one(const Args& a, const Place& at) {
  const int64_t row = at.first_row + threadIdx.x;
  if (threadIdx.x >= kTile || row >= a.p.M) return;
  Best best;
  const int64_t step = a.p.B * a.p.M;
  const int64_t out = at.b * a.p.M + row;
  for (int64_t s = 0; s < a.splits; ++s) {
    const float rank = a.rank[s * step + out];
    if (rank > best.rank) {
      best.rank = rank;
      best.index = a.index[s * step + out];
    }
  }
  emit(a.p, out, best.rank, best.index);
}

__device__ inline void merge_lists(const Args& a, const Place& at) {
  const int lane = lane_of_thread(), first = warp_of_thread() * 16;
  for (int r = first; r < first + 16 && at.first_row + r < a.p.M; ++r) {
    const int64_t out = (at.b * a.p.M + at.first_row + r) * a.keep + lane, step = a.p.B * a.p.M * a.keep;
    float list = -infinity();
    int32_t index = -1;
    for (int64_t s = 0; s < a.splits; ++s) {
      const float rank = lane < a.keep ? a.rank[s * step + out] : -infinity();
      const int32_t column = lane < a.keep ? a.index[s * step + out] : -1;
      insert(list, index, a.keep, rank, column);
    }
    if (lane < a.keep) emit(a.p, out, list, index);
  }
}

// What a block has found goes out, or to the workspace and the last block of the row tile.
template <Keep kKeep>
__device__ inline void finish(const Args& a, const Place& at, Best (&best)[2], const float* ranks, const int32_t* indices, int* is_last) {
  const CosineParams& p = a.p;
  const int64_t share = at.split * p.B * p.M * a.keep;
  const auto put = [&](int64_t out, float rank, int32_t index) {
    if (a.splits == 1) {
      emit(p, out, rank, index);
    } else {
      a.rank[share + out] = rank;
      a.index[share + out] = index;
    }
  };
  if constexpr (kKeep == Keep::kOne) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Best all = quad_best(best[half]);
      const int64_t row = at.first_row + at.local_row(half);
      if (at.t == 0 && row < p.M) put(at.b * p.M + row, all.rank, all.index);
    }
  } else {
    const int64_t rows = p.M - at.first_row < kTile ? p.M - at.first_row : kTile;
    const int64_t out = (at.b * p.M + at.first_row) * a.keep;
    for (int i = static_cast<int>(threadIdx.x); i < rows * a.keep; i += kThreads) put(out + i, ranks[i], indices[i]);
  }
  if (a.splits == 1) return;
  if (!simt::arrive_last(p.semaphores + at.b * a.row_tiles + at.first_row / kTile, static_cast<int>(a.splits), is_last)) return;
  if constexpr (kKeep == Keep::kOne) {
    merge_one(a, at);
  } else {
    merge_lists(a, at);
  }
}

template <typename T, Keep kKeep>
__global__ void __launch_bounds__(kThreads) match_kernel(const Args a) {
  SIMT_DYN_SHARED(unsigned char, shared);
  SIMT_SHARED(int, is_last);
  const CosineParams& p = a.p;
  const Place at(a);
  float* ranks = reinterpret_cast<float*>(shared + similarity::kTileBytes);
  int32_t* indices = reinterpret_cast<int32_t*>(ranks + kTile * a.keep);
  if constexpr (kKeep == Keep::kList) {  // seen after the first tile's barriers
    for (int i = static_cast<int>(threadIdx.x); i < kTile * a.keep; i += kThreads) {
      ranks[i] = -infinity();
      indices[i] = -1;
    }
    __syncthreads();
  }
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = a.inverse_a[at.b * a.padded_m + at.first_row + at.local_row(half)];
    scale[half] = p.largest ? inverse : -inverse;
  }
  const similarity::Rows<T> x = {static_cast<const T*>(p.a) + at.b * p.a_stride[0], p.a_stride[1], at.first_row, p.M, a.wide_a};
  similarity::Rows<T> y = {static_cast<const T*>(p.b) + at.b * p.b_stride[0], p.b_stride[1], 0, p.N, a.wide_b};
  Best best[2];
  const int64_t end = (at.split + 1) * a.column_tiles / a.splits;
  for (int64_t tile = at.split * a.column_tiles / a.splits; tile < end; ++tile) {
    float acc[8][4] = {};
    y.first = tile * kTile;
    if (p.C > 0) similarity::tile_dots<T>(acc, shared, x, y, p.C);
    take_tile<kKeep>(a, at, acc, scale, y.first, best, shared);
    if constexpr (kKeep == Keep::kList) {
      simt::warp::sync();  // a warp reads the ranks of its own rows only
      scan_tile(a, at, y.first, reinterpret_cast<const float*>(shared), ranks, indices);
      __syncthreads();  // before the next tile's rows replace the ranks
    }
  }
  if constexpr (kKeep != Keep::kAll) finish<kKeep>(a, at, best, ranks, indices, &is_last);
}

// ---- mean and sum ----------------------------------------------------------------------------------------------------------------------
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const Args a) {
  SIMT_SHARED(int, is_last);
  constexpr int kPart = 16 / static_cast<int>(sizeof(T));
  const CosineParams& p = a.p;
  const int64_t chunk = blockIdx.x % a.splits, unit = blockIdx.x / a.splits;
  const int64_t b = unit / a.channel_blocks, c = (unit % a.channel_blocks * kThreads + threadIdx.x) * kPart;
  const T* base = static_cast<const T*>(p.b) + b * p.b_stride[0];
  const float* inverse = a.inverse_b + b * a.padded_n;
  float sum[kPart] = {};
  int32_t count = 0;
#pragma unroll 4
  for (int64_t n = chunk * p.N / a.splits; n < (chunk + 1) * p.N / a.splits; ++n) {
    const float of_row = inverse[n];
    if (of_row < 0.0f) continue;
    ++count;
    if (c >= p.C) continue;
    float x[kPart];
    load_part(x, base + n * p.b_stride[1], c, p.C, a.wide_b);
#pragma unroll
    for (int j = 0; j < kPart; ++j) sum[j] = fmaf(x[j], of_row, sum[j]);
  }
  if (c < p.C) {
    float* to = a.partial + (b * a.splits + chunk) * a.padded_c + c;
#pragma unroll
    for (int j = 0; j < kPart; ++j) to[j] = sum[j];
  }
  const bool counts = unit % a.channel_blocks == 0 && threadIdx.x == 0;
  if (counts) a.counts[b * a.splits + chunk] = count;
  if (!simt::arrive_last(p.semaphores + unit, static_cast<int>(a.splits), &is_last)) return;
  if (c < p.C) {
    float all[kPart] = {};
    for (int64_t s = 0; s < a.splits; ++s) {
      const float* from = a.partial + (b * a.splits + s) * a.padded_c + c;
#pragma unroll
      for (int j = 0; j < kPart; ++j) all[j] += from[j];
    }
#pragma unroll
    for (int j = 0; j < kPart; ++j) a.sum[b * a.padded_c + c + j] = all[j];
  }
  if (counts) {
    int32_t all = 0;
    for (int64_t s = 0; s < a.splits; ++s) all += a.counts[b * a.splits + s];
    a.count[b] = all;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) dot_kernel(const Args a) {
  constexpr int kPart = 16 / static_cast<int>(sizeof(T));
  const CosineParams& p = a.p;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (row >= p.B * p.M) return;
  const int64_t b = row / p.M, m = row % p.M;
  const T* of_a = static_cast<const T*>(p.a) + b * p.a_stride[0] + m * p.a_stride[1];
  const T* of_b = static_cast<const T*>(p.b) + b * p.b_stride[0] + m * p.b_stride[1];
  const float* sum = a.sum + b * a.padded_c;
  const float inverse = a.inverse_a[b * a.padded_m + m], of_self = p.exclude_self ? a.inverse_b[b * a.padded_n + m] : kNoColumn;
  const bool self = !(of_self < 0.0f);
  float total = 0, own = 0;
  for (int64_t c = lane_of_thread() * kPart; c < p.C; c += 32 * kPart) {
    float x[kPart], y[kPart];
    load_part(x, of_a, c, p.C, a.wide_a);
#pragma unroll
    for (int j = 0; j < kPart; ++j) total = fmaf(x[j], sum[c + j], total);
    if (!self) continue;
    load_part(y, of_b, c, p.C, a.wide_b);
#pragma unroll
    for (int j = 0; j < kPart; ++j) own = fmaf(x[j], y[j], own);
  }
  total = simt::warp::sum(total);
  own = simt::warp::sum(own);
  if (lane_of_thread() != 0) return;
  const int32_t count = a.count[b] - (self ? 1 : 0);
  float value = total * inverse - (self ? own * inverse * of_self : 0.0f);
  if (p.reduction == CosineReduction::kMean) value /= static_cast<float>(count);
  p.value[row] = count > 0 ? value : 0.0f;
}

}  // namespace cosine
}  // namespace tokensieve

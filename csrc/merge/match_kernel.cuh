// bipartite_match: metric [B, H, N, D] (float32, float16, bfloat16) -> the r best source-target pairs and the plan that every merge follows
// (source, destination int64 [B, r], similarity float [B, r], index int64 [B, M], inverse int64 [B, N]). Source: ToMe (arXiv 2210.09461,
// section 3), ToMeSD (arXiv 2303.17604), Turbo (arXiv 2407.11717, section 3.2).
//
// Algorithm: (0) H > 1: mean_kernel, the mean over the heads in float32. (1) match_kernel: 64 x 64 tiles of products (tile.cuh) of the rows as
//   they are; even and odd tokens or listed ones are read in place, so no copy and no S x T matrix is written. The tile's norms come from its
//   chunks in shared memory, a thread a row, and scale the products in registers. Targets that take no part have a negative norm. Blocks
//   share the targets of 64 sources; what each finds goes to the workspace. (2) Ranking: the place of a source is the number of larger keys
//   (similarity + bias as ordered bits, then the lower place: unique), counted from shared memory, 4 sources a thread. S <= 512 (fused): the
//   last block of an image does it, so there is one launch. Else rank_kernel: a block 128 sources. (3) Every source writes its slot or its
//   row; "position" needs the number of staying sources before each: one block scan by the last block.
// Work: 2 B S T D flops, S^2 comparisons. Floor on H200: 577 x 64 bfloat16, B = 1: 74 KB and 11 MFLOP, launch-bound (64: 4.7 MB, 1.1 us at
//   4.3 TB/s); AIM 32 x 196 x 3584 bfloat16: 45 MB, 10.5 us; float32 90 MB, 21 us, but 2.2 GFLOP of FFMA, 37 us at 60 TF/s; ToMeSD 4096 x 320
//   (3072 to 1024): 2 GFLOP, 2.6 us of tensor cores at 790 TF/s. ESTIMATES, nothing was measured: 6, 30, 60 and 12 us. A block walks the
//   channels of a tile one chunk of 128 bytes after the other, so one small image with many channels is bound by latency.
// Norms in the tile, not in a launch of their own (cosine_kernel.cuh): 8 more shared loads to the 20 of a 16-bit chunk, but a launch saved
//   (1 to 3 us), which is half of ToMe's layer; with 32 frames the second read of the metric too.
// Deterministic: fixed orders, no float atomics; the answer does not depend on splits, fusion or alignment. Ties as in merge/match.h.
// Limits: N < 2^31 - 64. Listed positions outside [0, N) name no token. A token in two lists gives one of its rows.
#pragma once

#include "device/arrive.h"
#include "merge/match_args.h"
#include "merge/match_cuda_layout.h"
#include "select/topk_kernel.cuh"
#include "similarity/cosine_kernel.cuh"

namespace tokensieve {
namespace match {

using cosine::Best;
using similarity::kThreads;
using similarity::kTile;

constexpr int kKeys = 1024;  // in shared memory at once
constexpr int kPerThread = static_cast<int>(kFusedSources) / kThreads;
static_assert(kKeys * 8 <= similarity::kTileBytes, "keys take the place of the tile's buffers");
static_assert(kRankers == kThreads && kSide == kTile && kThreads == 2 * kTile, "a thread a source; a thread a row of a tile's two sides");

struct Args {
  MatchParams p;
  const void* rows;  // the metric, or its mean over the heads in float32
  int64_t batch_stride, row_stride;
  float *mean, *value;
  int32_t *column, *rank;
  int64_t row_tiles, column_tiles, splits, rank_blocks;
  bool wide, fused;
};

// Sources or targets as rows of a tile (similarity::Rows): every second token, or those that a list names.
template <typename T>
struct Tokens {
  const T* base;
  int64_t stride;
  int64_t first, count;
  bool wide;
  const int64_t* list;
  int64_t begin, N;

  __device__ __forceinline__ int64_t place(int64_t row) const {
    const int64_t id = list != nullptr ? list[row] : begin + 2 * row;
    return id < N ? id : -1;
  }
};

// ---- (0) mean over the heads -----------------------------------------------------------------------------------------------------------
template <typename T>
__global__ void __launch_bounds__(kThreads) mean_kernel(const Args a) {
  const MatchParams& p = a.p;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, d = i % p.D, row = i / p.D;
  if (row >= p.B * p.N) return;
  const T* from = static_cast<const T*>(p.metric) + row / p.N * p.metric_stride[0] + row % p.N * p.metric_stride[2] + d;
  float sum = 0;
#pragma unroll 4
  for (int64_t h = 0; h < p.H; ++h) sum += similarity::to_float(from[h * p.metric_stride[1]]);
  a.mean[i] = sum * (1.0f / static_cast<float>(p.H));
}

// ---- (1) products ----------------------------------------------------------------------------------------------------------------------
template <typename T>
__device__ __forceinline__ float chunk_squares(const unsigned char* row) {
  constexpr int kPart = 16 / static_cast<int>(sizeof(T)), kCount = similarity::kChunkBytes / static_cast<int>(sizeof(T));
  float sum = 0;  // beyond the chunk load_part gives zeros
#pragma unroll
  for (int c = 0; c < kCount; c += kPart) {
    float x[kPart];
    cosine::load_part(x, reinterpret_cast<const T*>(row), c, kCount, true);
#pragma unroll
    for (int j = 0; j < kPart; ++j) sum = fmaf(x[j], x[j], sum);
  }
  return sum;
}

// Of threads 0..63 a source of the tile, of the others a target.
__device__ __forceinline__ float inverse_norm(const Args& a, int64_t b, int64_t target, float squares) {
  const MatchParams& p = a.p;
  if (threadIdx.x >= kTile && (target >= p.T || !takes_part(p, b, target_id(p, b, target)))) return cosine::kNoColumn;
  return squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares);
}

// The best targets of one tile for this thread's two sources: rows g and g + 8 of the warp's 16, columns 8 n + 2 t + (0, 1).
__device__ __forceinline__ void take_tile(const float (&acc)[8][4], const float* inverse, int64_t column, Best (&best)[2]) {
  const int lane = cosine::lane_of_thread(), t = lane % 4, row = cosine::warp_of_thread() * 16 + lane / 4;
  const float scale[2] = {inverse[row], inverse[row + 8]};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 of_pair = *reinterpret_cast<const float2*>(inverse + kTile + 8 * n + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float rank = cosine::rank_of(acc[n][i], scale[i / 2], i % 2 == 0 ? of_pair.x : of_pair.y, false);
      if (rank > best[i / 2].rank) {
        best[i / 2].rank = rank;
        best[i / 2].index = static_cast<int32_t>(column + 8 * n + 2 * t + i % 2);
      }
    }
  }
}

// ---- (2) ranking -----------------------------------------------------------------------------------------------------------------------
// Over all shares of the targets; the first wins a tie.
__device__ __forceinline__ Best best_of(const Args& a, int64_t b, int64_t i) {
  Best best;
  for (int64_t s = 0; s < a.splits; ++s) {
    const int64_t at = (s * a.p.B + b) * a.p.S + i;
    const float rank = a.value[at];
    if (rank > best.rank) {
      best.rank = rank;
      best.index = a.column[at];
    }
  }
  return best;
}

__device__ __forceinline__ float similarity_of(const Best& best) {
  return best.rank == cosine::kNanRank ? __uint_as_float(0x7fc00000u) : best.rank;
}

// Descends from the best source to the worst. Upper half: 0 = has no pair, 1 = NaN.
__device__ __forceinline__ uint64_t key_of(const Args& a, int64_t b, int64_t i) {
  const MatchParams& p = a.p;
  const Best best = best_of(a, b, i);
  const float value = similarity_of(best), rank = p.bias != nullptr ? value + p.bias[b * p.S + i] : value;
  const uint32_t ordered = ordered_bits(__float_as_uint(rank));
  const bool pair = best.index >= 0 && takes_part(p, b, source_id(p, b, i));
  return selection_key(pair ? (ordered > 1 ? ordered : 1) : 0, static_cast<uint32_t>(i));
}

// rank[k] = place of source first + threadIdx.x + 128 k among all, own[k] = its key. `shared` holds kKeys keys.
template <int kPer>
__device__ inline void count_larger(const Args& a, int64_t b, int64_t first, unsigned char* shared, int (&rank)[kPer],
                                    uint64_t (&own)[kPer]) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared);
  const int64_t S = a.p.S;
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    const int64_t i = first + threadIdx.x + k * kThreads;
    own[k] = i < S ? key_of(a, b, i) : 0;
    rank[k] = 0;
  }
#pragma unroll 1
  for (int64_t c = 0; c < S; c += kKeys) {
    const int count = static_cast<int>(S - c < kKeys ? S - c : kKeys);
    __syncthreads();  // nobody reads the keys before these, or the tile, any more
    for (int j = static_cast<int>(threadIdx.x); j < count; j += kThreads) keys[j] = key_of(a, b, c + j);
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const uint64_t key = keys[j];
#pragma unroll
      for (int k = 0; k < kPer; ++k) rank[k] += key > own[k] ? 1 : 0;
    }
  }
}

// ---- (3) the plan ----------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void put_row(const MatchParams& p, int64_t b, int64_t row, int64_t id) {
  const bool names = id >= 0 && id < p.N;
  p.index[b * p.rows() + row] = names ? id : -1;
  if (names) p.inverse[b * p.N + id] = row;
}

// Rows of keep and of targets: share `part` of `parts`.
__device__ inline void put_fixed(const MatchParams& p, int64_t b, int64_t part, int64_t parts) {
  const int64_t begin = part * kThreads + threadIdx.x, step = parts * kThreads, first_target = p.P + p.S - p.r;
  for (int64_t i = begin; i < p.P; i += step) put_row(p, b, i, keep_id(p, b, i));
  for (int64_t j = begin; j < p.T; j += step) put_row(p, b, first_target + j, target_id(p, b, j));
}

__device__ __forceinline__ void put_source(const Args& a, int64_t b, int64_t i, int rank, bool pair) {
  const MatchParams& p = a.p;
  const int64_t id = source_id(p, b, i);
  if (rank < p.r) {
    const Best best = best_of(a, b, i);
    const int64_t slot = b * p.r + rank;
    p.source[slot] = pair ? id : -1;
    p.destination[slot] = pair ? target_id(p, b, best.index) : -1;
    p.similarity[slot] = pair ? similarity_of(best) : 0.0f;
    if (id >= 0 && id < p.N) p.inverse[b * p.N + id] = pair ? p.P + p.S - p.r + best.index : -1;
  } else if (p.order == MatchOrder::kScore) {
    put_row(p, b, p.P + rank - p.r, id);
  }
  a.rank[b * p.S + i] = rank;
}

template <int kPer>
__device__ inline void rank_sources(const Args& a, int64_t b, int64_t first, unsigned char* shared) {
  int rank[kPer];
  uint64_t own[kPer];
  count_larger<kPer>(a, b, first, shared, rank, own);
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    const int64_t i = first + threadIdx.x + k * kThreads;
    if (i < a.p.S) put_source(a, b, i, rank[k], own[k] >> 32 != 0);
  }
}

// Rows of the sources that stay, by place in the list; all ranks of the image are there. A thread has a run of places.
__device__ inline void put_staying(const Args& a, int64_t b, uint32_t* warp_sums) {
  const MatchParams& p = a.p;
  const int64_t share = ceil_div(p.S, kThreads), first = threadIdx.x * share, end = first + share < p.S ? first + share : p.S;
  const int32_t* rank = a.rank + b * p.S;
  uint32_t stay = 0, total = 0;
  for (int64_t i = first; i < end; ++i) stay += rank[i] >= p.r ? 1u : 0u;
  int64_t row = p.P + select::block_exclusive_sum(stay, warp_sums, total);
  for (int64_t i = first; i < end; ++i) {
    if (rank[i] >= p.r) put_row(p, b, row++, source_id(p, b, i));
  }
}

// Four blocks an SM, as the plan wants: 128 registers. Left alone, the compiler takes 80 and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) match_kernel(const Args a) {
  SIMT_DYN_SHARED(unsigned char, shared);
  SIMT_SHARED(float, inverse, [2 * kTile]);
  SIMT_SHARED(uint32_t, warp_sums, [32]);
  SIMT_SHARED(int, is_last);
  const MatchParams& p = a.p;
  const int64_t blocks = a.row_tiles * a.splits, block = blockIdx.x % blocks, b = blockIdx.x / blocks;
  const int64_t split = block % a.splits, first = block / a.splits * kTile;
  for (int64_t n = block * kThreads + threadIdx.x; p.sources != nullptr && n < p.N; n += blocks * kThreads) {
    p.inverse[b * p.N + n] = -1;  // tokens in no list keep it
  }
  const T* base = static_cast<const T*>(a.rows) + b * a.batch_stride;
  const int64_t *sources = p.sources != nullptr ? p.sources + b * p.sources_stride : nullptr,
                *targets = p.targets != nullptr ? p.targets + b * p.targets_stride : nullptr;
  const Tokens<T> x = {base, a.row_stride, first, p.S, a.wide, sources, p.source_first, p.N};
  Tokens<T> y = {base, a.row_stride, 0, p.T, a.wide, targets, p.target_first, p.N};
  const int row = static_cast<int>(threadIdx.x) % kTile;
  Best best[2];
  const int64_t end = (split + 1) * a.column_tiles / a.splits;  // a tile more would only be work done twice
  for (int64_t tile = split * a.column_tiles / a.splits; tile < end; ++tile) {
    float acc[8][4], squares = 0;
    y.first = tile * kTile;
    similarity::tile_dots<T>(acc, shared, x, y, p.D, [&](const unsigned char* of_x, const unsigned char* of_y) {
      squares += chunk_squares<T>((threadIdx.x < kTile ? of_x : of_y) + row * similarity::kRowBytes);
    });
    inverse[threadIdx.x] = inverse_norm(a, b, y.first + row, squares);
    __syncthreads();  // the next ones are written behind the barriers of the next tile
    take_tile(acc, inverse, y.first, best);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Best all = cosine::quad_best(best[half]);
    const int lane = cosine::lane_of_thread();
    const int64_t i = first + cosine::warp_of_thread() * 16 + lane / 4 + 8 * half, at = (split * p.B + b) * p.S + i;
    if (lane % 4 == 0 && i < p.S) {
      a.value[at] = all.rank;
      a.column[at] = all.index;
    }
  }
  if (!a.fused || !simt::arrive_last(p.semaphores + b, static_cast<int>(blocks), &is_last)) return;
  put_fixed(p, b, 0, 1);
  rank_sources<kPerThread>(a, b, 0, shared);
  if (p.order == MatchOrder::kScore) return;
  __syncthreads();
  put_staying(a, b, warp_sums);
}

__global__ void __launch_bounds__(kThreads) rank_kernel(const Args a) {
  SIMT_DYN_SHARED(unsigned char, shared);
  SIMT_SHARED(uint32_t, warp_sums, [32]);
  SIMT_SHARED(int, is_last);
  const int64_t b = blockIdx.x / a.rank_blocks, part = blockIdx.x % a.rank_blocks;
  put_fixed(a.p, b, part, a.rank_blocks);
  rank_sources<1>(a, b, part * kThreads, shared);
  if (a.p.order == MatchOrder::kScore) return;
  if (simt::arrive_last(a.p.semaphores + b, static_cast<int>(a.rank_blocks), &is_last)) put_staying(a, b, warp_sums);
}

}  // namespace match
}  // namespace tokensieve

// select_diverse: greedy max-min selection (DivPrune, arXiv 2503.02175; farthest point sampling), the exact answer of the O(K^2 N) loop.
//
// In: x [B, N, C], optional candidates [B, N], first [B]. Out: index int64 [B, K].
// Algorithm: (1) gram_kernel (gram.cuh): dot products of every pair of 64-token tiles i <= j, written to both places of an N x N matrix,
//   the diagonal apart; (2) nearest_kernel, where a first pick has to be found: distance to the nearest other token, a warp a row;
//   (3) pick_kernel, one block an image: every thread owns up to 8 tokens and the distance of each to its nearest pick. A round reads the
//   matrix rows of the newest picks once, then picks lazily: distances only fall, so the best token of each warp is a candidate, and the
//   best second of all warps a bound that no other token can beat. One warp keeps picking among the candidates, whose mutual distances are
//   in shared memory, while the best of them is above the bound: about 7 picks a sweep on random data (32 warps), the same picks in the same
//   order as one by one. Keys (distance bits, complement of the index) are unique, so ties go to the lowest index.
//   Matrix beyond 8 GiB: step_kernel, a launch a pick, computes the row of the last pick instead of reading it.
// Work: N^2 C flops (half of the product), 4 K N bytes from L2 at most. Floor on H200: 2880 -> 320 of 4096 channels 86 us of tensor cores
//   (790 TF/s) and 40 rounds of about 2 us; 576 -> 64 3 us and 9 rounds. ESTIMATE, nothing was measured: 250 us and 40 us. Bound by latency:
//   a round is one L2 row read, three barriers and the picks' shuffles.
// Deterministic: no atomics but OR into the bitmap of picked tokens.
// Limits: N < 2^31 - 1.
#pragma once

#include "similarity/diverse_args.h"
#include "similarity/gram.cuh"

namespace tokensieve {
namespace diverse {

using similarity::kThreads;
using similarity::kTile;

struct Args {
  DiverseParams p;
  float *dots, *squares, *nearest, *best;
  uint32_t* picked;
  unsigned long long* winners;
  int64_t words, step_blocks;
  int tiles;
  bool wide, lazy;
};

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Never negative; NaN gives 0. Rows of the same values have a == b == dot, so their distance is exactly 0.
__device__ __forceinline__ float distance(DiverseMetric metric, float dot, float a, float b) {
  float d;
  if (metric == DiverseMetric::kEuclidean) {
    d = a + b - (dot + dot);
  } else {
    const float norms = a == b ? a : sqrtf(a) * sqrtf(b);
    d = a == 0.0f || b == 0.0f ? 1.0f : 1.0f - dot / norms;
  }
  return d > 0.0f ? d : 0.0f;
}

__device__ __forceinline__ bool is_candidate(const DiverseParams& p, int64_t b, int64_t n) {
  return p.candidates == nullptr || p.candidates[b * p.candidates_stride + n] != 0;
}

// Distance and complement of the index: larger is farther, then lower. 0 = no token.
__device__ __forceinline__ uint64_t key_of(float distance, int64_t n) {
  return static_cast<uint64_t>(__float_as_uint(distance)) << 32 | (0xffffffffu - static_cast<uint32_t>(n));
}
__device__ __forceinline__ int64_t token_of(uint64_t key) { return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key)); }
__device__ __forceinline__ float distance_of(uint64_t key) { return __uint_as_float(static_cast<uint32_t>(key >> 32)); }

// ---- (2) the nearest other token -------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads) nearest_kernel(const Args a) {
  const DiverseParams& p = a.p;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * similarity::kWarps + static_cast<int>(threadIdx.x) / 32;
  if (row >= p.B * p.N) return;
  const int64_t b = row / p.N, i = row % p.N;
  const float* dots = a.dots + row * p.N;
  const float* squares = a.squares + b * p.N;
  const float own = squares[i];
  float least = infinity();
  for (int64_t j = static_cast<int>(threadIdx.x) % 32; j < p.N; j += 32) {
    if (j == i || !is_candidate(p, b, j)) continue;
    const float d = distance(p.metric, dots[j], own, squares[j]);
    least = d < least ? d : least;
  }
  least = simt::warp::min(least);
  if (threadIdx.x % 32 == 0) a.nearest[row] = least;
}

// The same without a matrix: a block computes all tiles of its 64 rows. squares are there.
template <typename T>
__global__ void __launch_bounds__(kThreads) nearest_tiles_kernel(const Args a) {
  SIMT_DYN_SHARED(unsigned char, shared);
  const DiverseParams& p = a.p;
  const int64_t b = blockIdx.x / a.tiles, first = static_cast<int64_t>(blockIdx.x % a.tiles) * kTile;
  const T* base = static_cast<const T*>(p.x) + b * p.x_stride[0];
  const float* squares = a.squares + b * p.N;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t row[2] = {first + static_cast<int>(threadIdx.x) / 32 * 16 + g, first + static_cast<int>(threadIdx.x) / 32 * 16 + g + 8};
  float least[2] = {infinity(), infinity()};
  for (int tile = 0; tile < a.tiles; ++tile) {
    float acc[8][4];
    similarity::tile_dots<T>(acc, shared, {base, p.x_stride[1], first, p.N, a.wide},
                             {base, p.x_stride[1], int64_t{tile} * kTile, p.N, a.wide}, p.C);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t column = int64_t{tile} * kTile + 8 * n + 2 * t + i % 2;
        if (row[i / 2] >= p.N || column >= p.N || column == row[i / 2] || !is_candidate(p, b, column)) continue;
        const float d = distance(p.metric, acc[n][i], squares[row[i / 2]], squares[column]);
        least[i / 2] = d < least[i / 2] ? d : least[i / 2];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float quad = simt::tile<4>::min(least[i]);
    if (t == 0 && row[i] < p.N) a.nearest[b * p.N + row[i]] = quad;
  }
}

// ---- (3) picking -------------------------------------------------------------------------------------------------------------------------
struct TopTwo {
  uint64_t first = 0, second = 0;
  __device__ __forceinline__ void add(uint64_t key) {
    second = key > first ? first : key > second ? key : second;
    first = key > first ? key : first;
  }
};

__device__ __forceinline__ TopTwo warp_top_two(TopTwo x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t first = simt::warp::shfl_xor(x.first, step), second = simt::warp::shfl_xor(x.second, step);
    x.second = x.first < first ? (x.first > second ? x.first : second) : (first > x.second ? first : x.second);
    x.first = x.first < first ? first : x.first;
  }
  return x;
}

// Positions of the picked tokens, ascending, to the first slots of `out`; -1 behind. All threads of the block.
__device__ inline void emit_sorted(const uint32_t* words, int64_t count, int64_t K, int64_t* out, uint32_t* warp_sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  int64_t base = 0;
  for (int64_t from = 0; from < count; from += blockDim.x) {
    const int64_t w = from + threadIdx.x;
    uint32_t word = w < count ? words[w] : 0u;
    const uint32_t here = static_cast<uint32_t>(__popc(word)), inclusive = simt::warp::inclusive_sum(here);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    const uint32_t sums = simt::warp::inclusive_sum(lane < warps ? warp_sums[lane] : 0u);
    const uint32_t before = warp == 0 ? 0u : simt::warp::shfl(sums, warp - 1), total = simt::warp::shfl(sums, 31);
    int64_t slot = base + before + inclusive - here;
    for (; word != 0; word &= word - 1) out[slot++] = w * 32 + (__ffs(static_cast<int>(word)) - 1);
    base += total;
    __syncthreads();  // before warp_sums of the next 32 * blockDim tokens
  }
  for (int64_t slot = base + threadIdx.x; slot < K; slot += blockDim.x) out[slot] = -1;
}

// What the threads of a picking block tell each other.
struct PickShared {
  uint64_t *leaders, *seconds;  // [32] best and second best key of a warp
  float (*between)[33];         // distances of the leaders
  int64_t* fresh;               // [32] tokens picked in this round
  int* fresh_count;
};

// One image of a picking block. Token i * threads + me is the i-th of thread me.
struct PickRow {
  int64_t b, N;
  const float *dots, *squares;
  float* best;
  uint32_t* picked;
  int64_t* out;
  int threads, me, lane, warp, warps;

  __device__ __forceinline__ explicit PickRow(const Args& a) {
    b = blockIdx.x, N = a.p.N;
    dots = a.dots + b * N * N, squares = a.squares + b * N, best = a.best + b * N;
    picked = a.picked + b * a.words, out = a.p.index + b * a.p.K;
    threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x), lane = me % 32, warp = me / 32, warps = threads / 32;
  }
  __device__ __forceinline__ int64_t token(int i) const { return static_cast<int64_t>(i) * threads + me; }
};

// A thread's tokens and their distances to the nearest pick: kItems in registers; 0: any number, the distances in a.best.
template <int kItems>
struct Held {
  float best[kItems > 0 ? kItems : 1], square[kItems > 0 ? kItems : 1];
  uint32_t open = 0;  // kItems > 0: bit i: the i-th token exists and is not picked
};
// A constant where there are registers: a loop over fewer would index them.
template <int kItems>
__device__ __forceinline__ int items_of(const PickRow& row) {
  return kItems > 0 ? kItems : static_cast<int>(ceil_div(row.N, row.threads));
}

// The keys of the first round: by the nearest other token, or the given one alone.
template <int kItems>
__device__ __forceinline__ TopTwo start_picking(const Args& a, const PickRow& row, Held<kItems>& held) {
  const DiverseParams& p = a.p;
  const int64_t wanted = p.first != nullptr ? p.first[row.b] : -1;
  const bool given = wanted >= 0 && wanted < row.N && is_candidate(p, row.b, wanted);
  TopTwo top;
#pragma unroll
  for (int i = 0; i < items_of<kItems>(row); ++i) {
    const int64_t n = row.token(i);
    const bool exists = n < row.N && is_candidate(p, row.b, n);
    if constexpr (kItems > 0) {
      held.best[i] = infinity();
      held.square[i] = n < row.N ? row.squares[n] : 0.0f;
      held.open |= exists ? 1u << i : 0u;
    } else if (n < row.N) {
      row.best[n] = exists ? infinity() : -1.0f;
    }
    if (exists) top.add(given ? (n == wanted ? key_of(0.0f, n) : 0) : key_of(a.nearest[row.b * row.N + n], n));
  }
  return top;
}

// Distances of the warps' leaders from each other: a warp's row of `between`.
__device__ __forceinline__ void compare_leaders(const Args& a, const PickRow& row, const PickShared& s) {
  if (s.leaders[row.warp] == 0) return;
  const int64_t from = token_of(s.leaders[row.warp]);
  const uint64_t other = row.lane < row.warps ? s.leaders[row.lane] : 0;
  if (other == 0) return;
  const int64_t to = token_of(other);
  s.between[row.warp][row.lane] = distance(a.p.metric, row.dots[from * row.N + to], row.squares[from], row.squares[to]);
}

// The first warp picks leaders, farthest first, as long as no token that is not among them can be farther. `one`: no more than one.
__device__ __forceinline__ void take_leaders(const Args& a, const PickRow& row, const PickShared& s, bool one, int64_t all) {
  const int lane = row.lane;
  uint64_t key = lane < row.warps ? s.leaders[lane] : 0;
  const uint64_t bound = simt::warp::max(lane < row.warps ? s.seconds[lane] : uint64_t{0});
  int taken = 0;
  while (all + taken < a.p.K) {
    const uint64_t most = simt::warp::max(key);
    if (most == 0 || (taken > 0 && (one || most < bound))) break;
    const int owner = __ffs(static_cast<int>(simt::warp::ballot(key == most))) - 1;
    if (lane == 0) {
      s.fresh[taken] = token_of(most);
      row.out[all + taken] = token_of(most);
    }
    if (lane == owner) {
      key = 0;
    } else if (!one && key != 0 && s.between[owner][lane] < distance_of(key)) {
      key = key_of(s.between[owner][lane], token_of(key));
    }
    ++taken;
  }
  if (lane == 0) *s.fresh_count = taken;
}

// The distances of a thread's tokens to one more pick, whose row of the matrix is read coalesced.
template <int kItems>
__device__ __forceinline__ void add_pick(const Args& a, const PickRow& row, Held<kItems>& held, int64_t pick) {
  const float* dots = row.dots + pick * row.N;
  const float of_pick = row.squares[pick];
#pragma unroll
  for (int i = 0; i < items_of<kItems>(row); ++i) {
    const int64_t n = row.token(i);
    if constexpr (kItems > 0) {
      if ((held.open >> i & 1u) == 0) continue;
      if (n == pick) {
        held.open &= ~(1u << i);
        continue;
      }
      const float d = distance(a.p.metric, dots[n], of_pick, held.square[i]);
      held.best[i] = d < held.best[i] ? d : held.best[i];
    } else {
      if (n >= row.N || row.best[n] < 0.0f) continue;
      const float d = n == pick ? -1.0f : distance(a.p.metric, dots[n], of_pick, row.squares[n]);
      row.best[n] = d < row.best[n] ? d : row.best[n];
    }
  }
}

template <int kItems>
__device__ __forceinline__ TopTwo best_keys(const PickRow& row, const Held<kItems>& held) {
  TopTwo top;
#pragma unroll
  for (int i = 0; i < items_of<kItems>(row); ++i) {
    const int64_t n = row.token(i);
    if constexpr (kItems > 0) {
      if ((held.open >> i & 1u) != 0) top.add(key_of(held.best[i], n));
    } else if (n < row.N && row.best[n] >= 0.0f) {
      top.add(key_of(row.best[n], n));
    }
  }
  return top;
}

template <int kItems>
__global__ void __launch_bounds__(kMaxThreads, 1) pick_kernel(const Args a) {
  SIMT_SHARED(uint64_t, leaders, [32]);
  SIMT_SHARED(uint64_t, seconds, [32]);
  SIMT_SHARED(float, between, [32][33]);
  SIMT_SHARED(int64_t, fresh, [32]);
  SIMT_SHARED(int, fresh_count);
  SIMT_SHARED(uint32_t, warp_sums, [32]);
  const PickShared shared = {leaders, seconds, between, fresh, &fresh_count};
  const PickRow row(a);
  Held<kItems> held;
  for (int64_t w = row.me; w < a.words; w += row.threads) row.picked[w] = 0;

  TopTwo top = start_picking(a, row, held);
  int64_t all = 0;  // picks so far, counted by every thread
  for (bool first_round = true;; first_round = false) {
    top = warp_top_two(top);
    if (row.lane == 0) {
      leaders[row.warp] = top.first;
      seconds[row.warp] = top.second;
    }
    __syncthreads();
    const bool one = first_round || !a.lazy;  // nearest-other distances say nothing about each other
    if (!one) compare_leaders(a, row, shared);
    __syncthreads();
    if (row.warp == 0) take_leaders(a, row, shared, one, all);
    __syncthreads();
    const int taken = fresh_count;
    if (taken == 0) break;
    all += taken;
    for (int q = row.me; q < taken; q += row.threads) atomicOr(&row.picked[fresh[q] / 32], 1u << (fresh[q] % 32));
    for (int q = 0; q < taken; ++q) add_pick(a, row, held, fresh[q]);
    top = best_keys(row, held);
    if (all >= a.p.K) break;
  }
  __syncthreads();
  if (a.p.order == DiverseOrder::kPosition) {
    emit_sorted(row.picked, a.words, a.p.K, row.out, warp_sums);
  } else {
    for (int64_t slot = all + row.me; slot < a.p.K; slot += row.threads) row.out[slot] = -1;
  }
}

// ---- one launch a pick, where the matrix is too large ----------------------------------------------------------------------------------------
// Launch 0 ranks by the nearest other token; launch k (1 .. K) reads the winners of launch k - 1, writes pick k - 1, and ranks by the distance
// to the picks. squares are then sums in the order of row_dot.
template <typename T>
__device__ __forceinline__ float row_dot(const T* x, const T* y, int64_t C) {
  float sum = 0;
#pragma unroll 4
  for (int64_t c = static_cast<int>(threadIdx.x) % 32; c < C; c += 32)
    sum = fmaf(similarity::to_float(x[c]), similarity::to_float(y[c]), sum);
  return simt::warp::sum(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) step_kernel(const Args a, const int64_t pick_number) {
  SIMT_SHARED(uint64_t, keys, [similarity::kWarps]);
  const DiverseParams& p = a.p;
  const int64_t b = blockIdx.x / a.step_blocks, block = blockIdx.x % a.step_blocks;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const T* base = static_cast<const T*>(p.x) + b * p.x_stride[0];
  unsigned long long* now = a.winners + (pick_number % 2 * p.B + b) * a.step_blocks;
  const unsigned long long* before = a.winners + ((pick_number + 1) % 2 * p.B + b) * a.step_blocks;
  int64_t pick = -1;
  if (pick_number == 0) {
    const int64_t wanted = p.first != nullptr ? p.first[b] : -1;
    if (wanted >= 0 && wanted < p.N && is_candidate(p, b, wanted)) pick = wanted;
  } else {
    uint64_t most = 0;
    for (int64_t i = lane; i < a.step_blocks; i += 32) most = before[i] > most ? before[i] : most;
    most = simt::warp::max(most);
    pick = most == 0 ? -1 : token_of(most);
    if (block == 0 && threadIdx.x == 0) {
      p.index[b * p.K + pick_number - 1] = pick;
      if (pick >= 0) a.picked[b * a.words + pick / 32] |= 1u << (pick % 32);
    }
  }
  const T* last = base + (pick_number > 0 && pick >= 0 ? pick : 0) * p.x_stride[1];
  const float last_square = pick_number > 0 ? row_dot(last, last, p.C) : 0.0f;
  uint64_t most = 0;
  for (int i = warp; i < kStepRows; i += similarity::kWarps) {
    const int64_t n = block * kStepRows + i;
    if (n >= p.N) break;
    float* best = a.best + b * p.N + n;
    if (pick_number == 0) {
      const bool exists = is_candidate(p, b, n);
      if (lane == 0) *best = exists ? infinity() : -1.0f;
      const uint64_t key = pick >= 0 ? (n == pick ? key_of(0.0f, n) : 0) : key_of(a.nearest[b * p.N + n], n);
      if (exists && key > most) most = key;
      continue;
    }
    const float so_far = simt::warp::shfl(lane == 0 ? *best : 0.0f, 0);  // lane 0 alone reads and writes it
    if (so_far < 0.0f) continue;
    const T* row = base + n * p.x_stride[1];
    const float dot = row_dot(last, row, p.C), square = row_dot(row, row, p.C);
    const float d = pick < 0 || n == pick ? -1.0f : distance(p.metric, dot, last_square, square);
    if (lane == 0) *best = d < so_far ? d : so_far;
    const float nearest = d < so_far ? d : so_far;
    if (nearest >= 0.0f) most = key_of(nearest, n) > most ? key_of(nearest, n) : most;
  }
  if (lane == 0) keys[warp] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < similarity::kWarps; ++w) most = keys[w] > most ? keys[w] : most;
    now[block] = most;
  }
}

__global__ void __launch_bounds__(kThreads) clear_kernel(uint32_t* words, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) words[i] = 0;
}

__global__ void __launch_bounds__(kThreads) sort_kernel(const Args a) {
  SIMT_SHARED(uint32_t, warp_sums, [32]);
  const int64_t b = blockIdx.x;
  emit_sorted(a.picked + b * a.words, a.words, a.p.K, a.p.index + b * a.p.K, warp_sums);
}

}  // namespace diverse
}  // namespace tokensieve

// select_samples: inverse transform sampling of the tokens of a row (ATS, arXiv 2111.15667, section 3.2). One block a row.
//
// In: scores [B, N] float32/float16/bfloat16, optional candidates [B, N] and points [B, R]. Out: picks int64 [B, capacity] in ascending score
//   order, counts int64 [B], overflow bool [B].
// Algorithm: bitonic sort of (order, position) in shared memory (in the workspace above 16384 tokens), block scans of the integer masses
//   (mass.h) give the cdf, two binary searches a point mark its token, a scan over the marks gives every pick its slot.
// Work: bytes = B (N e + 8 capacity). Floor on H200: launch-bound (2 us); the sort is log2(N)^2 / 2 steps with a barrier each: 36 at N = 196,
//   an estimated 4 us; 105 at 16384, an estimated 60 us.
// Launch: grid.x = B; half the keys as threads, 64 to 1024. Deterministic: integers and one rounded quotient; the CPU picks the same tokens.
// Limits: N < 2^30.
#pragma once

#include "select/count_kernel.cuh"
#include "select/samples_args.h"
#include "select/samples_row.h"

namespace tokensieve {
namespace select {

struct SamplesShared {
  Mass* warp_sums;   // [32]
  uint32_t* counts;  // [32]
  unsigned* scalar;  // [2]: largest ordered bits, then the least positive cdf; candidates
};

// Complement of (ordered bits, position), so that the descending sort leaves ascending scores; 0 for what is no candidate.
template <typename T>
__device__ inline void load_keys(const TopkParams& p, int b, int size, uint64_t* keys, const SamplesShared& s) {
  const T* const row = static_cast<const T*>(p.scores) + b * p.score_stride;
  unsigned largest = 0, n = 0;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
    uint64_t key = 0;
    if (i < p.N && (p.candidates == nullptr || p.candidates[b * p.candidates_stride + i] != 0)) {
      const uint32_t order = score_order(row[i]);
      key = ~(static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(i));
      largest = order > largest ? order : largest;
      ++n;
    }
    keys[i] = key;
  }
  largest = simt::warp::max(largest);
  n = simt::warp::sum(n);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&s.scalar[0], largest);
    atomicAdd(&s.scalar[1], n);
  }
}

// Sorted keys -> (cdf bits, position). Returns false where the row has no mass above its first token's. All threads; ends with a barrier.
__device__ inline bool make_cdf(uint64_t* keys, int n, uint32_t largest, int shift, const SamplesShared& s) {
  constexpr uint32_t kZero = 0x80000000u;
  const auto mass_at = [&](int j) {
    const uint32_t order = static_cast<uint32_t>(~keys[j] >> 32);
    return j > 0 && order > kZero ? static_cast<Mass>(mass_of(order & 0x7fffffffu, largest & 0x7fffffffu, shift)) : Mass{0};
  };
  const int threads = static_cast<int>(blockDim.x);
  Mass mine = 0, range;
  for (int j = static_cast<int>(threadIdx.x); j < n && largest > kZero; j += threads) mine += mass_at(j);
  block_exclusive_mass(mine, s.warp_sums, range);
  if (range == 0) return false;
  unsigned least = 0x3f800000u;  // 1, the last value
  Mass base = 0;
  for (int tile = 0; tile < n; tile += threads) {
    const int j = tile + static_cast<int>(threadIdx.x);
    const Mass mass = j < n ? mass_at(j) : 0;
    Mass total;
    const Mass sum = base + block_exclusive_mass(mass, s.warp_sums, total) + mass;
    base += total;
    if (j >= n) continue;
    const unsigned bits = __float_as_uint(cdf_value(sum, range));
    keys[j] = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~keys[j]);
    if (bits != 0 && bits < least) least = bits;
  }
  least = simt::warp::min(least);
  if (threadIdx.x % 32 == 0) atomicMin(&s.scalar[0], least);
  __syncthreads();
  return true;
}

template <typename T>
__global__ void __launch_bounds__(1024, 1) samples_kernel(const SamplesParams p, const int size, const bool held) {
  SIMT_SHARED(Mass, warp_sums, [32]);
  SIMT_SHARED(uint32_t, warp_counts, [32]);
  SIMT_SHARED(unsigned, scalar, [2]);
  SIMT_DYN_SHARED(uint64_t, dynamic);
  const SamplesShared s = {warp_sums, warp_counts, scalar};
  const int b = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int words = (size + 31) / 32;
  uint64_t* const keys = held ? dynamic : static_cast<uint64_t*>(p.workspace) + static_cast<int64_t>(b) * (size + words);
  unsigned* const marks = reinterpret_cast<unsigned*>(keys + size);
  if (thread < 2) scalar[thread] = 0;
  for (int i = thread; i < words; i += threads) marks[i] = 0;
  __syncthreads();
  load_keys<T>(p.rows, b, size, keys, s);
  sort_descending(keys, size);
  const int n = static_cast<int>(scalar[1]);
  const uint32_t largest = scalar[0];
  __syncthreads();
  if (thread == 0) scalar[0] = 0xffffffffu;  // make_cdf's sums have a barrier before anyone looks
  if (make_cdf(keys, n, largest, mass_shift(p.rows.N), s)) {
    const float start = __uint_as_float(scalar[0]);
    const auto cdf = [&](int64_t j) { return __uint_as_float(static_cast<uint32_t>(keys[j] >> 32)); };
    for (int64_t t = thread; t < p.R; t += threads) {
      const int64_t j = nearest(cdf, n, sample_point(p, b, t, start));
      if (j >= 0) atomicOr(&marks[j / 32], 1u << (j % 32));
    }
  }
  __syncthreads();
  uint32_t mine = 0, count;
  for (int i = thread; i < words; i += threads) mine += static_cast<uint32_t>(__popc(marks[i]));
  block_exclusive_sum(mine, s.counts, count);
  if (thread == 0) {
    p.counts[b] = count;
    p.overflow[b] = count > p.capacity;
  }
  int64_t* const out = p.index + b * p.capacity;
  int64_t slots = count > p.capacity ? p.capacity - static_cast<int64_t>(count) : 0;  // negative: the weakest picks have no slot
  for (int tile = 0; tile < n; tile += threads) {
    const int j = tile + thread;
    const uint32_t marked = j < n ? marks[j / 32] >> (j % 32) & 1u : 0u;
    uint32_t total;
    const int64_t slot = slots + block_exclusive_sum(marked, s.counts, total);
    if (marked != 0 && slot >= 0) out[slot] = static_cast<int64_t>(static_cast<uint32_t>(keys[j]));
    slots += total;
  }
  for (int64_t i = count + static_cast<int64_t>(thread); i < p.capacity; i += threads) out[i] = -1;
}

}  // namespace select
}  // namespace tokensieve

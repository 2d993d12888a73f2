// Counts of select_mass and select_threshold: how many tokens of a row the rule keeps. One block a row, no sort, no float atomics.
//
// In: scores [B, N], optional masks, level per row. Out: counts, take int64 [B], overflow bool [B].
// Algorithm: the row in registers or shared memory as in topk_kernel.cuh. Threshold: one count. Mass: 64-bit integer masses (mass.h) go into
//   histograms of 11 + 10 + 10 bits of the positive ordered bits; in each, the bin in which the running mass from the top reaches the
//   target; at the last level all tokens of a bin are one value, and a division says how many of them are needed.
// Work: bytes = B N e once, then registers. Floor on H200: launch-bound (2 us); about 15 barriers, an estimated 4 us at N = 4096. Estimates.
// Shared: 8 KB of counts, 16 KB of masses. Shared integer atomics: a row of few values piles up on few bins (neighbours are added first).
// Deterministic: integers; the same counts on every back end.
#pragma once

#include "select/mass.h"
#include "select/topk_kernel.cuh"

namespace tokensieve {
namespace select {

using Mass = unsigned long long;  // what 64-bit atomics take

struct CountShared {
  int* counts;   // [kBins]
  Mass* masses;  // [kBins]
  Mass* warp_sums;
  Mass* found;   // [4]: bin, mass left to reach in it, tokens above it, total mass
  int* classes;  // [4]: eligible, always, beyond tau, largest ordered bits
};

// Adds this thread's members in [lower, upper] to the histograms of bits [shift, shift + 11).
template <int kItems>
__device__ __forceinline__ void add_masses(const Items<kItems>& items, uint32_t members, uint32_t lower, uint32_t upper, int shift,
                                           uint32_t mask, uint32_t largest, int mass_bits, const CountShared& s) {
  int bin = -1, count = 0;
  Mass mass = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t order = items.order[i];
    if ((members >> i & 1u) == 0 || order < lower || order > upper) continue;
    const int mine = static_cast<int>(order >> shift & mask);
    if (mine != bin) {
      if (count > 0) {
        atomicAdd(&s.counts[bin], count);
        atomicAdd(&s.masses[bin], mass);
      }
      bin = mine;
      count = 0;
      mass = 0;
    }
    ++count;
    mass += mass_of(order & 0x7fffffffu, largest, mass_bits);
  }
  if (count > 0) {
    atomicAdd(&s.counts[bin], count);
    atomicAdd(&s.masses[bin], mass);
  }
}

// Exclusive sum over the block's threads in order, and the total. Ends with a barrier.
__device__ inline Mass block_exclusive_mass(Mass value, Mass* warp_sums, Mass& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const Mass inclusive = simt::warp::inclusive_sum(value);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const Mass sums = simt::warp::inclusive_sum(lane < warps ? warp_sums[lane] : Mass{0});
  const Mass before = warp == 0 ? Mass{0} : simt::warp::shfl(sums, warp - 1);
  total = simt::warp::shfl(sums, 31);
  __syncthreads();
  return before + inclusive - value;
}

// Total mass of the histogram. All threads; ends with a barrier.
__device__ inline Mass total_mass(const CountShared& s) {
  Mass sum = 0, total;
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) sum += s.masses[i];
  block_exclusive_mass(sum, s.warp_sums, total);
  return total;
}

// The bin, from the top, in which the running mass reaches `target` (0 < target <= all): found = {bin, mass left to reach, tokens above}.
__device__ inline void find_mass(const CountShared& s, Mass target) {
  const int each = (kBins + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = kBins - 1 - static_cast<int>(threadIdx.x) * each;
  Mass mass = 0, tokens = 0, total;
  for (int i = 0; i < each && first - i >= 0; ++i) {
    mass += s.masses[first - i];
    tokens += static_cast<Mass>(s.counts[first - i]);
  }
  Mass above = block_exclusive_mass(mass, s.warp_sums, total);
  Mass taken = block_exclusive_mass(tokens, s.warp_sums, total);
  if (above >= target || above + mass < target) return;
  int bin = first;
  while (above + s.masses[bin] < target) {
    above += s.masses[bin];
    taken += static_cast<Mass>(s.counts[bin--]);
  }
  s.found[0] = static_cast<Mass>(bin);
  s.found[1] = target - above;
  s.found[2] = taken;
}

// Counts of eligible and always kept tokens, those beyond tau, and the largest ordered bits. All threads; ends with a barrier.
template <typename R>
__device__ inline void survey(const R& row, const CountShared& s, uint32_t from, bool by_mass) {
  if (threadIdx.x < 4) s.classes[threadIdx.x] = 0;
  __syncthreads();
  int eligible = 0, always = 0, beyond = 0;
  unsigned largest = 0;
  for (int tile = 0; tile < row.tiles; ++tile) {
    const auto items = row.load(tile);
    constexpr int kItems = sizeof(items.order) / sizeof(uint32_t);
    eligible += __popc(items.candidate | items.always);
    always += __popc(items.always);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t order = items.order[i];
      if (((items.candidate | items.always) >> i & 1u) != 0 && order > largest) largest = order;
      if (!by_mass && (items.candidate >> i & 1u) != 0 && order >= from) ++beyond;
    }
  }
  eligible = simt::warp::sum(eligible);
  always = simt::warp::sum(always);
  beyond = simt::warp::sum(beyond);
  largest = simt::warp::max(largest);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&s.classes[0], eligible);
    atomicAdd(&s.classes[1], always);
    atomicAdd(&s.classes[2], beyond);
    atomicMax(reinterpret_cast<unsigned*>(&s.classes[3]), largest);
  }
  __syncthreads();
}

// Tokens of the shortest prefix that reaches the row's target, always kept ones first; -1 = even all do not. All threads.
template <typename T, typename R>
__device__ inline int64_t prefix_count(const CountParams& p, const R& row, const CountShared& s, double share, uint32_t largest) {
  const int bits = mass_shift(p.rows.N);
  constexpr uint32_t kZero = 0x80000000u;  // ordered bits of 0: above it a score is positive
  uint32_t lower = kZero + 1u, upper = 0xffffffffu;
  Mass target = 0;
  int64_t count = s.classes[1];
  constexpr int kPasses = sizeof(T) == 4 ? 3 : 2;  // a 16-bit float has no bits below 2^10 of its float32
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 10 : 0;
    const uint32_t mask = pass == 0 ? 2047u : 1023u;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      s.counts[i] = 0;
      s.masses[i] = 0;
    }
    if (pass == 0 && threadIdx.x == 0) s.found[3] = 0;
    __syncthreads();
    Mass first = 0;
    for (int tile = 0; tile < row.tiles; ++tile) {
      const auto items = row.load(tile);
      constexpr int kItems = sizeof(items.order) / sizeof(uint32_t);
      add_masses(items, items.candidate, lower, upper, shift, mask, largest, bits, s);
      if (pass > 0) continue;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if ((items.always >> i & 1u) != 0 && items.order[i] > kZero) first += mass_of(items.order[i] & 0x7fffffffu, largest, bits);
      }
    }
    if (pass == 0) {
      first = simt::warp::sum(first);
      if (threadIdx.x % 32 == 0) atomicAdd(&s.found[3], first);
    }
    __syncthreads();
    if (pass == 0) {
      const Mass before = s.found[3], total = before + total_mass(s);
      target = mass_target(p.rule, share, total);
      if (target > total) return -1;
      if (target <= before) return count;
      target -= before;
    }
    find_mass(s, target);
    __syncthreads();
    lower = (pass == 0 ? kZero : lower) | static_cast<uint32_t>(s.found[0]) << shift;
    upper = lower + ((1u << shift) - 1u);
    target = s.found[1];
    count += static_cast<int64_t>(s.found[2]);  // written again only behind the barriers of the next pass
  }
  const Mass each = mass_of(lower & 0x7fffffffu, largest, bits);
  count += static_cast<int64_t>((target + each - 1) / each);
  return count - (p.rule == CountRule::kBelow ? 1 : 0);
}

template <typename T, int kItems, Hold kHold>
__global__ void __launch_bounds__(1024, 1) count_kernel(const CountParams p) {
  SIMT_SHARED(int, counts, [kBins]);
  SIMT_SHARED(Mass, masses, [kBins]);
  SIMT_SHARED(Mass, warp_sums, [32]);
  SIMT_SHARED(Mass, found, [4]);
  SIMT_SHARED(int, classes, [4]);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  const CountShared s = {counts, masses, warp_sums, found, classes};
  const int b = static_cast<int>(blockIdx.x);
  const Row<T, kItems, kHold> row(p.rows, b, dynamic);
  const double level = p.levels != nullptr ? static_cast<double>(p.levels[b]) : p.level;
  const bool by_mass = p.rule == CountRule::kReach || p.rule == CountRule::kBelow;
  const float tau = static_cast<float>(level);
  const uint32_t at_tau = score_order(tau);  // NaN: 0, which every score reaches, so it is asked for below
  survey(row, s, p.rule == CountRule::kAbove ? at_tau + 1u : at_tau, by_mass);
  int64_t count;
  if (by_mass) {
    count = prefix_count<T>(p, row, s, level, static_cast<uint32_t>(s.classes[3]) & 0x7fffffffu);
    if (count < 0) count = s.classes[0];
  } else {
    count = s.classes[1] + (tau == tau ? s.classes[2] : 0);
  }
  if (threadIdx.x == 0) store_count(p, b, limited_count(p, count, s.classes[1], s.classes[0]));
}

}  // namespace select
}  // namespace tokensieve

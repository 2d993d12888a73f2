// What the pooling kernels share: a warp's part of a row, and the sum of some rows of a tensor into it. See pool_kernel.cuh.
#pragma once

#include "merge/merge_values.cuh"
#include "merge/pool_cuda_args.h"

namespace tokensieve {
namespace pool {

using merge::accumulate;
using merge::Divisor;
using merge::Pack;
using merge::Sums;
using merge::widen;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// A warp's part of a row: vectors [begin, end) of row `row` of batch row b.
struct Item {
  int64_t b;
  int row, begin, end;
};

// False for the warps behind the last part.
__device__ __forceinline__ bool find_item(const Rows& rows, int rows_per_batch, Item& item) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (at >= rows.count) return false;
  const int part = static_cast<int>(at) % rows.splits, row = static_cast<int>(at) / rows.splits;  // below 2^31
  item.b = row / rows_per_batch, item.row = row % rows_per_batch;
  item.begin = part * rows.part;
  item.end = item.begin + rows.part < rows.units ? item.begin + rows.part : rows.units;
  return true;
}

// A row that goes into a sum; -1: none, then the weight is 0.
struct Part {
  int row;
  float weight;
};

// out = the weighted sum of rows of `base`, `stride` elements apart, or their maximum; divided. part_of(k) is called by all lanes, for
// k = lane, lane + 32, ... up to the warp's last multiple, so it may use the whole warp.
template <bool kMax, typename T, int kCount, typename PartOf>
__device__ __forceinline__ void sum_rows(const T* base, int64_t stride, int count, const Divisor& divisor, const Item& item, T* out,
                                         PartOf&& part_of) {
  using V = Pack<T, kCount>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Part mine = {-1, 0.0f};
  if (count > 0) mine = part_of(lane);
  for (int at = item.begin; at < item.end; at += kChunk) {
    Sums<T, kCount> sums[kLaneVectors];
#pragma unroll
    for (int j = 0; j < kLaneVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[j].x[i] = kMax ? -infinity() : 0.0f;
    }
    for (int first = 0; first < count; first += 32) {
      if (count > 32) mine = part_of(first + lane);
      const int some = count - first < 32 ? count - first : 32;
#pragma unroll 4
      for (int k = 0; k < some; ++k) {
        const int row = simt::warp::shfl(mine.row, k);
        const float weight = simt::warp::shfl(mine.weight, k);
        const V* const from = reinterpret_cast<const V*>(base + row * stride);
#pragma unroll
        for (int j = 0; j < kLaneVectors; ++j) {
          const int u = at + 32 * j + lane;
          V value = {};  // loads under a predicate, not behind a branch: those of four rows are under way at once
          if (row >= 0 && u < item.end) value = from[u];
          accumulate<kMax>(sums[j], value, weight, false);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kLaneVectors; ++j) {
      const int u = at + 32 * j + lane;
      if (u >= item.end) continue;
      if (divisor.value != 1.0f) merge::finish(sums[j], divisor, 1.0f);
      merge::put<T, kCount>(reinterpret_cast<char*>(out), u, sums[j]);
    }
  }
}

// The same bits; zeros where from is null.
template <typename T, int kCount>
__device__ __forceinline__ void copy_row(const T* from, const Item& item, T* out) {
  using V = Pack<T, kCount>;
  for (int u = item.begin + static_cast<int>(threadIdx.x) % 32; u < item.end; u += 32) {
    reinterpret_cast<V*>(out)[u] = from != nullptr ? reinterpret_cast<const V*>(from)[u] : V{};
  }
}

}  // namespace pool
}  // namespace tokensieve

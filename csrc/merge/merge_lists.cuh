// Lists of the tokens of a block's output rows, ascending, a row's own token first. See merge_kernel.cuh.
#pragma once

#include "device/simt.h"
#include "merge/merge_args.h"

namespace tokensieve {
namespace merge {

struct Lists {
  int64_t b;
  int begin, count;  // output rows [begin, begin + count)
  int* start;        // [count + 1]
  int* list;
  float* divisor;  // [count]
  const unsigned* kept;
};

// The output row of token n, -1 = none. Values out of range are none: never a foreign address.
__device__ __forceinline__ int row_of(const MergeArgs& a, int64_t b, int n, const unsigned* kept) {
  if (a.complement) return (kept[n >> 5] >> (n & 31)) & 1u ? -1 : 0;
  const int64_t r = a.inverse[b * a.inverse_stride + n];
  if (r < 0 || r >= a.R) return -1;
  if (a.from != nullptr) {
    const int64_t from = a.from[b * a.from_stride + n];
    if (from < 0 || from >= a.rows) return -1;
  }
  return static_cast<int>(r);
}

__device__ __forceinline__ int source_of(const MergeArgs& a, int64_t b, int n) {
  return a.from != nullptr ? static_cast<int>(a.from[b * a.from_stride + n]) : n;
}

// Bits of the tokens that are left out of row 0.
__device__ inline void mark_kept(const MergeArgs& a, int64_t b, unsigned* kept) {
  if (!a.complement) return;
  for (int i = static_cast<int>(threadIdx.x); i < (a.N + 31) / 32; i += kThreads) kept[i] = 0u;
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < a.K; k += kThreads) {
    const int64_t n = a.inverse[b * a.inverse_stride + k];
    if (n >= 0 && n < a.N) atomicOr(&kept[n >> 5], 1u << (n & 31));
  }
  __syncthreads();
}

// The own token of a row, -1 where there is none or it is in another row.
__device__ __forceinline__ int own_of(const MergeArgs& a, int64_t b, int row, const unsigned* kept) {
  if (a.own == nullptr) return -1;
  const int64_t own = a.own[b * a.own_stride + row];
  if (own < 0 || own >= a.N) return -1;
  return row_of(a, b, static_cast<int>(own), kept) == row ? static_cast<int>(own) : -1;
}

// Puts a row's tokens, there in any order, into their order: by rank within a warp, a longer list by a look through all tokens.
__device__ inline void order_row(const MergeArgs& a, const Lists& l, int i, int lane) {
  const int first = l.start[i], length = l.start[i + 1] - first, row = l.begin + i;
  if (length <= 1) return;
  const int own = own_of(a, l.b, row, l.kept);
  if (length <= 32) {
    const int token = lane < length ? l.list[first + lane] : 0;
    const int key = token == own ? -1 : token;
    int rank = 0;
    for (int j = 0; j < length; ++j) rank += simt::warp::shfl(key, j) < key ? 1 : 0;
    simt::warp::sync();  // a shuffle orders no memory
    if (lane < length) l.list[first + rank] = token;
    return;
  }
  int at = first;
  if (own >= 0) {
    if (lane == 0) l.list[at] = own;
    ++at;
  }
  for (int base = 0; base < a.N; base += 32) {
    const int n = base + lane;
    const bool mine = n < a.N && n != own && row_of(a, l.b, n, l.kept) == row;
    const unsigned votes = simt::warp::ballot(mine);
    if (mine) l.list[at + __popc(votes & ((1u << lane) - 1u))] = n;
    at += __popc(votes);
  }
}

// Sum over a row's list of values (of ones where null), up to 32 of them one after the other, longer lists in 32 lanes and a fixed tree.
__device__ __forceinline__ float sum_row(const Lists& l, int i, int lane, const float* values) {
  const int first = l.start[i], length = l.start[i + 1] - first;
  if (values == nullptr) return static_cast<float>(length);
  float sum = 0.0f;
  if (length <= 32) {
    const float mine = lane < length ? values[l.list[first + lane]] : 0.0f;
    for (int j = 0; j < length; ++j) sum += simt::warp::shfl(mine, j);
    return sum;
  }
  for (int j = lane; j < length; j += 32) sum += values[l.list[first + j]];
  return simt::warp::sum(sum);
}

// Counts, offsets, unordered lists; then a warp orders each row and sums its weights and sizes.
__device__ inline void build_lists(const MergeArgs& a, Lists& l, int* cursor, bool write) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int i = thread; i <= l.count; i += kThreads) {
    l.start[i] = 0;
    if (i < l.count) cursor[i] = 0;
  }
  __syncthreads();
  for (int n = thread; n < a.N; n += kThreads) {
    const int i = row_of(a, l.b, n, l.kept) - l.begin;
    if (i >= 0 && i < l.count) atomicAdd(&l.start[i + 1], 1);
  }
  __syncthreads();
  if (warp == 0) {  // the counts become offsets
    int before = 0;
    for (int base = 0; base < l.count; base += 32) {
      const int i = base + lane;
      const int upto = before + simt::warp::inclusive_sum(i < l.count ? l.start[i + 1] : 0);
      if (i < l.count) l.start[i + 1] = upto;
      before = simt::warp::shfl(upto, 31);
    }
  }
  __syncthreads();
  for (int n = thread; n < a.N; n += kThreads) {
    const int row = row_of(a, l.b, n, l.kept), i = row - l.begin;
    if (row >= 0 && i >= 0 && i < l.count) l.list[l.start[i] + atomicAdd(&cursor[i], 1)] = n;
  }
  __syncthreads();
  const float* const weights = a.weights != nullptr ? a.weights + l.b * a.N : nullptr;
  const float* const size = a.size != nullptr ? a.size + l.b * a.N : nullptr;
  for (int i = warp; i < l.count; i += kWarps) {
    order_row(a, l, i, lane);
    simt::warp::sync();
    const float divisor = sum_row(l, i, lane, weights) + a.epsilon;
    if (lane == 0) l.divisor[i] = divisor;
    if (!write) continue;
    const int64_t at = l.b * a.R + l.begin + i;
    if (a.total != nullptr) {
      const float total = sum_row(l, i, lane, size);
      if (lane == 0) {
        a.total[at] = total;
        if (a.log_total != nullptr) a.log_total[at] = total <= 0.0f ? -INFINITY : logf(total);
      }
    }
    if (a.divisor != nullptr && lane == 0) {
      a.divisor[at] = divisor;
      a.count[at] = static_cast<float>(l.start[i + 1] - l.start[i]);
    }
  }
  __syncthreads();
}

}  // namespace merge
}  // namespace tokensieve

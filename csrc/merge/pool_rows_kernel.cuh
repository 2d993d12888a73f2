// pool_runs and row_column_means on CUDA, and their gradients.
//
// Runs: x [B, S, C] strided, starts int64 [B, images] -> [B, R, C]: a warp takes up to 1 KB of an output row, finds its run by bisection and
//   copies a token or adds `stride` neighbours. The gradient: a warp takes a token's row. Bytes B (S + R) C, bound by HBM, one launch.
// Means: x [B, T, N, C] strided -> rows [B, T, C] over the tokens of a frame, columns [B, N, C] over the frames of a token.
//   x is read once: a block owns 128 bytes of the channels of 32 (128 where tokens abound) tokens of all frames. A thread adds its tokens'
//   vectors to their columns, which stay in registers, and to the frame's row, whose sums meet in two shuffles a value and, every 8 frames, in
//   shared memory. Several slices of the tokens: their rows, [slices, B T, C] float32, are added in order by a second launch.
//   Floor on H200: 100 x 256 x 1024 bf16 (Video-ChatGPT) 52 MB, 11 us + 0.9 us of a launch; two reads would be 22.
// Deterministic: fixed orders, one writer a value, no atomics. Wrong starts (checked on the CPU only) are clamped into x.
// Limits: rows x parts below 2^31.
#pragma once

#include "merge/pool_values.cuh"

namespace tokensieve {
namespace pool {

// How many runs begin at or before row r, whose tokens before it are `lost` fewer after each run.
__device__ __forceinline__ int runs_before(const RunsArgs& a, const int64_t* starts, int64_t r, int64_t lost) {
  int low = 0, high = a.images;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (starts[middle] - middle * lost <= r) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ int clamp_row(int64_t row, int count) { return static_cast<int>(row < 0 ? 0 : row >= count ? count - 1 : row); }

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) runs_kernel(const RunsArgs a) {
  Item item;
  if (!find_item(a.rows, a.R, item)) return;
  const int64_t* const starts = a.starts + item.b * a.starts_stride;
  const int64_t lost = a.length - a.kept;
  const int before = runs_before(a, starts, item.row, lost);
  const int64_t start = before > 0 ? starts[before - 1] : 0, inside = before > 0 ? item.row - (start - (before - 1) * lost) : a.kept;
  const T* const x = static_cast<const T*>(a.x) + item.b * a.stride_b;
  T* const out = static_cast<T*>(a.out) + (item.b * a.R + item.row) * a.rows.units * kCount;
  if (inside >= a.kept || a.stride == 1) {
    const int64_t token = inside >= a.kept ? item.row + before * lost : start + inside;
    copy_row<T, kCount>(x + clamp_row(token, a.S) * a.stride_n, item, out);
    return;
  }
  const int64_t first = start + inside * a.stride;
  sum_rows<false, T, kCount>(x, a.stride_n, static_cast<int>(a.stride), Divisor(static_cast<float>(a.stride)), item, out,
                             [&](int k) { return Part{clamp_row(first + k, a.S), 1.0f}; });
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) runs_grad_kernel(const RunsArgs a) {
  Item item;
  if (!find_item(a.rows, a.S, item)) return;
  const int64_t* const starts = a.starts + item.b * a.starts_stride;
  const int64_t lost = a.length - a.kept, C = static_cast<int64_t>(a.rows.units) * kCount;
  const int before = runs_before(a, starts, item.row, 0);
  const int64_t inside = before > 0 ? item.row - starts[before - 1] : a.length;
  const T* const grad = static_cast<const T*>(a.x) + item.b * a.R * C;
  T* const out = static_cast<T*>(a.out) + (item.b * a.S + item.row) * C;
  if (a.R == 0 || (inside < a.length && inside >= a.kept * a.stride)) {  // behind the run's last whole mean
    copy_row<T, kCount>(nullptr, item, out);
  } else if (inside >= a.length || a.stride == 1) {
    copy_row<T, kCount>(grad + clamp_row(item.row - before * lost, a.R) * C, item, out);
  } else {
    const Part share = {clamp_row(starts[before - 1] - (before - 1) * lost + inside / a.stride, a.R), 1.0f / static_cast<float>(a.stride)};
    sum_rows<false, T, kCount>(grad, C, 1, Divisor(1.0f), item, out, [&](int) { return share; });
  }
}

// ---- means over rows and columns ----------------------------------------------------------------------------------------------

template <typename T, int kCount>
__device__ __forceinline__ void add(Sums<T, kCount>& to, const Sums<T, kCount>& x) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to.x[i] += x.x[i];
}

// Over the four groups of lanes of a warp that hold the same channels.
template <typename T, int kCount>
__device__ __forceinline__ void add_groups(Sums<T, kCount>& sums) {
#pragma unroll
  for (int step = kMeansLanes; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums.x[i] += simt::warp::shfl_xor(sums.x[i], step);
  }
}

// A frame's row, of all tokens or of a slice of them.
template <typename T, int kCount>
__device__ __forceinline__ void put_mean_row(const MeansArgs& a, int64_t frame, int slice, int u, Sums<T, kCount> sums) {
  if (a.slices == 1) {
    merge::finish(sums, Divisor(static_cast<float>(a.N)), 1.0f);
    merge::put<T, kCount>(reinterpret_cast<char*>(static_cast<T*>(a.rows) + frame * a.C), u, sums);
  } else {
    float* const to = a.partial + (static_cast<int64_t>(slice) * a.B * a.T + frame) * a.C;
    Sums<float, kCount> wide;
#pragma unroll
    for (int i = 0; i < kCount; ++i) wide.x[i] = sums.x[i];
    merge::put<float, kCount>(reinterpret_cast<char*>(to), u, wide);
  }
}

template <typename T, int kCount, int kTokens>
__global__ void __launch_bounds__(kThreads) means_kernel(const MeansArgs a) {
  using V = Pack<T, kCount>;
  using S = Sums<T, kCount>;
  SIMT_SHARED(float, shared, [kMeansFrames * kWarps * kMeansLanes * kCount]);
  S* const parts = reinterpret_cast<S*>(shared);  // [frames][warps][lanes]
  const int chunk = static_cast<int>(blockIdx.x) % a.chunks, rest = static_cast<int>(blockIdx.x) / a.chunks;
  const int slice = rest % a.slices, b = rest / a.slices;
  const int lane = static_cast<int>(threadIdx.x) % kMeansLanes, group = static_cast<int>(threadIdx.x) / kMeansLanes;
  const int warp = static_cast<int>(threadIdx.x) / 32, u = chunk * kMeansLanes + lane, first = slice * kMeansGroups * kTokens + group;
  const T* const x = static_cast<const T*>(a.x) + b * a.stride_b;

  S columns[kTokens] = {};
  for (int t0 = 0; t0 < a.T; t0 += kMeansFrames) {
#pragma unroll(kTokens == 1 ? kMeansFrames : 2)
    for (int f = 0; f < kMeansFrames; ++f) {
      S row = {};
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const int n = first + j * kMeansGroups;
        V value = {};
        if (t0 + f < a.T && n < a.N && u < a.units) value = reinterpret_cast<const V*>(x + (t0 + f) * a.stride_t + n * a.stride_n)[u];
        accumulate<false>(columns[j], value, 1.0f, false);
        accumulate<false>(row, value, 1.0f, false);
      }
      add_groups(row);
      if (threadIdx.x % 32 < kMeansLanes) parts[(f * kWarps + warp) * kMeansLanes + lane] = row;
    }
    __syncthreads();
    if (group < kMeansFrames && t0 + group < a.T && u < a.units) {  // group = frame
      S sum = parts[group * kWarps * kMeansLanes + lane];
      for (int w = 1; w < kWarps; ++w) add(sum, parts[(group * kWarps + w) * kMeansLanes + lane]);
      put_mean_row(a, static_cast<int64_t>(b) * a.T + t0 + group, slice, u, sum);
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const int n = first + j * kMeansGroups;
    if (n >= a.N || u >= a.units) continue;
    merge::finish(columns[j], Divisor(static_cast<float>(a.T)), 1.0f);
    merge::put<T, kCount>(reinterpret_cast<char*>(static_cast<T*>(a.columns) + (static_cast<int64_t>(b) * a.N + n) * a.C), u, columns[j]);
  }
}

// The rows of all slices, in order: a thread a value.
template <typename T>
__global__ void __launch_bounds__(kThreads) means_rows_kernel(const MeansArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, count = static_cast<int64_t>(a.B) * a.T * a.C;
  if (i >= count) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int slice = 0; slice < a.slices; ++slice) sum += a.partial[slice * count + i];
  merge::narrow(static_cast<T*>(a.rows)[i], Divisor(static_cast<float>(a.N)).under(sum));
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) means_grad_kernel(const MeansArgs a) {
  using V = Pack<T, kCount>;
  Item item;
  if (!find_item(a.grad_rows, a.N, item)) return;
  const int64_t frame = item.b, b = frame / a.T;
  const T *const rows = static_cast<const T*>(a.rows_grad), *const columns = static_cast<const T*>(a.columns_grad);
  const float of_row = 1.0f / static_cast<float>(a.N), of_column = 1.0f / static_cast<float>(a.T);
  for (int u = item.begin + static_cast<int>(threadIdx.x) % 32; u < item.end; u += 32) {
    Sums<T, kCount> sums = {};
    if (rows != nullptr) accumulate<false>(sums, reinterpret_cast<const V*>(rows + frame * a.C)[u], of_row, false);
    if (columns != nullptr) accumulate<false>(sums, reinterpret_cast<const V*>(columns + (b * a.N + item.row) * a.C)[u], of_column, false);
    merge::put<T, kCount>(reinterpret_cast<char*>(static_cast<T*>(a.x_grad) + (frame * a.N + item.row) * a.C), u, sums);
  }
}

}  // namespace pool
}  // namespace tokensieve

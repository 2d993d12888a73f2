// pool_grid: means, maxima, bilinear taps, softmax-weighted windows and stacks of the tokens of a grid.
//
// In: x [B, N, C] float32/float16/bfloat16, strided, channels contiguous, N = raster of three axes; scores float32 [B, N] (softmax).
// Out: [B, R, C] contiguous; stacks [B, R, window x C].
// Algorithm: a warp takes up to 1 KB of an output row (64 vectors of 16 bytes, two a lane). Its lanes each work out one token of the window
//   and its weight, hand both round, and add the tokens' vectors in raster order in float32; windows of more than 32 tokens go on in turns.
//   Softmax weights: maximum and sum of the window first, lanes and a fixed tree. Sources: F.adaptive_avg_pool / max_pool / interpolate
//   (bilinear, corners not aligned), PPLLaVA's weighted windows, space to depth.
// Work: one FMA a token of a window and channel; bytes B (N + R) C. Floor on H200 at 4.8 TB/s: LLaVA-OneVision video, 32 frames x 27 x 27 to
//   14 x 14 x 3584 bf16, 212 MB, 44 us. Bound by HBM; overlapping windows read again from L2. One launch.
// Launch: 256 threads, 8 parts of rows a block; integers of 32 bits, because a division of 64 bits costs 40 instructions.
// Deterministic: raster order, one writer a value; no atomics. A NaN is the largest; softmax of a NaN or of infinities alone is NaN.
// Limits: rows x parts below 2^31; bilinear: tokens x outputs of an axis below 2^29. Few long windows: one warp adds a window alone.
#pragma once

#include "merge/pool_values.cuh"

namespace tokensieve {
namespace pool {

struct Place {
  int at[3];
};

__device__ __forceinline__ Place output_place(const PoolArgs& a, int r) {
  const int columns = a.axes[2].out, rows = a.axes[1].out;
  return {{r / columns / rows, r / columns % rows, r % columns}};
}

// The tokens that an output covers.
struct Window {
  RangeOf<int> axes[3];

  __device__ __forceinline__ int size(int axis) const { return axes[axis].end - axes[axis].begin; }
  __device__ __forceinline__ int count() const { return size(0) * size(1) * size(2); }
};

__device__ __forceinline__ Window window_of(const PoolArgs& a, const Place& o) {
  return {{tokens_of(a.axes[0], a.kind, a.adaptive, o.at[0]), tokens_of(a.axes[1], a.kind, a.adaptive, o.at[1]),
           tokens_of(a.axes[2], a.kind, a.adaptive, o.at[2])}};
}

// The k-th token of a window in raster order.
__device__ __forceinline__ Place window_place(const Window& w, int k) {
  const int columns = w.size(2), rows = w.size(1);
  return {{w.axes[0].begin + k / columns / rows, w.axes[1].begin + k / columns % rows, w.axes[2].begin + k % columns}};
}

__device__ __forceinline__ int token_id(const PoolArgs& a, const Place& n) {
  return (n.at[0] * a.axes[1].in + n.at[1]) * a.axes[2].in + n.at[2];
}

__device__ __forceinline__ float tap_weight(const PoolArgs& a, const Place& o, const Place& n) {
  const float of_t = bilinear_weight(a.axes[0], o.at[0], n.at[0]);
  return of_t * bilinear_weight(a.axes[1], o.at[1], n.at[1]) * bilinear_weight(a.axes[2], o.at[2], n.at[2]);
}

// weight of a token = exp(score / temperature - most) / sum.
struct Softmax {
  float most, sum;
  __device__ __forceinline__ float weight(float score, float temperature) const { return expf(score / temperature - most) / sum; }
};

// Of a window; all lanes of the warp.
__device__ __forceinline__ Softmax softmax_of(const PoolArgs& a, const float* scores, const Window& w) {
  const int lane = static_cast<int>(threadIdx.x) % 32, count = w.count();
  Softmax s = {-infinity(), 0.0f};
  for (int k = lane; k < count; k += 32) {
    const float score = scores[token_id(a, window_place(w, k))] / a.temperature;
    s.most = score > s.most ? score : s.most;
  }
  s.most = simt::warp::max(s.most);
  for (int k = lane; k < count; k += 32) s.sum += expf(scores[token_id(a, window_place(w, k))] / a.temperature - s.most);
  s.sum = simt::warp::sum(s.sum);  // a NaN among the scores makes it NaN
  return s;
}

template <typename T, int kCount>
__device__ __forceinline__ void pool_row(const PoolArgs& a, const Item& item, const T* x, T* out) {
  const Place o = output_place(a, item.row);
  const Window w = window_of(a, o);
  const int count = w.count();
  const float* const scores = a.scores != nullptr ? a.scores + item.b * a.N : nullptr;
  Softmax softmax = {0.0f, 1.0f};
  if (a.kind == PoolKind::kSoftmax) softmax = softmax_of(a, scores, w);
  const auto part_of = [&](int k) -> Part {
    const Place n = window_place(w, k < count ? k : 0);
    const int token = token_id(a, n);
    if (a.kind == PoolKind::kBilinear) return {token, tap_weight(a, o, n)};
    if (a.kind == PoolKind::kSoftmax) return {token, softmax.weight(scores[token], a.temperature)};
    return {token, 1.0f};
  };
  const Divisor divisor(a.kind == PoolKind::kMean ? static_cast<float>(count) : 1.0f);
  if (a.kind == PoolKind::kMax) {
    sum_rows<true, T, kCount>(x, a.stride_n, count, divisor, item, out, part_of);
  } else {
    sum_rows<false, T, kCount>(x, a.stride_n, count, divisor, item, out, part_of);
  }
}

// Rows of the output: of a stack, one for every token of a window.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) pool_kernel(const PoolArgs a) {
  Item item;
  const int per_batch = a.R * (a.kind == PoolKind::kStack ? a.window : 1);
  if (!find_item(a.rows, per_batch, item)) return;
  const T* const x = static_cast<const T*>(a.x) + item.b * a.stride_b;
  T* const out = static_cast<T*>(a.out) + (item.b * per_batch + item.row) * a.rows.units * kCount;
  if (a.kind != PoolKind::kStack) {
    pool_row<T, kCount>(a, item, x, out);
    return;
  }
  const Window w = window_of(a, output_place(a, item.row / a.window));
  copy_row<T, kCount>(x + token_id(a, window_place(w, item.row % a.window)) * a.stride_n, item, out);
}

}  // namespace pool
}  // namespace tokensieve

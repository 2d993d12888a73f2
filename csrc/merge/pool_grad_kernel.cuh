// The gradient of pool_grid: grad [B, R, C] contiguous -> that of every token [B, N, C] and, for softmax weights, of every score [B, N].
//
// Algorithm: a gather over the outputs whose windows hold a token (a range on each axis): a warp takes up to 1 KB of a token's row, its lanes
//   each work out one of those outputs and the token's weight in it, and the rows of `grad` are added in raster order. Maxima: a token takes
//   the gradient where it has the maximum and no token before it in the window has. Scores: sum over the windows of weight / temperature x
//   grad . (x - out), in lanes and a fixed tree; a warp then takes whole rows.
// Work: bytes B (N + R) C; maxima and scores read x and out too, B (2 N + 2 R) C. Bound by HBM. One launch, 256 threads.
// Deterministic: one writer a value, no atomics. Limits: as pool_kernel.cuh.
#pragma once

#include "merge/pool_kernel.cuh"

namespace tokensieve {
namespace pool {

// A token and the outputs that may cover it.
struct Token {
  Place place;
  Window outputs;  // ranges of outputs, not of tokens
};

__device__ __forceinline__ Token token_of(const PoolArgs& a, int n) {
  const int columns = a.axes[2].in, rows = a.axes[1].in;
  Token token = {{{n / columns / rows, n / columns % rows, n % columns}}, {}};
#pragma unroll
  for (int i = 0; i < 3; ++i) token.outputs.axes[i] = outputs_of(a.axes[i], a.kind, a.adaptive, token.place.at[i]);
  return token;
}

__device__ __forceinline__ int output_id(const PoolArgs& a, const Place& o) {
  return (o.at[0] * a.axes[1].out + o.at[1]) * a.axes[2].out + o.at[2];
}

// The token's position in the window.
__device__ __forceinline__ int slot_of(const Window& w, const Place& n) {
  return ((n.at[0] - w.axes[0].begin) * w.size(1) + n.at[1] - w.axes[1].begin) * w.size(2) + n.at[2] - w.axes[2].begin;
}

// Output k of those around the token and the token's weight in it. All lanes of the warp, each with its own k of 32 neighbours: the weights
// of a softmax are the work of the whole warp, one window after the other.
__device__ __forceinline__ Part cover_of(const PoolArgs& a, const Token& token, const float* scores, int k) {
  const int count = token.outputs.count(), lane = static_cast<int>(threadIdx.x) % 32;
  const Place o = window_place(token.outputs, k < count ? k : 0);
  Part part = {output_id(a, o), 1.0f};
  if (a.kind == PoolKind::kMean) {
    part.weight = 1.0f / static_cast<float>(window_of(a, o).count());
  } else if (a.kind == PoolKind::kBilinear) {
    part.weight = tap_weight(a, o, token.place);
    part.row = part.weight == 0.0f ? -1 : part.row;  // not covered: not even a NaN arrives
  } else if (a.kind == PoolKind::kSoftmax) {
    const float score = scores[token_id(a, token.place)];
    const int first = k - lane;
    for (int i = 0; i < 32 && first + i < count; ++i) {
      const Softmax softmax = softmax_of(a, scores, window_of(a, window_place(token.outputs, first + i)));
      if (lane == i) part.weight = softmax.weight(score, a.temperature);
    }
  }
  return part;
}

// Sum of (grad) (x - out) over the channels of an output that covers the token; all lanes return it.
template <typename T, int kCount>
__device__ __forceinline__ float centred_dot(const T* grad, const T* x, const T* out, int units) {
  using V = Pack<T, kCount>;
  float sum = 0.0f;
  for (int u = static_cast<int>(threadIdx.x) % 32; u < units; u += 32) {
    const V g = reinterpret_cast<const V*>(grad)[u], v = reinterpret_cast<const V*>(x)[u], y = reinterpret_cast<const V*>(out)[u];
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum = fmaf(widen(g.x[j]), widen(v.x[j]) - widen(y.x[j]), sum);
  }
  return simt::warp::sum(sum);
}

template <typename T, int kCount>
__device__ __forceinline__ void scores_row(const PoolArgs& a, const Item& item, const Token& token, const float* scores, const T* grad) {
  const int64_t C = static_cast<int64_t>(a.rows.units) * kCount;
  const T* const x = static_cast<const T*>(a.x) + item.b * a.stride_b + item.row * a.stride_n;
  const T* const forward = static_cast<const T*>(a.forward) + item.b * a.R * C;
  const int lane = static_cast<int>(threadIdx.x) % 32, count = token.outputs.count();
  float total = 0.0f;
  for (int first = 0; first < count; first += 32) {
    const Part mine = cover_of(a, token, scores, first + lane);
    for (int k = 0; k < 32 && first + k < count; ++k) {
      const int64_t at = simt::warp::shfl(mine.row, k) * C;
      const float weight = simt::warp::shfl(mine.weight, k);
      total += weight / a.temperature * centred_dot<T, kCount>(grad + at, x, forward + at, a.rows.units);
    }
  }
  if (lane == 0) a.scores_grad[item.b * a.N + item.row] = total;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) pool_grad_kernel(const PoolArgs a) {
  Item item;
  if (!find_item(a.rows, a.N, item)) return;
  const int64_t C = static_cast<int64_t>(a.rows.units) * kCount;
  const Token token = token_of(a, item.row);
  const float* const scores = a.scores != nullptr ? a.scores + item.b * a.N : nullptr;
  const int covers = token.outputs.count();
  T* const out = a.out != nullptr ? static_cast<T*>(a.out) + (item.b * a.N + item.row) * C : nullptr;
  if (a.kind == PoolKind::kStack) {  // windows do not overlap: one output at most
    const T* from = nullptr;
    if (covers > 0) {
      const Place o = window_place(token.outputs, 0);
      const int64_t row = (item.b * a.R + output_id(a, o)) * a.window + slot_of(window_of(a, o), token.place);
      from = static_cast<const T*>(a.grad) + row * C;
    }
    copy_row<T, kCount>(from, item, out);
    return;
  }
  const T* const grad = static_cast<const T*>(a.grad) + item.b * a.R * C;
  if (a.out != nullptr) {
    sum_rows<false, T, kCount>(grad, C, covers, Divisor(1.0f), item, out, [&](int k) { return cover_of(a, token, scores, k); });
  }
  if (a.scores_grad != nullptr) scores_row<T, kCount>(a, item, token, scores, grad);
}

// ---- maxima ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool same(float x, float y) { return x == y || (x != x && y != y); }

// The channels of a vector (bits) in which the token is the first of the window that has the maximum.
template <typename V, int kCount, typename T>
__device__ __forceinline__ unsigned wins(const PoolArgs& a, const Window& w, int slot, const T* x, int u, const V& own, const V& best) {
  unsigned open = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) open |= same(widen(own.x[j]), widen(best.x[j])) ? 1u << j : 0u;
  for (int k = 0; k < slot && open != 0; ++k) {
    const V other = reinterpret_cast<const V*>(x + token_id(a, window_place(w, k)) * a.stride_n)[u];
#pragma unroll
    for (int j = 0; j < kCount; ++j) open &= same(widen(other.x[j]), widen(best.x[j])) ? ~(1u << j) : ~0u;
  }
  return open;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) pool_max_grad_kernel(const PoolArgs a) {
  using V = Pack<T, kCount>;
  Item item;
  if (!find_item(a.rows, a.N, item)) return;
  const int64_t C = static_cast<int64_t>(a.rows.units) * kCount;
  const Token token = token_of(a, item.row);
  const T* const x = static_cast<const T*>(a.x) + item.b * a.stride_b;
  const T *const grad = static_cast<const T*>(a.grad) + item.b * a.R * C, *const forward =
                                                                              static_cast<const T*>(a.forward) + item.b * a.R * C;
  T* const out = static_cast<T*>(a.out) + (item.b * a.N + item.row) * C;
  const int covers = token.outputs.count();
  for (int u = item.begin + static_cast<int>(threadIdx.x) % 32; u < item.end; u += 32) {
    const V own = reinterpret_cast<const V*>(x + item.row * a.stride_n)[u];
    Sums<T, kCount> sums = {};
    for (int k = 0; k < covers; ++k) {
      const Place o = window_place(token.outputs, k);
      const Window w = window_of(a, o);
      const int64_t at = output_id(a, o) * C;
      const V best = reinterpret_cast<const V*>(forward + at)[u], g = reinterpret_cast<const V*>(grad + at)[u];
      const unsigned won = wins<V, kCount>(a, w, slot_of(w, token.place), x, u, own, best);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums.x[j] += (won >> j & 1u) != 0 ? widen(g.x[j]) : 0.0f;
    }
    merge::put<T, kCount>(reinterpret_cast<char*>(out), u, sums);
  }
}

}  // namespace pool
}  // namespace tokensieve

// The gradient of merging: grad [B, R, M, W] contiguous -> that of every token [B, N, M, W], and of every weight float32 [B, N].
//
// Algorithm: sums and means: a warp takes a token, writes grad[row] * weight / divisor, and sums grad * (x - out) over the channels in lanes
//   and a fixed tree; the divisors come from a launch of merge_kernel without tensors. amax and MLERP: a warp takes an output row, whose
//   tokens share a winner or norms; tokens without a row become zero.
// Work: bytes B (2 N + R) C, for weights B (2 N + 2 R) C. Bound by HBM. Launch: grid.x = B x slices, 256 threads. Deterministic: one writer a
//   value; amax: the lowest token id among equal values takes the gradient.
// Limits: as merge_kernel.cuh.
#pragma once

#include "merge/merge_kernel.cuh"

namespace tokensieve {
namespace merge {

template <typename T, int kCount>
__device__ __forceinline__ void scaled_row(const MergeArgs& a, const MergeArg& t, int64_t b, int n, int r, float factor, int lane) {
  using V = Pack<T, kCount>;
  const V* const grad = reinterpret_cast<const V*>(t.grad + (b * a.R + (r < 0 ? 0 : r)) * t.row);
  char* const to = t.dst + (b * a.N + n) * t.row;
  for (int u = lane; u < t.segments * t.units; u += 32) {
    Sums<T, kCount> out = {};
    if (r >= 0) {
      const V g = grad[u];
#pragma unroll
      for (int j = 0; j < kCount; ++j) out.x[j] = factor * widen(g.x[j]);
    }
    put<T, kCount>(to, u, out);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ float weight_dot(const MergeArgs& a, const MergeArg& t, int64_t b, int n, int r, bool centred, int lane) {
  using V = Pack<T, kCount>;
  const V* const grad = reinterpret_cast<const V*>(t.grad + (b * a.R + r) * t.row);
  const V* const out = reinterpret_cast<const V*>(t.out + (centred ? (b * a.R + r) * t.row : 0));
  const int source = source_of(a, b, n);
  float sum = 0.0f;
  for (int u = lane; u < t.segments * t.units; u += 32) {
    const V g = grad[u], x = unit_of<V>(t, b, source, u), y = centred ? out[u] : V{};
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum = __fmaf_rn(widen(g.x[j]), centred ? widen(x.x[j]) - widen(y.x[j]) : widen(x.x[j]), sum);
  }
  return simt::warp::sum(sum);
}

// A token's factor of its row's gradient; dead = its row's divisor is 0.
struct Factor {
  float value, divisor;
  bool dead;
};
__device__ __forceinline__ Factor factor_of(const MergeArgs& a, int64_t b, int n, int r) {
  Factor f = {weight_of(a, b, n), 1.0f, r < 0};
  if (r < 0 || a.mode == MergeMode::kSum) return f;
  f.divisor = a.divisor[b * a.R + r];
  if (a.mode == MergeMode::kWeighted && a.count[b * a.R + r] == 1.0f) {
    f.value = 1.0f;
  } else if (f.divisor == 0.0f) {
    f.dead = true;
  } else {
    f.value = __fdiv_rn(f.value, f.divisor);
  }
  return f;
}

__global__ void __launch_bounds__(kThreads) merge_linear_grad_kernel(const MergeArgs a) {
  SIMT_CARVE(unsigned, kept, 0, a.complement ? (a.N + 31) / 32 : 0);
  const int64_t b = blockIdx.x / static_cast<unsigned>(a.blocks_per_row);
  const int64_t begin = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(a.blocks_per_row)) * a.tokens_per_block;
  const int end = static_cast<int>(begin + a.tokens_per_block < a.N ? begin + a.tokens_per_block : a.N);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  mark_kept(a, b, kept);
  for (int n = static_cast<int>(begin) + warp; n < end; n += kWarps) {
    const int r = row_of(a, b, n, kept);
    const Factor f = factor_of(a, b, n, r);
    for (int k = 0; k < a.num_tensors; ++k) {
      const MergeArg& t = a.tensors[k];
      with_type<false>(t, [&](auto tag) {
        using Tag = decltype(tag);
        if (t.dst != nullptr) scaled_row<typename Tag::Type, Tag::kElements>(a, t, b, n, f.dead ? -1 : r, f.value, lane);
        if (a.weight_grad == nullptr) return;
        float dot = 0.0f;
        if (!f.dead) dot = weight_dot<typename Tag::Type, Tag::kElements>(a, t, b, n, r, a.mode != MergeMode::kSum, lane);
        dot = a.mode != MergeMode::kSum && !f.dead ? __fdiv_rn(dot, f.divisor) : dot;
        if (r >= 0 && a.total_grad != nullptr) dot += a.total_grad[b * a.R + r];
        if (lane == 0) a.weight_grad[b * a.N + n] = dot;
      });
    }
    if (a.num_tensors == 0 && a.weight_grad != nullptr && lane == 0) {  // tokens of no width
      a.weight_grad[b * a.N + n] = r >= 0 && a.total_grad != nullptr ? a.total_grad[b * a.R + r] : 0.0f;
    }
  }
}

// amax: column by column the first token of the ascending list that equals the result.
template <typename T, int kCount>
__device__ __forceinline__ void amax_row(const MergeArgs& a, const MergeArg& t, const Lists& l, int i, int lane) {
  using V = Pack<T, kCount>;
  const int64_t at = (l.b * a.R + l.begin + i) * t.row;
  for (int u = lane; u < t.segments * t.units; u += 32) {
    const V grad = reinterpret_cast<const V*>(t.grad + at)[u], best = reinterpret_cast<const V*>(t.out + at)[u];
    unsigned taken = 0;
    for (int k = l.start[i]; k < l.start[i + 1]; ++k) {
      const V value = unit_of<V>(t, l.b, l.list[k], u);
      Sums<T, kCount> out = {};
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float x = widen(value.x[j]), y = widen(best.x[j]);
        const bool wins = (x == y || (x != x && y != y)) && (taken >> j & 1u) == 0;
        if (wins) out.x[j] = widen(grad.x[j]);
        taken |= wins ? 1u << j : 0u;
      }
      put<T, kCount>(t.dst + (l.b * a.N + l.list[k]) * t.row, u, out);
    }
  }
}

// MLERP: y = mean * scale, scale = largest / own. With m the mean: the gradient of scale is s = grad . m, of largest s / own, of own
// -s * largest / own^2, and a norm's gradient is token / norm.
template <typename T, int kCount>
__device__ __forceinline__ void mlerp_row(const MergeArgs& a, const MergeArg& t, const Lists& l, int i, int lane) {
  using V = Pack<T, kCount>;
  const int length = l.start[i + 1] - l.start[i], units = t.segments * t.units;
  const int* const list = l.list + l.start[i];
  const V* const grad = reinterpret_cast<const V*>(t.grad + (l.b * a.R + l.begin + i) * t.row);
  const Norms norms = norms_of<T, kCount>(t, l.b, list, length, lane);
  const float share = length == 1 ? 1.0f : __fdiv_rn(norms.scale(), static_cast<float>(length));
  float of_largest = 0.0f, of_own = 0.0f;  // factors of the two tokens
  if (norms.at != 0 && norms.own > 0.0f) {
    float sum = 0.0f;
    for (int k = 0; k < length; ++k) {
      for (int u = lane; u < units; u += 32) {
        const V g = grad[u], x = unit_of<V>(t, l.b, list[k], u);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum = __fmaf_rn(widen(g.x[j]), widen(x.x[j]), sum);
      }
    }
    const float s = __fdiv_rn(simt::warp::sum(sum), static_cast<float>(length));
    of_largest = __fdiv_rn(__fdiv_rn(s, norms.own), norms.largest);
    of_own = __fdiv_rn(__fdiv_rn(__fmul_rn(-s, __fdiv_rn(norms.largest, norms.own)), norms.own), norms.own);
  }
  for (int k = 0; k < length; ++k) {
    const float factor = k == 0 ? of_own : k == norms.at ? of_largest : 0.0f;
    for (int u = lane; u < units; u += 32) {
      const V g = grad[u], x = factor != 0.0f ? unit_of<V>(t, l.b, list[k], u) : V{};
      Sums<T, kCount> out;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        out.x[j] = share * widen(g.x[j]);
        if (factor != 0.0f) out.x[j] = __fmaf_rn(factor, widen(x.x[j]), out.x[j]);
      }
      put<T, kCount>(t.dst + (l.b * a.N + list[k]) * t.row, u, out);
    }
  }
}

__global__ void __launch_bounds__(kThreads) merge_row_grad_kernel(const MergeArgs a) {
  const int64_t slice = blockIdx.x % static_cast<unsigned>(a.blocks_per_row);
  TOKENSIEVE_MERGE_BLOCK(a, blockIdx.x, slice * a.rows_per_block);
  build_lists(a, lists, shared_cursor, false);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t begin = slice * a.tokens_per_block;
  const int end = static_cast<int>(begin + a.tokens_per_block < a.N ? begin + a.tokens_per_block : a.N);
  for (int k = 0; k < a.num_tensors; ++k) {
    const MergeArg& t = a.tensors[k];
    with_type<false>(t, [&](auto tag) {
      using Type = typename decltype(tag)::Type;
      constexpr int kCount = decltype(tag)::kElements;
      for (int i = warp; i < lists.count; i += kWarps) {
        if (lists.start[i] == lists.start[i + 1]) continue;
        if (a.mode == MergeMode::kAmax) {
          amax_row<Type, kCount>(a, t, lists, i, lane);
        } else {
          mlerp_row<Type, kCount>(a, t, lists, i, lane);
        }
      }
      for (int n = static_cast<int>(begin) + warp; n < end; n += kWarps) {
        if (row_of(a, lists.b, n, lists.kept) < 0) scaled_row<Type, kCount>(a, t, lists.b, n, -1, 0.0f, lane);
      }
    });
  }
}

}  // namespace merge
}  // namespace tokensieve

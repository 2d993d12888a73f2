// The last step of the kernels over all query rows: partial results -> scores, in a fixed order.
#pragma once

#include "score/colsum_args.h"
#include "score/score_device.cuh"

namespace tokensieve {
namespace colsum {

using score::divide_or_zero;
using score::emit;
using score::infinity;
using score::nan_max;

// Divisor of query_reduction mean. All threads; `parts` is [warps].
__device__ inline float row_divisor(const ScoreParams& p, int b, float* parts) {
  if (p.query_reduction != Reduction::kMean) return 1.0f;
  if (p.row_weights == nullptr && p.query_positions == nullptr) return static_cast<float>(p.L);
  float sum = 0;
  for (int64_t l = threadIdx.x; l < p.L; l += blockDim.x) {
    const int64_t at = b * p.L + l;
    sum += p.row_weights != nullptr ? p.row_weights[at] : p.query_positions[at] >= 0 ? 1.0f : 0.0f;
  }
  sum = simt::warp::sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += parts[w];
  return total;
}

// One head's row reduction of one key from the partial results of all splits, in their order.
__device__ inline float finish_head(const Args& a, int b, int64_t h, int64_t n, float divisor) {
  const ScoreParams& p = a.p;
  const int64_t R = p.range_end - p.range_begin, plane = p.B * p.H * R, at = (b * p.H + h) * R + n;
  const bool maximum = p.query_reduction == Reduction::kMax;
  float value = maximum ? -infinity() : 0.0f, seen = 0.0f;
  for (int s = 0; s < a.col_splits; ++s) {
    const float part = a.partial[s * plane + at];
    value = maximum ? nan_max(value, part) : value + part;
    if (p.query_reduction == Reduction::kVisibleMean) seen += a.partial[(a.col_splits + s) * plane + at];
  }
  if (maximum) return value == -infinity() ? 0.0f : value;
  if (p.query_reduction == Reduction::kVisibleMean) return divide_or_zero(value, seen);
  return p.query_reduction == Reduction::kMean ? divide_or_zero(value, divisor) : value;
}

// Whether the mask of keys hides key n of the range.
__device__ __forceinline__ bool is_hidden(const Args& a, int b, int64_t n) {
  return a.key_mask != nullptr && a.key_mask[b * a.key_mask_stride + a.p.range_begin + n] == 0;
}

// One key's score(s).
__device__ inline void finish_key(const Args& a, int b, int64_t n, float rows, float heads) {
  const ScoreParams& p = a.p;
  const int64_t R = p.range_end - p.range_begin;
  const bool hidden = is_hidden(a, b, n);
  float acc = 0.0f;
  if (!a.per_head) {
    for (int64_t u = 0; u < p.Hkv * a.col_splits; ++u) acc += a.partial[(u * p.B + b) * R + n];
    emit(p, b * R + n, hidden ? 0.0f : divide_or_zero(divide_or_zero(acc, rows), heads));
    return;
  }
  for (int64_t h = 0; h < p.H; ++h) {
    const float value = hidden ? 0.0f : finish_head(a, b, h, n, rows);
    if (p.head_reduction == Reduction::kNone) {
      emit(p, (b * p.H + h) * R + n, value);
    } else {
      acc = score::add_head(p, b, h, h == 0, acc, value);
    }
  }
  if (p.head_reduction != Reduction::kNone) emit(p, b * R + n, divide_or_zero(acc, heads));
}

}  // namespace colsum
}  // namespace tokensieve

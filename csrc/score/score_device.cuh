// What the kernels of attention_scores share: visibility, bias, activations, weights, where a score goes. Semantics: score.h.
#pragma once

#include "device/arrive.h"
#include "device/simt.h"
#include "score/score.h"

namespace tokensieve {
namespace score {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float nan_max(float a, float b) { return (a > b || a != a) ? a : b; }
__device__ __forceinline__ float divide_or_zero(float x, float by) { return by == 0.0f ? 0.0f : x / by; }
__device__ __forceinline__ int clamp_to(int64_t x, int64_t most) { return static_cast<int>(x < 0 ? 0 : x > most ? most : x); }

// Row l < L sees keys [0, row_end).
__device__ __forceinline__ int row_end(const ScoreParams& p, int b, int64_t l) {
  if (p.query_positions != nullptr) return clamp_to(p.query_positions[b * p.L + l] + 1, p.N);
  return p.causal ? clamp_to(p.N - p.L + l + 1, p.N) : static_cast<int>(p.N);
}

__device__ __forceinline__ int64_t bias_offset(const ScoreParams& p, int b, int64_t h, int64_t l, int64_t n) {
  return b * p.bias_stride[0] + h * p.bias_stride[1] + l * p.bias_stride[2] + n * p.bias_stride[3];
}
__device__ __forceinline__ float load_bias(const ScoreParams& p, int64_t at) {
  switch (p.bias_dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(p.bias)[at]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[at]);
    case DType::kBool:
      return static_cast<const uint8_t*>(p.bias)[at] != 0 ? 0.0f : -infinity();
    default:
      return static_cast<const float*>(p.bias)[at];
  }
}

// kLogit, kSigmoid.
__device__ __forceinline__ float activate(const ScoreParams& p, float logit) {
  return p.activation == Activation::kSigmoid ? 1.0f / (1.0f + expf(-logit)) : logit;
}

__device__ __forceinline__ float head_weight(const ScoreParams& p, int b, int64_t h) {
  return p.head_weights == nullptr ? 1.0f : p.head_weights[b * p.H + h];
}
// What head_reduction mean divides by; 1 for the others.
__device__ inline float head_divisor(const ScoreParams& p, int b) {
  if (p.head_reduction != Reduction::kMean) return 1.0f;
  if (p.head_weights == nullptr) return static_cast<float>(p.H);
  float sum = 0;
  for (int64_t h = 0; h < p.H; ++h) sum += p.head_weights[b * p.H + h];
  return sum;
}
// One head on top of the heads before it; `first` of them all. A head of weight 0 counts for nothing, even NaN.
__device__ __forceinline__ float add_head(const ScoreParams& p, int b, int64_t h, bool first, float acc, float value) {
  if (p.head_reduction == Reduction::kMax) return first ? value : nan_max(acc, value);
  const float weight = head_weight(p, b, h);
  return weight == 0.0f ? (first ? 0.0f : acc) : fmaf(weight, value, first ? 0.0f : acc);
}

__device__ __forceinline__ void emit(const ScoreParams& p, int64_t at, float value) {
  p.scores[at] = p.accumulate == nullptr ? value : p.accumulate[at] + value;
}

using simt::arrive_last;

}  // namespace score
}  // namespace tokensieve

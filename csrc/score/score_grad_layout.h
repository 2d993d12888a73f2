// How score_grad cuts its keys and its workspace, on both back ends. Static functions: every object file has its own copy.
#pragma once

#include "score/score_grad.h"

namespace tokensieve {

struct GradLayout {
  int64_t key_begin = 0, key_end = 0;  // keys that have a ds
  int64_t chunk = 0, num_chunks = 0;
  int64_t stride = 0;   // floats between the rows of u and p
  bool with_p = false;  // p is needed: e is not always 0
  // Offsets in floats from the workspace. Rows are numbered (b, h, l), so those of a key head's group lie one after the other.
  int64_t u = 0, p = 0;  // [rows, stride]
  int64_t sums = 0;      // [rows, num_chunks, 2 D + 1]: sum of u k, sum of p k, sum of u
  int64_t e = 0;         // [rows]
  int64_t query = 0;     // CPU: [rows, D] in float32 (only when they are not)
  int64_t floats = 0;
};

static inline GradLayout grad_layout(const ScoreGradParams& g, int64_t chunk, bool convert) {
  const ScoreParams& p = g.forward;
  GradLayout at;
  const bool softmax = p.activation == Activation::kSoftmax;
  at.with_p = softmax ? !g.lse_given : g.grad_lse != nullptr;
  const bool range_only = p.normalize == Normalize::kRange || !at.with_p;
  at.key_begin = range_only ? p.range_begin : 0;
  at.key_end = range_only ? p.range_end : p.N;
  at.chunk = chunk;
  at.num_chunks = (at.key_end - at.key_begin + chunk - 1) / chunk;
  at.stride = at.num_chunks * chunk;
  const int64_t rows = p.B * p.H * p.L;
  const int64_t sizes[5] = {rows * at.stride, at.with_p ? rows * at.stride : 0, rows * at.num_chunks * (2 * p.D + 1), rows,
                            convert && p.dtype != DType::kFloat32 ? rows * p.D : 0};
  int64_t* const offsets[5] = {&at.u, &at.p, &at.sums, &at.e, &at.query};
  for (int i = 0; i < 5; ++i) {
    *offsets[i] = at.floats;
    at.floats += (sizes[i] + 15) / 16 * 16;
  }
  return at;
}

static inline const char* grad_refusal(const ScoreGradParams& g) {
  const ScoreParams& p = g.forward;
  if (p.query_reduction == Reduction::kMax || p.head_reduction == Reduction::kMax) return "a reduction 'max' has no gradient";
  return nullptr;
}

}  // namespace tokensieve

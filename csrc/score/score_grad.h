// Gradient of attention_scores with respect to query and key, for few query rows.
#pragma once

#include "score/score.h"

namespace tokensieve {

// s = scale*q.k + bias; p = exp(s - lse) where visible, else 0; g = gradient of the loss by f(s) of each row, head and key, from `grad` by the
// reductions' weights, 0 outside the range. Then ds = u - e p with
//   softmax, own normaliser:   u = p g, e = sum_n u - grad_lse           (lse over all keys, or over the range: those keys have a ds)
//   softmax, lse given:        u = p g, e = 0: the given normaliser is a constant, and so is the lse that is handed back
//   logit, sigmoid:            u = f'(s) g, e = -grad_lse
// and dq = scale * sum_n ds k, dk = scale * sum of ds q over the rows and heads that read the key.
struct ScoreGradParams {
  ScoreParams forward;              // lse_in = the normaliser of the forward pass; scores, lse_out, accumulate, workspace are not looked at
  bool lse_given = false;           // lse_in was an argument of the forward pass
  const float* grad = nullptr;      // shape of the scores, contiguous
  const float* grad_lse = nullptr;  // [B, H, L] contiguous; may be null
  void* query_grad = nullptr;       // [B, H, L, D] contiguous, dtype of the forward pass
  void* key_grad = nullptr;         // [B, Hkv, N, D] contiguous
  void* workspace = nullptr;        // plan.workspace_bytes, 64-byte aligned
};

struct ScoreGradPlan {
  int64_t chunk_keys = 0, num_chunks = 0;
  int64_t workspace_bytes = 0;  // 8 bytes a row, head and counted key, and the chunks' sums
  int threads = 0;              // CUDA
};

// Neither reduction may be kMax. Rows and key heads whose gradient is not wanted cost what the others do.
ScoreGradPlan score_grad_plan_cpu(const ScoreGradParams& params);
ScoreGradPlan score_grad_plan_cuda(const ScoreGradParams& params, const DeviceInfo& device);
Status score_grad_cpu(const ScoreGradParams& params, const ScoreGradPlan& plan, CpuLevel level, ParallelForFn threads);
Status score_grad_cuda(const ScoreGradParams& params, const ScoreGradPlan& plan, void* stream);

}  // namespace tokensieve

// Plan of score_grad_cuda: host arithmetic only, so it is tested without a GPU.
#include "score/score_grad_layout.h"

namespace tokensieve {

ScoreGradPlan score_grad_plan_cuda(const ScoreGradParams& p, const DeviceInfo& /*device*/) {
  ScoreGradPlan plan;
  plan.chunk_keys = 64;  // 577 keys x 16 heads make 160 blocks for 132 SMs
  const GradLayout at = grad_layout(p, plan.chunk_keys, false);
  plan.num_chunks = at.num_chunks;
  plan.workspace_bytes = at.floats * 4;
  plan.threads = 256;
  return plan;
}

}  // namespace tokensieve

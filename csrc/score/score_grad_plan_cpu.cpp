// Plan of score_grad_cpu.
#include "score/score_grad_layout.h"

namespace tokensieve {

ScoreGradPlan score_grad_plan_cpu(const ScoreGradParams& p) {
  ScoreGradPlan plan;
  plan.chunk_keys = 256;  // as score_cpu: 128 KB of float32 keys at D = 128 a task
  const GradLayout at = grad_layout(p, plan.chunk_keys, true);
  plan.num_chunks = at.num_chunks;
  plan.workspace_bytes = at.floats * 4;
  return plan;
}

}  // namespace tokensieve

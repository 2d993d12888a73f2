// Plan of match_cpu: the workspace depends on the shape only.
#include "merge/match_cpu_layout.h"

namespace tokensieve {

MatchPlan match_plan_cpu(const MatchParams& p) {
  const CosinePlan cosine = cosine_plan_cpu(match_cosine(p));
  MatchPlan plan;
  plan.workspace_bytes = match_layout(p).bytes;
  plan.bytes_moved = cosine.bytes_moved + p.B * (20 * p.r + 8 * (p.rows() + p.N));
  plan.flops = cosine.flops;
  return plan;
}

}  // namespace tokensieve

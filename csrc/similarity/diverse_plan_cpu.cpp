// Plan of diverse_cpu: the workspace, and what it computes at most. It depends on the shape only.
#include "similarity/diverse_cpu_layout.h"

namespace tokensieve {

DiversePlan diverse_plan_cpu(const DiverseParams& p) {
  DiversePlan plan;
  plan.store_distances = false;
  plan.workspace_bytes = diverse_layout(p).floats * 4;
  const int64_t pairs = p.N * (p.N - 1) / 2 + p.K * p.N;  // how many are skipped depends on the values
  plan.bytes_moved = p.B * (p.N * p.C * dtype_bytes(p.dtype) + p.K * 8);
  plan.flops = 2 * p.B * pairs * p.C;
  return plan;
}

}  // namespace tokensieve

// Plan of cosine_cpu: blocks and workspace depend on the shape only, so a result never depends on the number of threads.
#include "similarity/cosine_cpu_layout.h"

namespace tokensieve {

CosinePlan cosine_plan_cpu(const CosineParams& p) {
  const CosineLayout at = cosine_layout(p);
  CosinePlan plan;
  plan.tile_rows = plan.tile_columns = at.sums ? 0 : kDotBlock;
  plan.splits = at.splits;
  plan.workspace_bytes = at.floats * 4;
  const int64_t outputs = p.reduction == CosineReduction::kMatch ? 3 * p.T : p.reduction == CosineReduction::kNone ? p.N : 1;
  plan.bytes_moved = p.B * ((p.M + p.N) * p.C * dtype_bytes(p.dtype) + p.M * outputs * 4);
  plan.flops = 2 * p.B * p.C * (at.sums ? 2 * (p.M + p.N) : p.M * p.N);
  return plan;
}

}  // namespace tokensieve

// Plan of pagerank_cpu: the cuts of the all-row kernel.
#include "score/pagerank_layout.h"

namespace tokensieve {

PagerankPlan pagerank_plan_cpu(const PagerankParams& p) {
  PagerankPlan plan;
  plan.tile_rows = kStripRows;
  plan.tile_keys = p.N;
  plan.workspace_bytes = 4 * pagerank_layout(p).floats;
  plan.bytes_moved = p.B * (p.H + p.Hkv) * p.N * p.D * dtype_bytes(p.dtype) + p.B * p.H * p.N * 4;
  plan.flops = 2 * p.B * p.H * p.N * p.N * p.D * p.iterations;
  return plan;
}

}  // namespace tokensieve

// Plan of pagerank_cuda: host arithmetic only, so it is tested without a GPU.
#include "score/pagerank_args.h"

namespace tokensieve {

PagerankPlan pagerank_plan_cuda(const PagerankParams& r, const DeviceInfo& device) {
  PagerankPlan plan;
  const ScoreParams p = pagerank::score_params(r);
  ScorePlan sweeps;
  if (!colsum::plan_sweeps(p, device, sweeps)) return plan;  // threads = 0: pagerank_cuda refuses, or has nothing to do
  plan.tile_rows = sweeps.rows_per_pass;
  plan.tile_keys = sweeps.chunk_keys;
  plan.row_splits = sweeps.row_splits;
  plan.col_splits = sweeps.col_splits;
  plan.wgmma = sweeps.wgmma;
  plan.threads = sweeps.threads;
  plan.smem_bytes = sweeps.smem_bytes;
  plan.num_semaphores = sweeps.num_semaphores;
  // The sweeps' parts, then the vector that is not `rank`.
  plan.workspace_bytes = sweeps.workspace_bytes + 4 * r.B * r.H * r.N;
  const int64_t qk = 2 * r.B * r.H * r.N * r.N * r.D, inputs = (r.B * r.H + r.B * r.Hkv) * r.N * r.D * dtype_bytes(r.dtype);
  plan.flops = qk * (1 + r.iterations);
  plan.bytes_moved = inputs * (1 + r.iterations) + 4 * r.B * r.H * r.N * (1 + 2 * r.iterations);
  return plan;
}

}  // namespace tokensieve

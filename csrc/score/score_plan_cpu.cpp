// Plan of score_cpu: chunk and pass sizes depend on the shape only, so a result never depends on the number of threads.
#include "score/score_cpu_layout.h"

namespace tokensieve {

ScorePlan score_plan_cpu(const ScoreParams& p) {
  const ScoreLayout at = score_layout(p);
  ScorePlan plan;
  plan.algo = ScoreAlgo::kCpuChunks;
  plan.chunk_keys = at.chunk;
  plan.num_chunks = at.num_chunks;
  plan.rows_per_pass = at.group * at.pass_rows;
  plan.workspace_bytes = at.floats * 4;
  const int64_t keys = at.key_end - at.key_begin, bytes = dtype_bytes(p.dtype);
  const int64_t outputs = (p.head_reduction == Reduction::kNone ? p.H : 1) * (p.query_reduction == Reduction::kNone ? p.L : 1);
  plan.bytes_moved =
      p.B * (at.num_passes * p.Hkv * keys * p.D * bytes + p.H * p.L * p.D * bytes + outputs * (p.range_end - p.range_begin) * 4);
  plan.flops = 2 * p.B * p.H * p.L * keys * p.D;
  return plan;
}

}  // namespace tokensieve

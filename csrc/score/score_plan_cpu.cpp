// Plan of score_cpu: chunk and pass sizes depend on the shape only, so a result never depends on the number of threads.
#include "score/score_cpu_layout.h"

namespace tokensieve {
namespace {

// The strip kernel reads packed keys once for 24 rows and writes one sum a column; chunks keep every row's mass until the end. Few rows do
// not pay for the packing. Rows that are not reduced go to one head's output, or (heads reduced) stay with the chunks.
bool takes_strips(const ScoreParams& p) {
  const bool stored = p.query_reduction == Reduction::kNone && p.head_reduction != Reduction::kNone;
  return !stored && p.L >= 2 * kStripRows;
}

}  // namespace

ScorePlan score_plan_cpu(const ScoreParams& p) {
  const ScoreLayout at = score_layout(p);
  ScorePlan plan;
  plan.algo = takes_strips(p) ? ScoreAlgo::kCpuStrip : ScoreAlgo::kCpuChunks;
  plan.chunk_keys = at.chunk;
  plan.num_chunks = at.num_chunks;
  plan.rows_per_pass = at.group * at.pass_rows;
  plan.workspace_bytes = 4 * score_cpu_floats(p, plan.algo);
  const int64_t keys = at.key_end - at.key_begin, bytes = dtype_bytes(p.dtype);
  const int64_t passes = plan.algo == ScoreAlgo::kCpuStrip ? 1 : at.num_passes;
  const int64_t outputs = (p.head_reduction == Reduction::kNone ? p.H : 1) * (p.query_reduction == Reduction::kNone ? p.L : 1);
  plan.bytes_moved = p.B * (passes * p.Hkv * keys * p.D * bytes + p.H * p.L * p.D * bytes + outputs * (p.range_end - p.range_begin) * 4);
  plan.flops = 2 * p.B * p.H * p.L * keys * p.D;
  return plan;
}

}  // namespace tokensieve

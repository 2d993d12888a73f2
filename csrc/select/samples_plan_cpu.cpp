// Plan of samples_cpu: scratch for the sort, the cdf and the marks of a row.
#include "select/samples_cpu_layout.h"

namespace tokensieve {

SamplesPlan samples_plan_cpu(const SamplesParams& p) {
  const SamplesLayout at = samples_layout(p);
  SamplesPlan plan;
  plan.workspace_bytes = at.groups * at.ints * 4;
  plan.bytes_moved = p.rows.B * (p.rows.N * dtype_bytes(p.rows.dtype) + p.capacity * 8 + (p.points != nullptr ? p.R * 4 : 0));
  return plan;
}

}  // namespace tokensieve

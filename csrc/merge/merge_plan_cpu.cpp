// Plan of merge_cpu and merge_grad_cpu: 12 bytes a token and 8 an output row for the lists of tokens by row.
#include "merge/merge_cpu_layout.h"

namespace tokensieve {

MergePlan merge_plan_cpu(const MergeParams& p) {
  MergePlan plan;
  plan.workspace_bytes = p.B * merge_layout(p).ints * 4;
  int64_t row = 0;
  for (int i = 0; i < p.num_tensors; ++i) row += p.tensors[i].segments * p.tensors[i].segment_bytes;
  plan.bytes_moved = p.B * ((p.N + p.R) * row + 8 * (p.complement ? p.K : p.N) + 4 * p.N * (p.weights != nullptr || p.size != nullptr));
  return plan;
}

}  // namespace tokensieve

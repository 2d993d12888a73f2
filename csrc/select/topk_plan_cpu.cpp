// Plan of topk_cpu: scratch and traffic. The algorithm needs no choice: bisection touches N at most 32 times, all in L1 or L2.
#include "select/topk_cpu_layout.h"

namespace tokensieve {

TopkPlan topk_plan_cpu(const TopkParams& p) {
  const TopkLayout at = topk_layout(p);
  TopkPlan plan;
  plan.workspace_bytes = at.groups * at.ints * 4;
  plan.bytes_moved = p.B * (p.N * dtype_bytes(p.dtype) + topk_output_length(p) * 8);
  return plan;
}

}  // namespace tokensieve

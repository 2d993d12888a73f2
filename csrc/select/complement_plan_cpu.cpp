// Plan of complement_cpu: a byte for every position, for up to 64 rows at a time.
#include "select/complement_cpu_layout.h"

namespace tokensieve {

ComplementPlan complement_plan_cpu(const ComplementParams& p) {
  const ComplementLayout at = complement_layout(p);
  ComplementPlan plan;
  plan.workspace_bytes = at.groups * at.padded;
  plan.bytes_moved = p.B * (p.K + p.capacity) * 8;
  return plan;
}

}  // namespace tokensieve

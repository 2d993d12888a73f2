// Plan of count_cpu: scratch for the keys of a row and for those that can still hold the cut.
#include "select/count.h"

namespace tokensieve {

CountPlan count_plan_cpu(const CountParams& p) {
  constexpr int64_t kPad = 16;  // whole vectors, and one that wide stores may spill into
  const int64_t padded = (p.rows.N + kPad - 1) / kPad * kPad + kPad;
  CountPlan plan;
  plan.workspace_bytes = (p.rows.B < kCountGroups ? p.rows.B : kCountGroups) * 2 * padded * 4;
  return plan;
}

}  // namespace tokensieve

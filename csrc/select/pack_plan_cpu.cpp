// Plan of pack_cpu: one pass over the index, no scratch.
#include "select/pack.h"

namespace tokensieve {

PackPlan pack_plan_cpu(const PackParams& p) {
  PackPlan plan;
  plan.bytes_moved = 8 * (2 * p.B * p.K + p.capacity) + 4 * (p.B + 1);
  return plan;
}

}  // namespace tokensieve

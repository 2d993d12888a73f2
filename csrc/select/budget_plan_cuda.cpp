// Plan of budget_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/budget.h"

namespace tokensieve {

BudgetPlan budget_plan_cuda(const BudgetParams& p, const DeviceInfo& /*device*/) {
  BudgetPlan plan;
  const int64_t element = p.wide ? 8 : 4;
  // One thread a part up to four warps: the sums run on one thread, so more threads only wait.
  plan.threads = static_cast<int>(std::clamp<int64_t>((p.P + 31) / 32 * 32, 32, 128));
  plan.smem_bytes = 2 * p.P * element;
  plan.bytes_moved = p.B * p.P * (2 * element + 8 + (p.cap_parts != nullptr ? 8 : 0));
  return plan;
}

}  // namespace tokensieve

// Plan of pack_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/pack.h"

namespace tokensieve {

PackPlan pack_plan_cuda(const PackParams& p, const DeviceInfo& /*device*/) {
  PackPlan plan;
  plan.workspace_bytes = 4 * p.B;  // tokens of every row
  plan.threads = static_cast<int>(std::clamp<int64_t>((p.K + 31) / 32 * 32, 64, 512));
  plan.bytes_moved = 8 * (3 * p.B * p.K + p.capacity) + 4 * (p.B + 1);  // the index is read twice
  return plan;
}

}  // namespace tokensieve

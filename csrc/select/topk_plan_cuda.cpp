// Plan of topk_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/topk_args.h"

namespace tokensieve {

TopkPlan topk_plan_cuda(const TopkParams& p, const DeviceInfo& device) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  TopkPlan plan;
  // Four scores are one 16-byte load; sixteen are what 64 registers a thread (1024 threads) hold without spills.
  plan.items_per_thread = p.N <= 4 * 1024 ? 4 : p.N <= 16 * 1024 ? 16 : 0;
  const int64_t items = plan.items_per_thread == 0 ? select::kTileItems : plan.items_per_thread;
  // At least two warps: 2048 bins over 32 threads would take longer to scan than a short row takes to read.
  plan.threads = static_cast<int>(std::clamp<int64_t>(ceil_div(ceil_div(p.N, items), 32) * 32, 64, 1024));
  const int64_t limit = device.smem_per_block - select::kTopkStaticShared;
  if (p.order == TopkOrder::kScore && select::sort_capacity(p.K) * 8 > limit) {
    plan.workspace_bytes = select::sort_capacity(p.K) * 8 * p.B;  // a pass of the sort over L2: about 5 x slower, for K > 16384 only
  }
  plan.smem_bytes = select::sort_bytes(p, plan);
  // Up to 52k scores wait in shared memory: one read of 200 KB instead of four, 2 us instead of 8 for one SM's share of L2.
  const int64_t held = plan.items_per_thread == 0 ? select::held_bytes(p.N, plan.threads) : 0;
  if (plan.smem_bytes + held + select::kHeldListBytes <= limit) plan.smem_bytes += held;
  const int64_t masks = (p.candidates != nullptr ? 1 : 0) + (p.always_keep != nullptr ? 1 : 0);
  plan.bytes_moved = p.B * p.N * (dtype_bytes(p.dtype) + masks) + p.B * topk_output_length(p) * 8;
  return plan;
}

}  // namespace tokensieve

// Plan of count_cuda: the shape of select_topk's kernel for the same rows.
#include "select/count.h"
#include "select/topk_args.h"

namespace tokensieve {

CountPlan count_plan_cuda(const CountParams& p, const DeviceInfo& device) {
  CountPlan plan;
  DeviceInfo left = device;
  left.smem_per_block -= 32 * 1024;  // the kernel's histograms of counts and masses, static
  plan.rows = topk_plan_cuda(p.rows, left);
  if (plan.rows.items_per_thread != 16) return plan;
  // Masses need more registers than keys: 16 items a thread would spill 288 bytes at 64 registers. These rows wait in shared memory.
  plan.rows.items_per_thread = 0;
  plan.rows.threads = 1024;
  plan.rows.smem_bytes = select::sort_bytes(p.rows, plan.rows);
  const int64_t held = select::held_bytes(p.rows.N, plan.rows.threads);
  if (plan.rows.smem_bytes + held + select::kHeldListBytes <= left.smem_per_block - select::kTopkStaticShared) plan.rows.smem_bytes += held;
  return plan;
}

}  // namespace tokensieve

// Plan of count_cuda: the shape of select_topk's kernel for the same rows.
#include "select/count.h"
#include "select/topk_args.h"

namespace tokensieve {

CountPlan count_plan_cuda(const CountParams& p, const DeviceInfo& device) {
  CountPlan plan;
  DeviceInfo left = device;
  left.smem_per_block -= 32 * 1024;  // the kernel's histograms of counts and masses, static
  plan.rows = topk_plan_cuda(p.rows, left);
  return plan;
}

}  // namespace tokensieve

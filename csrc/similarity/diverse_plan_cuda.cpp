// Plan of diverse_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "similarity/diverse_args.h"

namespace tokensieve {

DiversePlan diverse_plan_cuda(const DiverseParams& p, const DeviceInfo&) {
  using namespace diverse;
  DiversePlan plan;
  plan.store_distances = p.B * p.N * p.N * 4 <= kMatrixLimit;
  plan.workspace_bytes = layout(p, plan.store_distances).bytes;
  // Few tokens a thread: a round is latency, and more warps mean more candidates a round; 64 tokens need no more than two warps.
  plan.threads = static_cast<int>(std::clamp<int64_t>(ceil_div(p.N, 32) * 32, 64, kMaxThreads));
  plan.smem_bytes = 4 * 64 * 144;  // the tiles' buffers
  plan.flops = p.B * p.N * p.N * p.C;
  plan.bytes_moved = p.B * (p.N * p.C * dtype_bytes(p.dtype) + p.K * 8) + (plan.store_distances ? 2 * p.B * p.N * p.N * 4 : 0);
  return plan;
}

}  // namespace tokensieve

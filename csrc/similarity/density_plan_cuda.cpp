// Plans of density_cuda and nearest_cuda: host arithmetic only, so they are tested without a GPU.
#include <algorithm>

#include "similarity/density_args.h"

namespace tokensieve {

DensityPlan density_plan_cuda(const DensityParams& p, const DeviceInfo&) {
  using namespace density;
  DensityPlan plan;
  plan.store_distances = p.B * p.N * p.N * 4 <= kMatrixLimit;
  plan.strip_rows = std::min(p.N, std::max<int64_t>(kMatrixLimit / 8 / (std::max<int64_t>(p.N, 1) * 4) / 64 * 64, 64));
  plan.workspace_bytes = layout(p, plan).bytes;
  const int64_t pairs = plan.store_distances ? p.N * p.N / 2 : 2 * p.N * p.N;
  plan.flops = 2 * p.B * (pairs + p.N * (p.k + 1)) * p.C;
  plan.bytes_moved = p.B * (p.N * p.C * dtype_bytes(p.dtype) + p.N * 8 + 3 * p.N * p.N * 4);
  return plan;
}

NearestPlan nearest_plan_cuda(const NearestParams& p, const DeviceInfo&) {
  using namespace density;
  NearestPlan plan;
  plan.workspace_bytes = nearest_layout(p).bytes;
  plan.flops = 2 * p.B * p.N * p.K * p.C;
  plan.bytes_moved = p.B * ((p.N + p.K) * p.C * dtype_bytes(p.dtype) + (p.N + p.K) * 8);
  return plan;
}

}  // namespace tokensieve

// Plans of density_cpu and nearest_cpu: whether the distances are stored, and the workspace. They depend on the shape only.
#include "similarity/density_cpu_layout.h"

namespace tokensieve {

DensityPlan density_plan_cpu(const DensityParams& p) {
  DensityPlan plan;
  // The matrix takes every product once for both of its places; strips compute all of it, for the neighbours and again for the denser ones:
  // four times the work. 8192 tokens are 256 MB of distances.
  plan.store_distances = p.N <= 8192;
  plan.workspace_bytes = density_layout(p, plan.store_distances).floats * 4;
  const int64_t pairs = plan.store_distances ? p.N * (p.N + 1) / 2 : 2 * p.N * p.N;
  plan.bytes_moved = p.B * (p.N * p.C * dtype_bytes(p.dtype) + p.N * 8);
  plan.flops = 2 * p.B * (pairs + p.N * (p.k + 1)) * p.C;
  return plan;
}

NearestPlan nearest_plan_cpu(const NearestParams& p) {
  NearestPlan plan;
  plan.workspace_bytes = nearest_layout(p).floats * 4;
  plan.bytes_moved = p.B * ((p.N + p.K) * p.C * dtype_bytes(p.dtype) + (p.N + p.K) * 8);
  plan.flops = 2 * p.B * p.N * p.K * p.C;
  return plan;
}

}  // namespace tokensieve

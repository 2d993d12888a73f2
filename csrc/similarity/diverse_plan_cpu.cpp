// Plan of diverse_cpu: whether the distance matrix is stored, and the workspace. It depends on the shape only.
#include "similarity/diverse_cpu_layout.h"

namespace tokensieve {

DiversePlan diverse_plan_cpu(const DiverseParams& p) {
  DiversePlan plan;
  // With every first pick given, K rows of distances are enough. A row by itself runs at memory speed (2.5 G multiply-adds a second), the
  // symmetric half of the matrix at 90 G, so rows pay below N / 18 picks. A matrix above 2 GB (N = 23k) is not stored either.
  const bool few_rows = p.first != nullptr && 18 * p.K < p.N;
  plan.store_distances = !few_rows && p.N <= int64_t{23170};
  plan.workspace_bytes = diverse_layout(p, plan.store_distances).floats * 4;
  const int64_t pairs = few_rows ? p.K * p.N : p.N * (p.N - 1) / 2 + (plan.store_distances ? 0 : p.K * p.N);
  plan.bytes_moved = p.B * (p.N * p.C * dtype_bytes(p.dtype) + p.K * (p.N * 4 + 8));
  plan.flops = 2 * p.B * pairs * p.C;
  return plan;
}

}  // namespace tokensieve

// Plans of the pooling kernels on the CPU: the softmax weights of every window, the sums of means.
#include "merge/pool_args.h"

namespace tokensieve {

PoolPlan pool_plan_cpu(const PoolParams& p) {
  PoolPlan plan;
  const int64_t N = pool::tokens(p), R = pool::outputs(p), bytes = dtype_bytes(p.dtype);
  plan.bytes_moved = p.B * (N + R * pool::stacked(p)) * p.C * bytes;
  if (p.kind == PoolKind::kSoftmax) {
    plan.workspace_bytes = p.B * R * pool::window(p) * 4;
    plan.bytes_moved += p.B * N * 4;
  }
  return plan;
}

PoolPlan pool_grad_plan_cpu(const PoolParams& p) {
  PoolPlan plan = pool_plan_cpu(p);
  const int64_t row = p.B * p.C * dtype_bytes(p.dtype);
  if (p.kind == PoolKind::kMax || p.kind == PoolKind::kSoftmax) plan.bytes_moved += row * (pool::tokens(p) + pool::outputs(p));
  return plan;
}

PoolPlan runs_plan_cpu(const RunsParams& p) {
  PoolPlan plan;
  plan.bytes_moved = p.B * (p.S + pool::rows(p)) * p.C * dtype_bytes(p.dtype);
  return plan;
}

PoolPlan means_plan_cpu(const MeansParams& p) {
  PoolPlan plan;
  const int64_t width = pool::means_width(p), blocks = (p.C + width - 1) / width;
  plan.workspace_bytes = p.B * blocks * (pool::kMeansRun + p.T) * width * 4;
  plan.bytes_moved = p.B * (p.T * p.N + p.T + p.N) * p.C * dtype_bytes(p.dtype);
  return plan;
}

}  // namespace tokensieve

// allocate_budget on CUDA: dtype -> kernel, one launch.
#include "select/budget_kernel.cuh"

namespace tokensieve {

Status budget_cuda(const BudgetParams& params, const BudgetPlan& plan, void* stream) {
  if (const char* why = select::budget_refusal(params)) return Status::error(why);
  if (params.B == 0 || params.P == 0) return Status::success();
  if (params.B >= int64_t{1} << 31) return Status::error("B must be below 2^31");
  const dim3 grid(static_cast<unsigned>(params.B)), block(static_cast<unsigned>(plan.threads));
  const auto smem = static_cast<size_t>(plan.smem_bytes);
  if (params.wide) return simt::launch(select::budget_kernel<double>, grid, block, smem, stream, params);
  return simt::launch(select::budget_kernel<float>, grid, block, smem, stream, params);
}

}  // namespace tokensieve

// scatter_tokens on CUDA: parameters -> kernel arguments, one launch each.
#include "select/scatter_kernel.cuh"

namespace tokensieve {

Status scatter_cuda(const ScatterParams& params, const ScatterPlan& plan, void* stream) {
  select::ScatterArgs args;
  if (const char* why = select::scatter_args(params, plan, false, args)) return Status::error(why);
  if (params.B == 0 || params.N == 0 || args.num_tensors == 0) return Status::success();
  return simt::launch(params.add ? select::scatter_kernel<true> : select::scatter_kernel<false>,
                      dim3(static_cast<unsigned>(params.B * args.blocks_per_row)), dim3(static_cast<unsigned>(plan.threads)),
                      static_cast<size_t>(args.slots_per_block) * sizeof(int), stream, args);
}

Status scatter_grad_cuda(const ScatterParams& params, void* stream) {
  ScatterPlan plan;
  plan.threads = select::kGradThreads, plan.blocks_per_row = 1;
  select::ScatterArgs args;
  if (const char* why = select::scatter_args(params, plan, true, args)) return Status::error(why);
  if (params.B == 0 || params.K == 0) return Status::success();
  return simt::launch(select::scatter_grad_kernel, dim3(static_cast<unsigned>(params.B * params.K)), dim3(select::kGradThreads), 0, stream,
                      args);
}

}  // namespace tokensieve

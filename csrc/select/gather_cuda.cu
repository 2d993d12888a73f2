// gather_tokens and scatter_rows on CUDA: parameters -> kernel arguments, one launch each.
#include "select/gather_kernel.cuh"

namespace tokensieve {
namespace {

Status launch_copy(void (*kernel)(const select::CopyArgs), const GatherParams& p, const GatherPlan& plan, bool scatter, void* stream) {
  select::CopyArgs args;
  if (const char* why = select::copy_args(p, plan, scatter, args)) return Status::error(why);
  if (p.B == 0 || args.slots == 0 || args.num_tensors == 0) return Status::success();
  return simt::launch(kernel, dim3(static_cast<unsigned>(p.B * args.blocks_per_row)), dim3(static_cast<unsigned>(plan.threads)),
                      static_cast<size_t>(args.slots_per_block) * sizeof(int), stream, args);
}

}  // namespace

Status gather_cuda(const GatherParams& params, const GatherPlan& plan, void* stream) {
  return launch_copy(select::gather_kernel, params, plan, false, stream);
}

Status scatter_rows_cuda(const GatherParams& params, const GatherPlan& plan, void* stream) {
  return launch_copy(select::scatter_rows_kernel, params, plan, true, stream);
}

}  // namespace tokensieve

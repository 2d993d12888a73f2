// topk_gather on CUDA: one launch; two where order = score needs a sorted list first.
#include "select/topk_args.h"
#include "select/topk_gather_kernel.cuh"

namespace tokensieve {
namespace select {
namespace {

template <typename T>
Status launch_topk_gather(const TopkParams& p, const TopkPlan& plan, const CopyArgs& args, void* stream) {
  return with_topk_shape(p, plan, [&](auto shape) {
    const int64_t held = shape.kHold == Hold::kShared ? held_bytes(p.N, plan.threads) : 0;
    return simt::launch(topk_gather_kernel<T, shape.kItems, shape.kHold>, dim3(static_cast<unsigned>(p.B * args.blocks_per_row)),
                        dim3(static_cast<unsigned>(plan.threads)), static_cast<size_t>(held + args.slots_per_block * 4), stream, p, args,
                        static_cast<int>(held));
  });
}

}  // namespace
}  // namespace select

Status topk_gather_cuda(const TopkParams& topk, const TopkPlan& topk_plan, const GatherParams& gather, const GatherPlan& gather_plan,
                        void* stream) {
  if (gather.B != topk.B || gather.K != topk_output_length(topk) || gather.index != topk.index || gather.index_stride != gather.K) {
    return Status::error("gather.index must be topk.index");
  }
  if (topk.order == TopkOrder::kScore) {
    const Status status = topk_cuda(topk, topk_plan, stream);
    return status.ok() ? gather_cuda(gather, gather_plan, stream) : status;
  }
  if (topk.B == 0 || gather.K == 0) return Status::success();
  if (const char* why = select::topk_refusal(topk, topk_plan)) return Status::error(why);
  GatherPlan plan = gather_plan;
  plan.threads = topk_plan.threads;
  if (select::hold_of(topk, topk_plan) == select::Hold::kShared) {  // the scores leave room for a short list only
    const int64_t blocks = (gather.K + select::kHeldListBytes / 4 - 1) / (select::kHeldListBytes / 4);
    if (plan.blocks_per_row < blocks) plan.blocks_per_row = static_cast<int>(blocks);
  }
  select::CopyArgs args;
  if (const char* why = select::copy_args(gather, plan, false, args)) return Status::error(why);
  switch (topk.dtype) {
    case DType::kFloat32:
      return select::launch_topk_gather<float>(topk, topk_plan, args, stream);
    case DType::kFloat16:
      return select::launch_topk_gather<__half>(topk, topk_plan, args, stream);
    case DType::kBFloat16:
      return select::launch_topk_gather<__nv_bfloat16>(topk, topk_plan, args, stream);
    default:
      return Status::error("scores must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

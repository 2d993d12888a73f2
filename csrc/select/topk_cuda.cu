// select_topk on CUDA: element type and plan -> kernel, one launch.
#include "select/topk_kernel.cuh"

namespace tokensieve {
namespace select {
namespace {

template <typename T>
Status launch_topk(const TopkParams& p, const TopkPlan& plan, void* stream) {
  return with_topk_shape(p, plan, [&](auto shape) {
    const int64_t held = shape.kHold == Hold::kShared ? held_bytes(p.N, plan.threads) : 0, sort = sort_bytes(p, plan);
    return simt::launch(topk_kernel<T, shape.kItems, shape.kHold>, dim3(static_cast<unsigned>(p.B)),
                        dim3(static_cast<unsigned>(plan.threads)), static_cast<size_t>(held + sort), stream, p, static_cast<int>(held),
                        p.order == TopkOrder::kScore ? static_cast<int>(sort_capacity(p.K)) : 0, sort > 0 ? 1 : 0);
  });
}

}  // namespace
}  // namespace select

Status topk_cuda(const TopkParams& params, const TopkPlan& plan, void* stream) {
  if (params.B == 0 || topk_output_length(params) == 0) return Status::success();
  if (const char* why = select::topk_refusal(params, plan)) return Status::error(why);
  switch (params.dtype) {
    case DType::kFloat32:
      return select::launch_topk<float>(params, plan, stream);
    case DType::kFloat16:
      return select::launch_topk<__half>(params, plan, stream);
    case DType::kBFloat16:
      return select::launch_topk<__nv_bfloat16>(params, plan, stream);
    default:
      return Status::error("scores must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

// Counts of select_mass and select_threshold on CUDA: element type and plan -> kernel, one launch.
#include "select/count_kernel.cuh"

namespace tokensieve {
namespace select {
namespace {

template <typename T>
Status launch_count(const CountParams& p, const CountPlan& plan, void* stream) {
  const auto launch = [&](auto shape) {
    const int64_t held = shape.kHold == Hold::kShared ? held_bytes(p.rows.N, plan.rows.threads) : 0;
    return simt::launch(count_kernel<T, shape.kItems, shape.kHold>, dim3(static_cast<unsigned>(p.rows.B)),
                        dim3(static_cast<unsigned>(plan.rows.threads)), static_cast<size_t>(held), stream, p);
  };
  if (plan.rows.items_per_thread == 4) return launch(TopkShape<4, Hold::kRegisters>{});
  if (plan.rows.items_per_thread != 0) return Status::error("a count takes 4 items a thread, or 0");
  if (hold_of(p.rows, plan.rows) == Hold::kShared) return launch(TopkShape<kTileItems, Hold::kShared>{});
  return launch(TopkShape<kTileItems, Hold::kNowhere>{});
}

}  // namespace
}  // namespace select

Status count_cuda(const CountParams& params, const CountPlan& plan, void* stream) {
  if (params.rows.B == 0) return Status::success();
  if (const char* why = select::topk_refusal(params.rows, plan.rows)) return Status::error(why);
  switch (params.rows.dtype) {
    case DType::kFloat32:
      return select::launch_count<float>(params, plan, stream);
    case DType::kFloat16:
      return select::launch_count<__half>(params, plan, stream);
    case DType::kBFloat16:
      return select::launch_count<__nv_bfloat16>(params, plan, stream);
    default:
      return Status::error("scores must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

// score_quantiles on CUDA: element type and plan -> kernel, one launch.
#include "select/quantiles_kernel.cuh"

namespace tokensieve {
namespace select {
namespace {

template <typename T>
Status launch_quantiles(const QuantilesParams& p, const TopkPlan& plan, void* stream) {
  return with_topk_shape(p.rows, plan, [&](auto shape) {
    const int64_t held = shape.kHold == Hold::kShared ? held_bytes(p.rows.N, plan.threads) : 0;
    return simt::launch(quantiles_kernel<T, shape.kItems, shape.kHold>, dim3(static_cast<unsigned>(p.rows.B * p.Q)),
                        dim3(static_cast<unsigned>(plan.threads)), static_cast<size_t>(held), stream, p);
  });
}

}  // namespace
}  // namespace select

Status quantiles_cuda(const QuantilesParams& params, const QuantilesPlan& plan, void* stream) {
  if (params.rows.B == 0 || params.Q == 0) return Status::success();
  if (const char* why = select::topk_refusal(params.rows, plan.rows)) return Status::error(why);
  if (params.Q > kMaxQuantiles) return Status::error("at most 16 quantiles");
  if (params.rows.B * params.Q >= int64_t{1} << 31) return Status::error("B times the number of quantiles must be below 2^31");
  switch (params.rows.dtype) {
    case DType::kFloat32:
      return select::launch_quantiles<float>(params, plan.rows, stream);
    case DType::kFloat16:
      return select::launch_quantiles<__half>(params, plan.rows, stream);
    case DType::kBFloat16:
      return select::launch_quantiles<__nv_bfloat16>(params, plan.rows, stream);
    default:
      return Status::error("scores must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

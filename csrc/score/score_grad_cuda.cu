// Gradient of attention_scores on CUDA: element type -> kernels, three launches in stream order.
#include "score/score_grad_kernel.cuh"

namespace tokensieve {
namespace score {
namespace {

template <typename T>
Status launch_grad(const ScoreGradParams& g, void* stream) {
  const ScoreParams& p = g.forward;
  const GradArgs args = {g, grad_layout(g, kGradChunkKeys, false)};
  const int64_t tiles = (p.N + kGradChunkKeys - 1) / kGradChunkKeys, terms = p.B * p.Hkv * args.at.num_chunks;
  const int64_t rows = p.B * p.H * p.L, keys = p.B * p.Hkv * tiles, limit = int64_t{1} << 31;
  if (rows >= limit || keys >= limit) return Status::error("the gradient needs more than 2^31 - 1 blocks");
  const dim3 block(kGradBlock);
  Status status;
  if (terms > 0 && rows > 0) {
    status =
        simt::launch(score_grad_terms_kernel<T>, dim3(static_cast<unsigned>(terms)), block, static_cast<size_t>(p.D) * 4, stream, args);
  }
  if (status.ok() && rows > 0) {
    status = simt::launch(score_grad_query_kernel<T>, dim3(static_cast<unsigned>(rows)), block, 0, stream, args);
  }
  if (status.ok() && keys > 0) status = simt::launch(score_grad_key_kernel<T>, dim3(static_cast<unsigned>(keys)), block, 0, stream, args);
  return status;
}

}  // namespace
}  // namespace score

Status score_grad_cuda(const ScoreGradParams& params, const ScoreGradPlan& /*plan*/, void* stream) {
  if (const char* why = grad_refusal(params)) return Status::error(why);
  if (params.forward.Hkv == 0) return Status::success();
  switch (params.forward.dtype) {
    case DType::kFloat32:
      return score::launch_grad<float>(params, stream);
    case DType::kFloat16:
      return score::launch_grad<__half>(params, stream);
    default:
      return score::launch_grad<__nv_bfloat16>(params, stream);
  }
}

}  // namespace tokensieve

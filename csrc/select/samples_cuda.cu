// select_samples on CUDA: element type -> kernel, one launch.
#include "select/samples_kernel.cuh"

namespace tokensieve {
namespace select {
namespace {

template <typename T>
Status launch_samples(const SamplesParams& p, const SamplesPlan& plan, void* stream) {
  return simt::launch(samples_kernel<T>, dim3(static_cast<unsigned>(p.rows.B)), dim3(static_cast<unsigned>(plan.threads)),
                      static_cast<size_t>(plan.smem_bytes), stream, p, static_cast<int>(sort_capacity(p.rows.N)),
                      plan.workspace_bytes == 0);
}

}  // namespace
}  // namespace select

Status samples_cuda(const SamplesParams& params, const SamplesPlan& plan, void* stream) {
  if (params.rows.B == 0) return Status::success();
  if (params.rows.N >= int64_t{1} << 30 || params.rows.B >= int64_t{1} << 31) return Status::error("N must be below 2^30, B below 2^31");
  if (plan.workspace_bytes > 0 && params.workspace == nullptr) return Status::error("workspace is missing");
  switch (params.rows.dtype) {
    case DType::kFloat32:
      return select::launch_samples<float>(params, plan, stream);
    case DType::kFloat16:
      return select::launch_samples<__half>(params, plan, stream);
    case DType::kBFloat16:
      return select::launch_samples<__nv_bfloat16>(params, plan, stream);
    default:
      return Status::error("scores must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

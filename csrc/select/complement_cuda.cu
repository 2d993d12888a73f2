// complement_index on CUDA: one launch.
#include "select/complement_kernel.cuh"

namespace tokensieve {

Status complement_cuda(const ComplementParams& params, const ComplementPlan& plan, void* stream) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 8192;  // the first position of a partly empty tile still fits 32 bits
  if (params.B == 0 || params.capacity == 0) return Status::success();
  if (params.N >= kLimit || params.B >= kLimit) return Status::error("B and N must be below 2^31 - 8192");
  if (plan.smem_bytes == 0 && plan.workspace_bytes > 0 && params.workspace == nullptr) return Status::error("workspace is missing");
  return simt::launch(select::complement_kernel, dim3(static_cast<unsigned>(params.B)), dim3(static_cast<unsigned>(plan.threads)),
                      static_cast<size_t>(plan.smem_bytes), stream, params, static_cast<int>((params.N + 31) / 32),
                      plan.workspace_bytes == 0);
}

}  // namespace tokensieve

// pack_index on CUDA: two launches, the second waits for the first by stream order.
#include "select/pack_kernel.cuh"

namespace tokensieve {

Status pack_cuda(const PackParams& params, const PackPlan& plan, void* stream) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (params.B >= kLimit || params.K >= kLimit) return Status::error("B and K must be below 2^31");
  const dim3 block(static_cast<unsigned>(plan.threads));
  if (params.B > 0) {
    const Status status = simt::launch(select::pack_count_kernel, dim3(static_cast<unsigned>(params.B)), block, 0, stream, params);
    if (!status.ok()) return status;
  }
  return simt::launch(select::pack_write_kernel, dim3(static_cast<unsigned>(params.B > 0 ? params.B : 1)), block, 0, stream, params);
}

}  // namespace tokensieve

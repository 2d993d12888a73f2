// Plan of match_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "merge/match_cuda_layout.h"

namespace tokensieve {

MatchPlan match_plan_cuda(const MatchParams& p, const DeviceInfo& device) {
  using namespace match;
  MatchPlan plan;
  const CudaLayout sizes = cuda_layout(p, 1);
  // Four blocks an SM hide each other's loads; the last one of an image reads S x splits matches.
  const int64_t wanted = ceil_div(4 * device.num_sms, std::max<int64_t>(1, p.B * sizes.row_tiles));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, sizes.column_tiles));
  plan.splits = std::max<int64_t>(1, ceil_div(sizes.column_tiles, std::max<int64_t>(1, ceil_div(sizes.column_tiles, splits))));
  plan.fused = p.S <= kFusedSources;
  plan.workspace_bytes = cuda_layout(p, plan.splits).bytes;
  plan.num_semaphores = p.B;
  plan.threads = 128;
  plan.smem_bytes = 4 * kSide * 144;  // the tile's buffers; the keys of 1024 sources take their place
  plan.bytes_moved = p.B * (p.H * p.N * p.D * dtype_bytes(p.dtype) + 20 * p.r + 8 * (p.rows() + p.N));
  plan.flops = 2 * p.B * p.S * p.T * p.D;
  return plan;
}

}  // namespace tokensieve

// Plan of cosine_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "similarity/cosine_args.h"

namespace tokensieve {

CosinePlan cosine_plan_cuda(const CosineParams& p, const DeviceInfo& device) {
  using namespace cosine;
  CosinePlan plan;
  const int64_t row_tiles = ceil_div(p.M, kSide), column_tiles = ceil_div(p.N, kSide), keep = keep_of(p);
  plan.tile_rows = plan.tile_columns = kSide;
  plan.threads = 128;
  const Layout sizes = layout(p, 1);
  if (sums_rows(p)) {
    // Rows of b in chunks: two blocks an SM, at least 8 rows a block, and at most 128 partial sums for the last block to add.
    const int64_t wanted = ceil_div(2 * device.num_sms, std::max<int64_t>(1, p.B * sizes.channel_blocks));
    plan.splits = std::clamp<int64_t>(ceil_div(p.N, 8), 1, std::min<int64_t>(wanted, 128));
    plan.num_semaphores = p.B * sizes.channel_blocks;
    plan.flops = 2 * p.B * p.C * (p.M + 2 * p.N);
  } else {
    // Four blocks an SM hide each other's loads. A list of T costs its first tile 64 candidates a row, so lists are split less.
    const int64_t wanted = ceil_div((keep > 1 ? 2 : 4) * device.num_sms, std::max<int64_t>(1, p.B * row_tiles));
    plan.splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, column_tiles));
    plan.splits = std::max<int64_t>(1, ceil_div(column_tiles, std::max<int64_t>(1, ceil_div(column_tiles, plan.splits))));
    plan.num_semaphores = keep > 0 && plan.splits > 1 ? p.B * row_tiles : 0;
    plan.smem_bytes = 4 * kSide * 144 + (keep > 1 ? kSide * keep * 8 : 0);  // the tile's buffers, the lists
    plan.flops = 2 * p.B * p.M * p.N * p.C;
  }
  plan.workspace_bytes = layout(p, plan.splits).bytes;
  const int64_t out = keep > 0 ? p.M * keep * (p.reduction == CosineReduction::kMatch ? 12 : 4) : sums_rows(p) ? p.M * 4 : p.M * p.N * 4;
  plan.bytes_moved = p.B * ((p.M + p.N) * p.C * dtype_bytes(p.dtype) + out);
  return plan;
}

}  // namespace tokensieve

// Plan of complement_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/complement_args.h"

namespace tokensieve {

ComplementPlan complement_plan_cuda(const ComplementParams& p, const DeviceInfo& device) {
  ComplementPlan plan;
  const int64_t bits = (p.N + 31) / 32 * 4;
  // Eight positions a thread: their outputs are two 32-byte sectors, and 8192 tokens are one scan.
  plan.threads = static_cast<int>(std::clamp<int64_t>((p.N + 255) / 256 * 32, 64, 1024));
  const bool held = bits <= device.smem_per_block - select::kComplementStaticShared;  // 1.8 million positions on H200
  plan.smem_bytes = held ? bits : 0;
  plan.workspace_bytes = held ? 0 : bits * p.B;
  plan.bytes_moved = p.B * (p.K + p.capacity) * 8;
  return plan;
}

}  // namespace tokensieve

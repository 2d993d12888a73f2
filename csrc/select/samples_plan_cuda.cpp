// Plan of samples_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/samples.h"
#include "select/samples_args.h"

namespace tokensieve {

SamplesPlan samples_plan_cuda(const SamplesParams& p, const DeviceInfo& device) {
  SamplesPlan plan;
  const int64_t bytes = select::samples_row_bytes(p.rows.N);
  // A thread for every pair that a step of the bitonic sort compares.
  plan.threads = static_cast<int>(std::clamp<int64_t>(select::sort_capacity(p.rows.N) / 2, 64, 1024));
  const bool held = bytes <= device.smem_per_block - select::kSamplesStaticShared;  // N <= 16384 on H200 (132 KB)
  plan.smem_bytes = held ? bytes : 0;
  plan.workspace_bytes = held ? 0 : bytes * p.rows.B;
  const int64_t element = dtype_bytes(p.rows.dtype) + (p.rows.candidates != nullptr ? 1 : 0);
  plan.bytes_moved = p.rows.B * (p.rows.N * element + p.capacity * 8 + (p.points != nullptr ? p.R * 4 : 0));
  return plan;
}

}  // namespace tokensieve

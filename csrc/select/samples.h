// select_samples: inverse transform sampling of the tokens of every row, ATS's rule (arXiv 2111.15667).
#pragma once

#include <cstdint>

#include "select/topk.h"

namespace tokensieve {

// The n candidates of a row in ascending order of core/order.h (equal scores by position) have masses m_0 .. m_(n-1) as in count.h, and
//   F_j = (C_j - C_0) / (C_(n-1) - C_0), C_j = m_0 + .. + m_j: integers, so exact in any order; the quotient is rounded to float32.
// Point y picks the first j with the least |y - F_j| in float32. Without points given, y_t = s + (1 - s) t / (R - 1), t = 0 .. R - 1, where s
// is the least F_j > 0 (R = 1: y_0 = s). The picks, each once, come in ascending score order; a row with more than `capacity` gives the last
// ones, which are the best. A row whose mass above m_0 is 0 picks nothing; nor does a NaN point.
struct SamplesParams {
  TopkParams rows;                // scores, candidates, B, N, strides and dtype; the rest is unused
  const float* points = nullptr;  // [B, R] contiguous; may be null
  int64_t R = 0;                  // points
  int64_t capacity = 0;
  int64_t* index = nullptr;   // [B, capacity] contiguous
  int64_t* counts = nullptr;  // [B] picks
  bool* overflow = nullptr;   // [B] counts > capacity
  void* workspace = nullptr;  // plan.workspace_bytes
};

struct SamplesPlan {
  int64_t workspace_bytes = 0;
  int threads = 0;         // CUDA: threads per block, one block a row
  int64_t smem_bytes = 0;  // CUDA: the sorted row and its marks; 0 = they are in the workspace
  int64_t bytes_moved = 0;
};

SamplesPlan samples_plan_cpu(const SamplesParams& params);
SamplesPlan samples_plan_cuda(const SamplesParams& params, const DeviceInfo& device);
Status samples_cpu(const SamplesParams& params, const SamplesPlan& plan, CpuLevel level, ParallelForFn threads);
Status samples_cuda(const SamplesParams& params, const SamplesPlan& plan, void* stream);

}  // namespace tokensieve

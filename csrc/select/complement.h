// complement_index: the positions of [0, N) that a row of indices does not name, ascending.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

// -1 names nothing; a position named twice is missing once. Slots behind the row's last position are -1.
// On the CPU a row that leaves more than `capacity` positions is an error; CUDA, which cannot say so without a sync, keeps the first.
struct ComplementParams {
  const int64_t* index = nullptr;  // [B, K] in [-1, N)
  int64_t* out = nullptr;          // [B, capacity] contiguous
  void* workspace = nullptr;       // plan.workspace_bytes
  int64_t B = 0, K = 0, N = 0, capacity = 0;
  int64_t index_stride = 0;  // of a row, elements
};

struct ComplementPlan {
  int64_t workspace_bytes = 0;
  int threads = 0;         // CUDA: threads per block, one block a row
  int64_t smem_bytes = 0;  // CUDA: a bit for every position; 0 = the bits are in the workspace
  int64_t bytes_moved = 0;
};

ComplementPlan complement_plan_cpu(const ComplementParams& params);
ComplementPlan complement_plan_cuda(const ComplementParams& params, const DeviceInfo& device);
Status complement_cpu(const ComplementParams& params, const ComplementPlan& plan, CpuLevel level, ParallelForFn threads);
Status complement_cuda(const ComplementParams& params, const ComplementPlan& plan, void* stream);

}  // namespace tokensieve

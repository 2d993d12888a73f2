// pack_index: where the used tokens of a padded index go when the rows of a batch are laid end to end (variable-length attention).
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

// The used tokens of index (not -1), row after row and in the order of their row, get the slots 0, 1, ...; those from `capacity` on none.
struct PackParams {
  const int64_t* index = nullptr;  // [B, K], in [-1, N)
  int64_t* rows = nullptr;         // [capacity]: b * N + token of every slot, -1 where there is none
  int64_t* slots = nullptr;        // [B, K] contiguous: slot of every token, -1 = unused or beyond the capacity
  int32_t* cu_seqlens = nullptr;   // [B + 1]: first slot of every row, at most capacity
  int64_t* total = nullptr;        // [1]: used tokens, those beyond the capacity too
  void* workspace = nullptr;       // plan.workspace_bytes
  int64_t index_stride = 0;        // of a batch row; 0 = one list for all
  int64_t B = 0, N = 0, K = 0, capacity = 0;
};

struct PackPlan {
  int64_t workspace_bytes = 0;
  int threads = 0;
  int64_t bytes_moved = 0;
};

PackPlan pack_plan_cpu(const PackParams& params);
PackPlan pack_plan_cuda(const PackParams& params, const DeviceInfo& device);
Status pack_cpu(const PackParams& params, const PackPlan& plan, CpuLevel level, ParallelForFn threads);
Status pack_cuda(const PackParams& params, const PackPlan& plan, void* stream);

}  // namespace tokensieve

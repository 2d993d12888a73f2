// gather_tokens: rows of several tensors by one index list, one launch; scatter_rows is its backward.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/parallel.h"
#include "core/status.h"
#include "select/topk.h"

namespace tokensieve {

constexpr int kMaxGatherTensors = 8;  // per launch; the caller splits longer lists

// One tensor, as bytes: a token is M segments of W contiguous bytes. The compact side ([B, K, M, W]) is contiguous.
struct GatherTensor {
  const void* src = nullptr;                         // gather: [B, N, M, W] strided; scatter: [B, K, M, W] contiguous
  void* dst = nullptr;                               // gather: [B, K, M, W] contiguous; scatter: [B, N, M, W] contiguous
  int64_t stride_b = 0, stride_n = 0, stride_m = 0;  // bytes, of the gather's source
  int64_t segments = 1;                              // M
  int64_t segment_bytes = 0;                         // W
};

struct GatherParams {
  GatherTensor tensors[kMaxGatherTensors];
  int num_tensors = 0;
  const int64_t* index = nullptr;  // [B, K]; -1 = a row of zeros (gather), skipped (scatter)
  int64_t index_stride = 0;        // of a batch row; 0 = one list for all
  int64_t B = 0, N = 0, K = 0;
};

struct GatherPlan {
  int threads = 0;
  int blocks_per_row = 0;  // CUDA: blocks that share one batch row's copies
  int vector_bytes = 0;    // CUDA: widest load (16, 8, 4, 2 or 1) of any tensor; each uses what its addresses allow, up to this
  int64_t bytes_moved = 0;
};

GatherPlan gather_plan_cuda(const GatherParams& params, const DeviceInfo& device);
Status gather_cpu(const GatherParams& params, CpuLevel level, ParallelForFn threads);
Status gather_cuda(const GatherParams& params, const GatherPlan& plan, void* stream);
// dst rows named by index get src rows, all others become zero. Indices of one row are unique (undefined otherwise).
Status scatter_rows_cpu(const GatherParams& params, CpuLevel level, ParallelForFn threads);
Status scatter_rows_cuda(const GatherParams& params, const GatherPlan& plan, void* stream);

// Slices for topk_gather_cuda: no more blocks than run at once, because each repeats the selection.
GatherPlan topk_gather_plan_cuda(const GatherParams& params, const TopkPlan& topk_plan, const DeviceInfo& device);
// select + gather in one launch: every block redoes its row's selection from L2 and copies its slice (gather.index = topk.index).
Status topk_gather_cuda(const TopkParams& topk, const TopkPlan& topk_plan, const GatherParams& gather, const GatherPlan& gather_plan,
                        void* stream);

}  // namespace tokensieve

// select_topk: the k best tokens of every row, by the order of core/order.h, as ascending positions or by descending score.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

enum class TopkOrder : int { kPosition = 0, kScore = 1 };

// Emits, per row: the prefix positions, the selection, the suffix positions; unfilled slots at the end are -1.
// Row b keeps min(k_rows ? k_rows[b] : K, number of candidates) tokens. always_keep tokens rank above all others.
struct TopkParams {
  const void* scores = nullptr;          // [B, N] dtype
  const uint8_t* candidates = nullptr;   // [B, N] bool, false = never selected; may be null
  const uint8_t* always_keep = nullptr;  // [B, N] bool, true = ranks first (candidates or not); may be null
  const int64_t* k_rows = nullptr;       // [B] contiguous, each in [0, K]; may be null
  int64_t* index = nullptr;              // [B, prefix + K + suffix] contiguous
  void* workspace = nullptr;             // plan.workspace_bytes
  int64_t B = 0, N = 0, K = 0;
  int64_t score_stride = 0, candidates_stride = 0, always_keep_stride = 0;  // of a row, elements; columns are contiguous
  int64_t offset = 0;                                                       // added to every selected position
  int64_t prefix = 0;  // positions [offset - prefix, offset) come first (kPosition only)
  int64_t suffix = 0;  // positions [offset + N, offset + N + suffix) come last (kPosition only)
  DType dtype = DType::kFloat32;
  TopkOrder order = TopkOrder::kPosition;
};

struct TopkPlan {
  int64_t workspace_bytes = 0;
  int threads = 0;           // CUDA: threads per block, one block a row
  int items_per_thread = 0;  // CUDA: scores held in registers; 0 = in shared memory if smem_bytes covers them, else re-read
  int64_t smem_bytes = 0;
  int64_t bytes_moved = 0;
};

constexpr int64_t topk_output_length(const TopkParams& p) { return p.prefix + p.K + p.suffix; }

TopkPlan topk_plan_cpu(const TopkParams& params);
TopkPlan topk_plan_cuda(const TopkParams& params, const DeviceInfo& device);
Status topk_cpu(const TopkParams& params, const TopkPlan& plan, CpuLevel level, ParallelForFn threads);
Status topk_cuda(const TopkParams& params, const TopkPlan& plan, void* stream);

}  // namespace tokensieve

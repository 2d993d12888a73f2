// bipartite_match: every source token finds its most similar target; the r best pairs become a plan, from which every merge is a gather.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

enum class MatchOrder : int { kPosition = 0, kScore = 1 };  // of the sources that stay

// Tokens are named by their position in 0..N-1; -1 in a list names none. Strides count elements; 0 = one list for the whole batch.
struct MatchParams {
  const void* metric = nullptr;         // [B, H, N, D] dtype, last dimension contiguous; the mean over H is compared
  const int64_t* sources = nullptr;     // [B, S]; null = source_first, source_first + 2, ...
  const int64_t* targets = nullptr;     // [B, T]; null = target_first, target_first + 2, ...
  const int64_t* keep = nullptr;        // [B, P]; null = 0, 1, ..., P - 1
  const float* bias = nullptr;          // [B, S] contiguous, added to a source's similarity before ranking; may be null
  const uint8_t* candidates = nullptr;  // [B, N] bool, false = neither merges nor receives; may be null
  int64_t* source = nullptr;            // [B, r]: tokens that merge, best first; -1 = this slot merges nothing
  int64_t* destination = nullptr;       // [B, r]: the tokens that they merge into
  float* similarity = nullptr;          // [B, r]: cosine, without bias; 0 where nothing merges
  int64_t* index = nullptr;             // [B, M]: token of every output row: keep, sources that stay, targets
  int64_t* inverse = nullptr;           // [B, N]: output row of every token; -1 = dropped
  void* workspace = nullptr;            // plan.workspace_bytes, 64-byte aligned, contents undefined
  int32_t* semaphores = nullptr;        // CUDA only: plan.num_semaphores, zero on entry, left zero on exit
  int64_t B = 0, H = 1, N = 0, D = 0, S = 0, T = 0, P = 0, r = 0;
  int64_t metric_stride[3] = {};  // B, H, N
  int64_t sources_stride = 0, targets_stride = 0, keep_stride = 0, candidates_stride = 0;
  int64_t source_first = 0, target_first = 1;
  MatchOrder order = MatchOrder::kPosition;
  DType dtype = DType::kFloat32;

  constexpr int64_t rows() const { return P + S - r + T; }  // M
};

// similarity as cosine_match's (norms guarded, NaN last, ties to the first target in the list). Sources rank by similarity + bias, the
// highest first, ties by position in the list; NaN, then sources without an allowed target come last. One of those that has to go because
// r asks for it is dropped: inverse -1, and its slot says -1. A token in no list is dropped too.

struct MatchPlan {
  int64_t splits = 1;  // CUDA: blocks that share the targets of 64 sources
  bool fused = false;  // CUDA: the last block of an image ranks, so there is one launch
  int64_t workspace_bytes = 0;
  int64_t num_semaphores = 0;  // CUDA
  int threads = 0;             // CUDA: threads per block
  int64_t smem_bytes = 0;      // CUDA: dynamic shared memory per block
  int64_t bytes_moved = 0;
  int64_t flops = 0;
};

MatchPlan match_plan_cpu(const MatchParams& params);
MatchPlan match_plan_cuda(const MatchParams& params, const DeviceInfo& device);
Status match_cpu(const MatchParams& params, const MatchPlan& plan, CpuLevel level, ParallelForFn threads);
Status match_cuda(const MatchParams& params, const MatchPlan& plan, void* stream);

}  // namespace tokensieve

// select_diverse: greedy max-min selection. Each pick is the token farthest from all picks so far.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

enum class DiverseMetric : int { kCosine = 0, kEuclidean = 1 };  // 1 - cosine (norm 0: cosine 0), or the squared distance
enum class DiverseOrder : int { kPosition = 0, kPick = 1 };

// Strides count elements; the last dimension is contiguous.
struct DiverseParams {
  const void* x = nullptr;              // [B, N, C] dtype
  const uint8_t* candidates = nullptr;  // [B, N] bool, false = does not exist; may be null
  const int64_t* first = nullptr;       // [B] first pick; null, or no candidate (also -1): the candidate whose nearest other is farthest
  int64_t* index = nullptr;             // [B, K]; rows with fewer than K candidates end with -1
  void* workspace = nullptr;            // plan.workspace_bytes, 64-byte aligned, contents undefined
  int32_t* semaphores = nullptr;        // CUDA only: plan.num_semaphores, zero on entry, left zero on exit
  int64_t B = 0, N = 0, C = 0, K = 0;
  int64_t x_stride[2] = {};  // B, row
  int64_t candidates_stride = 0;
  DiverseMetric metric = DiverseMetric::kCosine;
  DiverseOrder order = DiverseOrder::kPosition;
  DType dtype = DType::kFloat32;
};

// Distances are float32, never negative and symmetric: d(i, j) is computed once per pair, in one fixed order, and is exactly 0 between rows
// of the same values (cosine = dot(i, j) / sqrt(dot(i, i) * dot(j, j)), the three dots summed alike). Ties go to the lowest index. A token is
// picked once: with fewer distinct points than K the rest are duplicates, lowest index first. A NaN row is at distance 0 from everything.
// A first outside [-1, N) is refused on the CPU; on CUDA it counts as -1.

struct DiversePlan {
  bool store_distances = true;  // the N x N matrix in the workspace; else one row recomputed per pick
  int64_t workspace_bytes = 0;
  int64_t num_semaphores = 0;  // CUDA
  int threads = 0;             // CUDA: threads per block of the picking kernel
  int blocks_per_image = 1;    // CUDA
  int64_t smem_bytes = 0;      // CUDA: dynamic shared memory per block
  int64_t bytes_moved = 0;
  int64_t flops = 0;
};

DiversePlan diverse_plan_cpu(const DiverseParams& params);
DiversePlan diverse_plan_cuda(const DiverseParams& params, const DeviceInfo& device);
Status diverse_cpu(const DiverseParams& params, const DiversePlan& plan, CpuLevel level, ParallelForFn threads);
Status diverse_cuda(const DiverseParams& params, const DiversePlan& plan, void* stream);

}  // namespace tokensieve

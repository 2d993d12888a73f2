// cosine_match and cosine_scores: similarity of every row of a to a set b, reduced on the fly; the M x N matrix is stored only on request.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

// kMatch: the T best (or worst) of every row, value and index. The others give one value a row; kNone gives N.
enum class CosineReduction : int { kMatch = 0, kNone = 1, kMean = 2, kSum = 3, kMax = 4 };

// Strides count elements; every last dimension is contiguous.
struct CosineParams {
  const void* a = nullptr;              // [B, M, C] dtype
  const void* b = nullptr;              // [B, N, C] dtype
  const int64_t* a_rows = nullptr;      // [B, M]: where a's rows stand in the tensor (-1: anywhere); null = 0, 1, ...; CPU
  const int64_t* b_rows = nullptr;      // [B, N]: the same for b
  const uint8_t* candidates = nullptr;  // [B, N] bool, false = not in the set; may be null
  float* value = nullptr;               // [B, M, T] for kMatch, [B, M, N] for kNone, else [B, M]
  int64_t* index = nullptr;             // [B, M, T], kMatch only; best first, -1 (value 0) where a row has fewer than T candidates
  void* workspace = nullptr;            // plan.workspace_bytes, 64-byte aligned, contents undefined
  int32_t* semaphores = nullptr;        // CUDA only: plan.num_semaphores, zero on entry, left zero on exit
  int64_t B = 0, M = 0, N = 0, C = 0;
  int64_t T = 1;                               // 1 .. kMaxNeighbours
  int64_t a_stride[2] = {}, b_stride[2] = {};  // B, row
  int64_t candidates_stride = 0;               // of a row
  int64_t a_rows_stride = 0, b_rows_stride = 0;
  bool exclude_self = false;  // a and b are the same tokens: column m is no candidate for row m
  bool largest = true;        // kMatch: highest similarity first; false: lowest first
  CosineReduction reduction = CosineReduction::kMatch;
  DType dtype = DType::kFloat32;
};

constexpr int64_t kMaxNeighbours = 32;

// similarity = (a . b) / (|a| |b|) in float32; 0 where either row has norm 0, so a zero row never gives NaN. NaN ranks below everything.
// Ties go to the lowest index. kMean, kSum, kMax run over the candidates; no candidate gives 0. kNone stores 0 where there is no candidate.
// kMax equals kMatch with T = 1: NaN only if nothing else is there. kMean and kSum use a_hat . (sum of unit rows of b): one pass over each
// input, no M x N products; exclude_self subtracts a_hat[m] . b_hat[m]. A NaN row among the candidates makes them NaN.

struct CosinePlan {
  int64_t tile_rows = 0, tile_columns = 0;
  int64_t splits = 1;  // CUDA: blocks that share the columns of one row tile
  int64_t workspace_bytes = 0;
  int64_t num_semaphores = 0;  // CUDA
  int threads = 0;             // CUDA: threads per block
  int64_t smem_bytes = 0;      // CUDA: dynamic shared memory per block
  int64_t bytes_moved = 0;
  int64_t flops = 0;
};

CosinePlan cosine_plan_cpu(const CosineParams& params);
CosinePlan cosine_plan_cuda(const CosineParams& params, const DeviceInfo& device);
Status cosine_cpu(const CosineParams& params, const CosinePlan& plan, CpuLevel level, ParallelForFn threads);
Status cosine_cuda(const CosineParams& params, const CosinePlan& plan, void* stream);

}  // namespace tokensieve

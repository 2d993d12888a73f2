// attention_pagerank: v <- v softmax(Q K^T) repeated, the map recomputed tile by tile and never stored.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

// Strides count elements; every last dimension is contiguous. Queries and keys are the same N tokens.
struct PagerankParams {
  const void* query = nullptr;    // [B, H, N, D] dtype
  const void* key = nullptr;      // [B, Hkv, N, D] dtype; query head h reads key head h / (H / Hkv)
  const uint8_t* mask = nullptr;  // [B, N] contiguous, false = no query sees this key; may be null
  const float* start = nullptr;   // [B, N] contiguous: first v of every head; 1 / N where null
  float* rank = nullptr;          // [B, H, N] contiguous
  void* workspace = nullptr;      // plan.workspace_bytes, 64-byte aligned, contents undefined
  int32_t* semaphores = nullptr;  // CUDA only: plan.num_semaphores, zero on entry, left zero on exit
  int64_t B = 0, H = 0, Hkv = 0, N = 0, D = 0;
  int64_t query_stride[3] = {};  // B, H, N
  int64_t key_stride[3] = {};    // B, Hkv, N
  int64_t mask_stride = 0;       // of a row of mask
  float scale = 1.0f;            // includes 1 / temperature
  bool causal = false;           // row l sees keys <= l
  int64_t iterations = 5;        // 0 gives start
  DType dtype = DType::kFloat32;
};

// rank'[n] = sum_l rank[l] p[l, n], p[l, n] = exp(scale*q_l.k_n - lse_l) where visible, else 0. A row that sees nothing spreads nothing.
// Masked tokens still spread their own mass as query rows (AIM's ghost rows). Fixed summation order; a NaN logit makes its row NaN.

struct PagerankPlan {
  int64_t tile_rows = 0, tile_keys = 0;
  int64_t workspace_bytes = 0;  // row lse, two vectors, partial sums
  int64_t num_semaphores = 0;   // CUDA
  int threads = 0;              // CUDA: threads per block
  int64_t smem_bytes = 0;       // CUDA: dynamic shared memory per block
  int64_t row_splits = 1;       // CUDA: blocks that share the keys of a tile of rows
  int64_t col_splits = 1;       // CUDA: blocks that share the rows of a tile of keys
  bool wgmma = false;           // CUDA: as ScorePlan's
  int64_t bytes_moved = 0;
  int64_t flops = 0;
};

PagerankPlan pagerank_plan_cpu(const PagerankParams& params);
PagerankPlan pagerank_plan_cuda(const PagerankParams& params, const DeviceInfo& device);
Status pagerank_cpu(const PagerankParams& params, const PagerankPlan& plan, CpuLevel level, ParallelForFn threads);
Status pagerank_cuda(const PagerankParams& params, const PagerankPlan& plan, void* stream);

}  // namespace tokensieve

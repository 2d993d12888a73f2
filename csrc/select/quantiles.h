// score_quantiles: quantiles of the scores of every row, exact order statistics with linear interpolation.
#pragma once

#include <cstdint>

#include "select/topk.h"

namespace tokensieve {

constexpr int kMaxQuantiles = 16;

// Of the n candidates of a row, sorted ascending as x_0 .. x_(n-1): r = q * (n - 1) rounded to float32, as torch.quantile does;
// x_floor(r) + (r - floor(r)) * (x_(floor(r) + 1) - x_floor(r)), rounded once. NaN where a candidate is NaN or there is none, and between
// -inf and +inf. -0.0 counts as +0.0.
struct QuantilesParams {
  TopkParams rows;  // scores, candidates, B, N, strides and dtype; the rest is unused
  float q[kMaxQuantiles] = {};
  int Q = 0;
  float* out = nullptr;       // [B, Q] contiguous
  void* workspace = nullptr;  // plan.workspace_bytes
};

struct QuantilesPlan {
  TopkPlan rows;  // CUDA: threads, items, shared memory of a block, which serves one quantile of one row
  int64_t workspace_bytes = 0;
};

QuantilesPlan quantiles_plan_cpu(const QuantilesParams& params);
QuantilesPlan quantiles_plan_cuda(const QuantilesParams& params, const DeviceInfo& device);
Status quantiles_cpu(const QuantilesParams& params, const QuantilesPlan& plan, CpuLevel level, ParallelForFn threads);
Status quantiles_cuda(const QuantilesParams& params, const QuantilesPlan& plan, void* stream);

}  // namespace tokensieve

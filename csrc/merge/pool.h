// Pooling of tokens on a grid, of runs in a packed sequence, and over rows and columns at once; their gradients.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

enum class PoolKind : int {
  kMean = 0,
  kMax = 1,       // a NaN is the largest; its gradient goes to the first token, in raster order, that equals it
  kBilinear = 2,  // two taps an axis, corners not aligned, no anti-aliasing: F.interpolate
  kSoftmax = 3,   // weights softmax(scores / temperature) over the tokens of a window
  kStack = 4,     // the tokens of a window one after the other: windows of `count` tokens become rows of count * C
};

// One axis of the grid: which tokens an output position covers. The formulas are in pool_args.h.
template <typename Int>
struct PoolAxisOf {
  using Number = Int;
  Int in = 1, out = 1;
  Int span = 1, step = 1;  // windows: tokens of a window and between two; adaptive: tokens of a part and outputs of a part
};
using PoolAxis = PoolAxisOf<int64_t>;

// Tokens are in raster order, the last axis fastest: N = axes[0].in * axes[1].in * axes[2].in, R likewise of the outputs.
struct PoolParams {
  const void* x = nullptr;             // [B, N, C] strided, channels contiguous; gradient: only of kMax and kSoftmax
  void* out = nullptr;                 // [B, R, C * stacked] contiguous; gradient of kMax and kSoftmax: the forward result, read
  const float* scores = nullptr;       // [B, N] contiguous, kSoftmax only
  const void* grad = nullptr;          // gradient only: the incoming one, [B, R, C * stacked] contiguous
  void* x_grad = nullptr;              // gradient only: [B, N, C] contiguous; may be null
  float* scores_grad = nullptr;        // gradient of kSoftmax only: [B, N] contiguous; may be null
  int64_t stride_b = 0, stride_n = 0;  // elements, of x
  int64_t B = 0, C = 0;
  PoolAxis axes[3];  // time, rows, columns
  float temperature = 1.0f;
  PoolKind kind = PoolKind::kMean;
  bool adaptive = false;          // how span and step are read; not for kBilinear
  DType dtype = DType::kFloat32;  // of x, out and their gradients
  void* workspace = nullptr;      // plan.workspace_bytes
};

// A packed sequence: `images` runs of `length` tokens each, of which every `stride` neighbours become their mean (the rest behind the last
// whole mean is dropped); all other tokens are copied. R = S - images * (length - length / stride).
struct RunsParams {
  const void* x = nullptr;             // [B, S, C] strided, channels contiguous; forward only
  void* out = nullptr;                 // [B, R, C] contiguous; forward only
  const int64_t* starts = nullptr;     // [B, images] first token of each run, ascending, no overlap; checked on the CPU only
  const void* grad = nullptr;          // [B, R, C] contiguous; gradient only
  void* x_grad = nullptr;              // [B, S, C] contiguous; gradient only
  int64_t stride_b = 0, stride_n = 0;  // elements, of x
  int64_t starts_stride = 0;           // of a batch row
  int64_t B = 0, S = 0, C = 0, images = 0, length = 0, stride = 1;
  DType dtype = DType::kFloat32;
  void* workspace = nullptr;  // plan.workspace_bytes
};

// Means over the tokens of each frame and over the frames of each token, in one pass over x.
struct MeansParams {
  const void* x = nullptr;                                   // [B, T, N, C] strided, channels contiguous; forward only
  void *rows = nullptr, *columns = nullptr;                  // [B, T, C], [B, N, C] contiguous; forward only
  const void *rows_grad = nullptr, *columns_grad = nullptr;  // the same shapes; gradient only; either may be null (= 0)
  void* x_grad = nullptr;                                    // [B, T, N, C] contiguous; gradient only
  int64_t stride_b = 0, stride_t = 0, stride_n = 0;          // elements, of x
  int64_t B = 0, T = 0, N = 0, C = 0;
  DType dtype = DType::kFloat32;
  void* workspace = nullptr;  // plan.workspace_bytes
};

struct PoolPlan {
  int64_t workspace_bytes = 0;
  int64_t bytes_moved = 0;
  int vector = 1;  // CUDA: elements of a load
  int threads = 0, rows_per_block = 0;
  int64_t blocks = 0;
  int splits = 1;  // CUDA: parts of the tokens (or frames) that are summed apart, in a fixed order
};

PoolPlan pool_plan_cpu(const PoolParams& params);
PoolPlan pool_grad_plan_cpu(const PoolParams& params);
PoolPlan runs_plan_cpu(const RunsParams& params);
PoolPlan means_plan_cpu(const MeansParams& params);
Status pool_cpu(const PoolParams& params, const PoolPlan& plan, CpuLevel level, ParallelForFn threads);
Status pool_grad_cpu(const PoolParams& params, const PoolPlan& plan, CpuLevel level, ParallelForFn threads);
Status runs_cpu(const RunsParams& params, const PoolPlan& plan, CpuLevel level, ParallelForFn threads);
Status runs_grad_cpu(const RunsParams& params, const PoolPlan& plan, CpuLevel level, ParallelForFn threads);
Status means_cpu(const MeansParams& params, const PoolPlan& plan, CpuLevel level, ParallelForFn threads);
Status means_grad_cpu(const MeansParams& params, const PoolPlan& plan, CpuLevel level, ParallelForFn threads);

PoolPlan pool_plan_cuda(const PoolParams& params, const DeviceInfo& device);
PoolPlan pool_grad_plan_cuda(const PoolParams& params, const DeviceInfo& device);
PoolPlan runs_plan_cuda(const RunsParams& params, const DeviceInfo& device);
PoolPlan runs_grad_plan_cuda(const RunsParams& params, const DeviceInfo& device);
PoolPlan means_plan_cuda(const MeansParams& params, const DeviceInfo& device);
PoolPlan means_grad_plan_cuda(const MeansParams& params, const DeviceInfo& device);
Status pool_cuda(const PoolParams& params, const PoolPlan& plan, void* stream);
Status pool_grad_cuda(const PoolParams& params, const PoolPlan& plan, void* stream);
Status runs_cuda(const RunsParams& params, const PoolPlan& plan, void* stream);
Status runs_grad_cuda(const RunsParams& params, const PoolPlan& plan, void* stream);
Status means_cuda(const MeansParams& params, const PoolPlan& plan, void* stream);
Status means_grad_cuda(const MeansParams& params, const PoolPlan& plan, void* stream);

}  // namespace tokensieve

// scatter_tokens: the inverse of gather_tokens. Copies of base tensors in which the rows that an index names are replaced by values, or
// have (weighted) values added; and the gradient of the weighted addition.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

constexpr int kMaxScatterTensors = 8;  // per launch; the caller splits longer lists

// One base tensor and its values. A token is M segments of W contiguous bytes on both sides.
struct ScatterTensor {
  const void* base = nullptr;   // [B, N, M, W] strided; of the gradient: the incoming one, contiguous
  const void* value = nullptr;  // [B, K, M, W] strided
  void* dst = nullptr;          // [B, N, M, W] contiguous; of the gradient: that of the values, [B, K, M, W] contiguous, or null
  int64_t base_b = 0, base_n = 0, base_m = 0;  // strides in bytes
  int64_t value_b = 0, value_n = 0, value_m = 0;
  int64_t segments = 1;           // M
  int64_t segment_bytes = 0;      // W
  DType dtype = DType::kFloat32;  // of an addition
};

struct ScatterParams {
  ScatterTensor tensors[kMaxScatterTensors];
  int num_tensors = 0;
  const int64_t* index = nullptr;  // [B, K]; -1 = this value is not used. Tokens of a row are unique (undefined otherwise)
  const float* weights = nullptr;  // [B, K] contiguous, of an addition; may be null
  float* weight_grad = nullptr;    // [B, K], gradient only: sum over the tensors' channels of value * incoming gradient; may be null
  int64_t index_stride = 0;        // of a batch row; 0 = one list for all
  int64_t B = 0, N = 0, K = 0;
  bool add = false;                 // dst row = base row + weight * value row, one rounding in float32 and one to dtype
  bool add_to_weight_grad = false;  // a later launch of a list of more than 8 tensors
};

struct ScatterPlan {
  int threads = 0;
  int blocks_per_row = 0;  // CUDA: blocks that share one batch row's copies
  int64_t bytes_moved = 0;
};

ScatterPlan scatter_plan_cuda(const ScatterParams& params, const DeviceInfo& device);
Status scatter_cpu(const ScatterParams& params, CpuLevel level, ParallelForFn threads);
Status scatter_cuda(const ScatterParams& params, const ScatterPlan& plan, void* stream);
// Of dst = base + weight * value: dst (here) = weight * base[index], weight_grad = sum of value * base[index]; -1 gives zeros.
Status scatter_grad_cpu(const ScatterParams& params, CpuLevel level, ParallelForFn threads);
Status scatter_grad_cuda(const ScatterParams& params, void* stream);

}  // namespace tokensieve

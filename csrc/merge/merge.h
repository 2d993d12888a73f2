// merge_tokens, merge_by_label, fuse_dropped: one reduction of token rows by output row, as a gather over the output rows; its gradient.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

constexpr int kMaxMergeTensors = 8;  // per launch; the caller splits longer lists

enum class MergeMode : int { kSum = 0, kMean = 1, kWeighted = 2, kAmax = 3, kMlerp = 4 };
enum class MergeType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt64 };  // the integers: sum without weights, and amax

constexpr int64_t merge_type_bytes(MergeType t) {
  return t == MergeType::kInt64 ? 8 : t == MergeType::kFloat32 || t == MergeType::kInt32 ? 4 : 2;
}

// One tensor. A token is M segments of W contiguous bytes.
struct MergeTensor {
  const void* src = nullptr;                         // [B, N, M, W] strided
  void* dst = nullptr;                               // [B, R, M, W] contiguous; of the gradient: that of src, [B, N, M, W], or null
  const void* grad = nullptr;                        // gradient only: the incoming one, [B, R, M, W] contiguous
  const void* out = nullptr;                         // gradient of amax and to weights: the forward result, [B, R, M, W] contiguous
  int64_t stride_b = 0, stride_n = 0, stride_m = 0;  // bytes, of src
  int64_t segments = 1, segment_bytes = 0;           // M, W
  MergeType type = MergeType::kFloat32;
};

struct MergeParams {
  MergeTensor tensors[kMaxMergeTensors];
  int num_tensors = 0;
  const int64_t* inverse = nullptr;   // [B, N] output row of a token, -1 = none; with `complement` [B, K] tokens that row 0 leaves out
  const int64_t* from = nullptr;      // [B, N] which of the `rows` tokens of src entry n is, -1 = skipped; null = n itself
  const int64_t* own = nullptr;       // [B, R] the token that comes first in an output row, -1 = none; may be null
  const float* weights = nullptr;     // [B, N] contiguous factors of the tokens; null = ones. kMean divides by their sum
  const float* size = nullptr;        // [B, N] contiguous, summed into total; null = ones
  float* total = nullptr;             // [B, R] sum of size; may be null
  float* log_total = nullptr;         // [B, R] log(total), -inf where total <= 0; may be null
  const float* total_grad = nullptr;  // [B, R] contiguous, gradient only; may be null
  float* weight_grad = nullptr;       // [B, N], gradient of one tensor only; may be null
  int64_t inverse_stride = 0, own_stride = 0, from_stride = 0;  // of a batch row
  int64_t B = 0, N = 0, R = 0, K = 0, rows = 0;                 // K of `complement` only, rows of `from` only
  float epsilon = 0.0f;                                         // kMean: added to the divisor; a divisor of 0 gives 0
  MergeMode mode = MergeMode::kSum;
  bool complement = false;
  void* workspace = nullptr;  // plan.workspace_bytes
};

// kWeighted = kMean whose rows of one token are copies, whatever the weight.
struct MergePlan {
  int64_t workspace_bytes = 0;
  int64_t bytes_moved = 0;
  int blocks_per_row = 0;  // CUDA: blocks that share the output rows (gradient: also the tokens) of one batch row
  int column_blocks = 0;   // CUDA: > 0: few long rows, a block takes one of them and so many share its columns
};

MergePlan merge_plan_cpu(const MergeParams& params);
Status merge_cpu(const MergeParams& params, const MergePlan& plan, CpuLevel level, ParallelForFn threads);
// dst = gradient of every token (0 where its row is -1), weight_grad = that of its weight.
Status merge_grad_cpu(const MergeParams& params, const MergePlan& plan, CpuLevel level, ParallelForFn threads);

MergePlan merge_plan_cuda(const MergeParams& params, const DeviceInfo& device);
Status merge_cuda(const MergeParams& params, const MergePlan& plan, void* stream);
MergePlan merge_grad_plan_cuda(const MergeParams& params, const DeviceInfo& device);
Status merge_grad_cuda(const MergeParams& params, const MergePlan& plan, void* stream);

}  // namespace tokensieve

// attention_scores: softmax(Q K^T) mass per key, of few query rows or of all, without ever storing the L x N map.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2, kMax = 3, kVisibleMean = 4 };  // the last one: over rows only
enum class Normalize : int { kRow = 0, kRange = 1 };
enum class Activation : int { kSoftmax = 0, kLogit = 1, kSigmoid = 2 };

// Strides count elements; every last dimension is contiguous. R = range_end - range_begin.
struct ScoreParams {
  const void* query = nullptr;               // [B, H, L, D] dtype
  const void* key = nullptr;                 // [B, Hkv, N, D] dtype; query head h reads key head h / (H / Hkv)
  const void* bias = nullptr;                // broadcast to [B, H, L, N]; float kinds are added, kBool true = visible; may be null
  const float* lse_in = nullptr;             // [B, H, L] contiguous: given row normaliser (natural log); may be null
  const float* row_weights = nullptr;        // [B, L] contiguous, for query_reduction mean/sum/visible mean; may be null
  const int64_t* query_positions = nullptr;  // [B, L] contiguous: last visible key of a row, -1 = unused row; may be null
  const float* head_weights = nullptr;       // [B, H] contiguous, for head_reduction mean/sum; may be null
  const float* accumulate = nullptr;         // shape of scores, contiguous: scores = accumulate + result; may be null
  float* scores = nullptr;                   // [B, H or 1, L or 1, R] contiguous; a 1 where that axis is reduced
  float* lse_out = nullptr;                  // [B, H, L] contiguous; -inf for a row that sees nothing; may be null
  void* workspace = nullptr;                 // plan.workspace_bytes, 64-byte aligned, contents undefined
  int32_t* semaphores = nullptr;             // CUDA only: plan.num_semaphores, zero on entry, left zero on exit
  int64_t B = 0, H = 0, Hkv = 0, L = 0, N = 0, D = 0;
  int64_t query_stride[3] = {};            // B, H, L
  int64_t key_stride[3] = {};              // B, Hkv, N
  int64_t bias_stride[4] = {};             // B, H, L, N (0 where broadcast; N stride 0 or 1)
  int64_t range_begin = 0, range_end = 0;  // keys that are scored
  float scale = 1.0f;
  bool causal = false;                           // row l sees keys <= N - L + l; with query_positions, keys <= query_positions[b, l]
  Normalize normalize = Normalize::kRow;         // softmax over all visible keys, or over the visible keys of the range
  Activation activation = Activation::kSoftmax;  // kLogit, kSigmoid: of scale*q.k + bias, no softmax
  Reduction query_reduction = Reduction::kMean;  // rows first ...
  Reduction head_reduction = Reduction::kMean;   // ... then heads
  DType dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
};

// Semantics, both back ends. p[b,h,l,n] = exp(scale*q.k + bias - lse[b,h,l]); 0 where not visible; a row that sees nothing is 0.
// "mean" over rows divides by the sum of row_weights (given) or by the number of used rows (query_positions >= 0; L without positions);
// a zero divisor gives 0. "sum" with row_weights is sum_l w_l p. "max" ignores unused rows; 0 when none is used.
// "visible mean" over rows divides each key's sum by the number of used rows that see that key (with row_weights: by their sum), 0 / 0 = 0.
// A row sees a key that causal, query_positions, a bool bias and a float bias of -inf all leave it.
// "mean" over heads with head_weights divides by their sum (0 gives 0), "sum" is sum_h w_h. A head of weight 0 counts for nothing, even NaN.
// kLogit, kSigmoid: p = f(scale*q.k + bias), 0 where not visible (a logit of -inf counts as such); "max" over rows ignores what is not
// visible and gives 0 when no row sees the key. Heads take those zeros as values. lse_in must be null; lse_out is still written, and
// `normalize` only says which keys it covers. A NaN logit is its own key's affair.
// Softmax: a NaN logit makes its whole row NaN. +inf logits are not special-cased (exp(inf - inf) = NaN, as in torch).

enum class ScoreAlgo : int { kCpuChunks, kCluster, kSplit, kTwoPass, kStrip, kCpuStrip };  // the last three: all query rows

struct ScorePlan {
  ScoreAlgo algo = ScoreAlgo::kCpuChunks;
  int64_t chunk_keys = 0;  // keys per work item
  int64_t num_chunks = 0;
  int64_t rows_per_pass = 0;  // query rows (of one key head's group) that share one pass over the keys
  int64_t workspace_bytes = 0;
  int64_t num_semaphores = 0;  // CUDA
  int threads = 0;             // CUDA: threads per block
  int64_t smem_bytes = 0;      // CUDA: dynamic shared memory per block
  int64_t row_splits = 1;      // kTwoPass: blocks that share the keys of a tile of query rows (normalisers)
  int64_t col_splits = 1;      // kTwoPass, kStrip: blocks that share the query rows of a tile of keys (scores)
  bool wgmma = false;          // kTwoPass: on the warpgroup tensor cores of sm_90a where rows are 16-byte aligned
  int64_t bytes_moved = 0;     // predicted compulsory traffic
  int64_t flops = 0;
};

ScorePlan score_plan_cpu(const ScoreParams& params);
ScorePlan score_plan_cuda(const ScoreParams& params, const DeviceInfo& device);
Status score_cpu(const ScoreParams& params, const ScorePlan& plan, CpuLevel level, ParallelForFn threads);
Status score_cuda(const ScoreParams& params, const ScorePlan& plan, void* stream);

}  // namespace tokensieve

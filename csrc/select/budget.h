// allocate_budget: how many tokens each part of a row (crop, frame, region) may keep, from the weights of the parts.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

// s_p is the share of part p and n_p its budget; every step is rounded in the dtype of the weights, sums run from the first part on.
//   kProportional  s_p = w_p / sum w                                      n_p = min(trunc(s_p * total), cap_p)
//   kSoftmax       e_p = exp((w_p - max w) / temperature), s_p = e_p / (sum e + epsilon), n_p as above
//   kCapped        s_p = w_p / sum w; shares above c_p = cap_p / total become c_p, and what they lose (X) goes once, part by part, to the
//                  others: s_p += s_p / S * X with S = the sum after the cut; what then exceeds c_p is cut and added to X for the parts
//                  that follow (QuoTA). n_p = min(trunc(total * s_p), cap_p)
//   kAdjusted      softmax shares t_p, s_p = min(1, ratio * (1 + t_p - mean t)), n_p = min(trunc(cap_p * s_p), cap_p) (GlobalCom2)
enum class BudgetMode : int { kProportional = 0, kSoftmax = 1, kCapped = 2, kAdjusted = 3 };
// kLargest: what is left of min(total, sum of the caps) goes out one token at a time, round after round, to the parts below their cap, by
// falling fraction of s_p * total (ties: the lower part).
enum class BudgetRemainder : int { kDrop = 0, kLargest = 1 };

constexpr int64_t kMaxBudgetParts = 4096;  // two shares of 8 bytes a part in shared memory: 64 KB

// Not a number, negative or of a row whose sum is 0: such a share gives 0 tokens.
struct BudgetParams {
  const void* weights = nullptr;        // [B, P] contiguous float32, or float64 if wide
  const int64_t* total_rows = nullptr;  // [B]; null: total for every row
  const int64_t* cap_parts = nullptr;   // [B, P] contiguous; null: cap for every part
  int64_t* budget = nullptr;            // [B, P] contiguous
  void* shares = nullptr;               // [B, P] contiguous, dtype of weights: s_p
  int64_t B = 0, P = 0;
  int64_t total = 0;
  int64_t cap = -1;  // negative: none, which means total
  double ratio = 1.0, temperature = 1.0, epsilon = 0.0;
  BudgetMode mode = BudgetMode::kProportional;
  BudgetRemainder remainder = BudgetRemainder::kDrop;
  bool wide = false;
};

struct BudgetPlan {
  int threads = 0;
  int64_t smem_bytes = 0;
  int64_t bytes_moved = 0;
};

BudgetPlan budget_plan_cuda(const BudgetParams& params, const DeviceInfo& device);
Status budget_cpu(const BudgetParams& params, CpuLevel level, ParallelForFn threads);
Status budget_cuda(const BudgetParams& params, const BudgetPlan& plan, void* stream);

}  // namespace tokensieve

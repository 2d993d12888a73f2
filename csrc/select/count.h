// How many tokens of a row a rule keeps: the first half of select_mass and select_threshold (select_topk with these counts is the second).
#pragma once

#include <cstdint>

#include "select/topk.h"

namespace tokensieve {

// kReach: the shortest prefix of the descending order whose mass is at least share * total. kBelow: the longest whose mass is at most that.
// kAbove, kFrom: scores > tau, scores >= tau.
enum class CountRule : int { kReach = 0, kBelow = 1, kAbove = 2, kFrom = 3 };

struct CountParams {
  TopkParams rows;                // scores, candidates, always_keep, B, N, strides and dtype; the rest is unused
  const float* levels = nullptr;  // [B] contiguous: share in (0, 1], or tau, of each row; `level` where null
  double level = 1.0;
  int64_t min_k = 0, max_k = 0;  // limits of a count, after `extra` was added and before the row's tokens limit it
  int64_t extra = 0;             // kept beyond the rule
  int64_t capacity = 0;
  int64_t* counts = nullptr;  // [B] tokens that the rule keeps
  int64_t* take = nullptr;    // [B] min(counts, capacity)
  bool* overflow = nullptr;   // [B] counts > capacity
  void* workspace = nullptr;  // plan.workspace_bytes
  CountRule rule = CountRule::kReach;
};

// Mass of a token: its score where that is positive, else (NaN too) 0; where a row holds +inf, only its infinities have mass, 1 each.
// Masses are integers: the score over 2^(exponent of the row's largest score), cut off below 2^-40 (2^(log2 N - 62) for N > 4 million), so
// sums are exact, in any order, on every back end, and a prefix is off by at most N such quanta. share * total is not rounded.
// always_keep tokens come first and always count; tokens that are neither candidates nor always kept do not exist. Ties go to the lowest
// index by select_topk. share NaN or <= 0 keeps nothing by kReach; tau NaN keeps only what is always kept.

constexpr int64_t kCountGroups = 64;  // CPU: rows b, b + groups, ... share one scratch area

struct CountPlan {
  TopkPlan rows;  // CUDA: threads, items, shared memory
  int64_t workspace_bytes = 0;
};

CountPlan count_plan_cpu(const CountParams& params);
CountPlan count_plan_cuda(const CountParams& params, const DeviceInfo& device);
Status count_cpu(const CountParams& params, const CountPlan& plan, CpuLevel level, ParallelForFn threads);
Status count_cuda(const CountParams& params, const CountPlan& plan, void* stream);

}  // namespace tokensieve

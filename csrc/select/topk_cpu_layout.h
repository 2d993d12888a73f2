// Scratch of topk_cpu; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include "select/topk.h"

namespace tokensieve {

constexpr int64_t kTopkGroups = 64;  // rows b, b + groups, ... share one scratch area, so scratch does not grow with B

struct TopkLayout {
  int64_t groups = 0;
  int64_t padded = 0;  // N, a multiple of 16, plus 16 that wide stores may spill into
  int64_t sorted = 0;  // K when the order is by score
  int64_t ints = 0;    // per group: keys[padded], candidates[padded], and (key, position) twice [sorted]
};

static inline TopkLayout topk_layout(const TopkParams& p) {
  TopkLayout at;
  at.groups = p.B < kTopkGroups ? p.B : kTopkGroups;
  at.padded = (p.N + 15) / 16 * 16 + 16;
  at.sorted = p.order == TopkOrder::kScore ? (p.K < p.N ? p.K : p.N) : 0;
  at.ints = (2 * at.padded + 4 * at.sorted + 15) / 16 * 16;
  return at;
}

}  // namespace tokensieve

// The check of an index that CPU kernels follow without a branch. Static functions: every object file has its own copy.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace tokensieve {

// B rows of K positions in [-1, N); stride 0: one row for the whole batch.
static inline Status check_positions(const int64_t* index, int64_t stride, int64_t B, int64_t K, int64_t N) {
  for (int64_t b = 0; b < (stride != 0 ? B : B > 0 ? 1 : 0); ++b) {
    int64_t bad = 0;
    for (int64_t i = 0; i < K; ++i) bad += index[b * stride + i] < -1 || index[b * stride + i] >= N ? 1 : 0;
    if (bad != 0) return Status::error("every index must be in [-1, N)");
  }
  return Status::success();
}

}  // namespace tokensieve

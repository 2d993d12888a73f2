// Arithmetic of a quantile that both back ends share. Static: an inline function would be one copy for all instruction levels.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/order.h"
#include "select/quantiles.h"

namespace tokensieve {
namespace select {

struct QuantileRank {
  int64_t below = 0;    // the order statistic at or below the quantile, ascending from 0
  float weight = 0.0f;  // of the next one, in [0, 1)
};

TS_HOST_DEVICE static inline QuantileRank quantile_rank(float q, int64_t n) {
  // Exact in double, rounded by the conversion: nvcc would fuse a float product into the subtraction below.
  const float rank = static_cast<float>(static_cast<double>(q) * static_cast<double>(static_cast<float>(n - 1)));
  QuantileRank out;
  out.below = static_cast<int64_t>(rank);
  out.below = out.below < n - 1 ? out.below : n - 1;  // n - 1 above 2^24 may round up
  out.weight = out.below < n - 1 ? rank - static_cast<float>(out.below) : 0.0f;
  return out;
}

// low <= high, neither NaN. In double, so that the difference cannot overflow; one rounding to float32 at the end.
TS_HOST_DEVICE static inline float quantile_between(float low, float high, float weight) {
  constexpr float kInf = __builtin_huge_valf();
  if (weight == 0.0f || low == high) return low;
  if (low == -kInf) return high == kInf ? __builtin_nanf("") : low;
  const double a = static_cast<double>(low), b = static_cast<double>(high);
  return static_cast<float>(fma(static_cast<double>(weight), b - a, a));
}

}  // namespace select
}  // namespace tokensieve

// Arithmetic of select_samples that both back ends share, so that they pick the same tokens. Static: see mass.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/order.h"
#include "select/samples.h"

namespace tokensieve {
namespace select {

TS_HOST_DEVICE static inline float cdf_value(uint64_t above_first, uint64_t range) {
  return static_cast<float>(static_cast<double>(above_first) / static_cast<double>(range));
}

TS_HOST_DEVICE static inline float sample_point(const SamplesParams& p, int64_t b, int64_t t, float start) {
  if (p.points != nullptr) return p.points[b * p.R + t];
  if (p.R == 1) return start;
  const double s = static_cast<double>(start), share = static_cast<double>(t) / static_cast<double>(p.R - 1);
  return static_cast<float>(fma(1.0 - s, share, s));
}

// First j in [0, n) with the least |y - f(j)| in float32; f ascends and n > 0. -1 for a NaN. Two binary searches: rounding keeps the
// distances on either side of y in order, so those that equal the least one are neighbours.
template <typename F>
TS_HOST_DEVICE static inline int64_t nearest(const F& f, int64_t n, float y) {
  if (y != y) return -1;
  int64_t low = 0, high = n;  // first j with f(j) >= y
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (f(middle) >= y) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (low == 0) return 0;
  const float left = y - f(low - 1);
  if (low < n && f(low) - y < left) return low;
  high = low - 1;
  low = 0;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (y - f(middle) <= left) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace select
}  // namespace tokensieve

// Tokens less their image's mean row, packed into panels, and the squared distances of blocks of them: what density_cpu and nearest_cpu have
// in common. Without the mean, tokens that share a large part would lose their differences to rounding.
#pragma once

#include "core/simd.h"
#include "similarity/dot_tile_cpu.h"

TS_ISA_BEGIN

namespace centered {

// mean[d] = sum of the finite x[n, d] / N for d in [begin, end). One chain over n in every lane.
template <typename T>
static void mean_rows(const T* x, int64_t row_stride, int64_t N, int64_t begin, int64_t end, float* mean) {
  const Vec share = splat(1.0f / static_cast<float>(N));
  for (int64_t d = begin; d < end; d += 4 * kLanes) {  // four chains at once: rows are read in pieces of 256 bytes
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    for (int64_t n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = d + i * kLanes;
        if (at >= end) break;
        const Vec value = at + kLanes <= end ? load(x + n * row_stride + at) : load_n(x + n * row_stride + at, end - at);
        const Vec zeroed = sub(value, value);  // NaN where it is not finite
        sum[i] = add(sum[i], where_nan(zeroed, zero(), value));
      }
    }
    for (int i = 0; i < 4 && d + i * kLanes < end; ++i) store_n(mean + d + i * kLanes, mul(sum[i], share), end - d - i * kLanes);
  }
}

// Packs up to 16 rows less the mean; lane j of the result: row j . row j, summed as the products are.
template <typename T>
static Vec pack(const T* const* row, const float* mean, int64_t C, float* to) {
  dots::pack_panel(row, C, to);
  Vec squares = zero();
  for (int64_t d = 0; d < C; d += dots::kDims) {
    Vec part = zero();
    for (int64_t i = d; i < smaller(d + dots::kDims, C); ++i) {
      const Vec x = sub(load(to + i * kLanes), splat(mean[i]));
      part = fma(x, x, part);
      store(to + i * kLanes, x);
    }
    squares = add(squares, part);
  }
  return squares;
}

// Never negative; infinite where a token is not finite. Rows of the same values have a == b == dot: exactly 0.
TS_INLINE Vec squared_distance(Vec dot, Vec a, Vec b) {
  const Vec d = sub(add(a, b), add(dot, dot));
  return where_nan(d, splat(kInfinity), max(d, zero()));
}

// By how much of a + b it may be off: a sum of C products by 128 + C / 128 roundings of 2^-24 (dot_tile_cpu.h), a + b and two dots by as much
// each, a few more for the mean's subtraction.
TS_INLINE float doubt(int64_t C) { return static_cast<float>(136 + C / 128) * 0x1p-23f; }

}  // namespace centered

TS_ISA_END

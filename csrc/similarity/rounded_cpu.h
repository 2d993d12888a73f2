// Rows of norm 1 as int16, and how far products of two such rows may be off: what cosine_cpu and diverse_cpu decide with first.
//
// Rows are rounded to n / 32767. With rounding errors of norm e and f, a product of two rounded rows is off by at most
// |a||f| + |e||b| + |e||f| (Cauchy-Schwarz), about 6e-4 at C = 1152; random rows are off by 1e-5.
// No overflow: a sum of int16 products, and every part of it, is at most the product of two norms, (1.01 * 32767 + sqrt(C) / 2)^2 < 1.1e9
// for C <= 16384.
#pragma once

#include "core/simd_int.h"
#include "similarity/panels_cpu.h"

TS_ISA_BEGIN

namespace rounded {

constexpr float kScale = 32767.0f;
constexpr int64_t kMostChannels = 16384;

// Items (two channels) of a panel.
TS_INLINE int64_t panel_items(int64_t C) { return dot_panel_floats(C) / 2; }

// Rounds a panel times `factor`, two channels an item. Returns the norm of the errors of every row, infinite where the row's is not 1 or 0.
[[maybe_unused]] static Vec round_panel(const float* panel, int64_t C, Vec factor, int32_t* to) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the integer
  Vec squares = zero(), errors = zero();
  for (int64_t d = 0; d < dot_round_up(C, 16); d += 2, to += kLanes) {  // panels are filled up with zeros
    Vec biased[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec x = mul(load(panel + (d + i) * kLanes), factor);
      biased[i] = fma(min(max(x, splat(-1.0f)), splat(1.0f)), splat(kScale), magic);
      const Vec error = fma(x, splat(kScale), sub(magic, biased[i]));
      squares = fma(x, x, squares);
      errors = fma(error, error, errors);
    }
    store(to, pack_pairs(biased[0], biased[1]));
  }
  const Mask one = greater(squares, splat(0.99f)) & greater(splat(1.01f), squares);
  const Mask none = ~greater(squares, zero()) & ~is_nan(squares);
  return select(one | none, mul(sqrt(errors), splat(1.0f / kScale)), splat(kInfinity));
}

// |product of rounded rows - product that dot_tile_cpu.h adds up|; e and f: norms of their errors.
TS_INLINE double largest_difference(double e, double f, int64_t C) {
  // The float product is off too: chains of 128 additions and C / 128 more, of terms whose sum is at most 1, and the scaling to norm 1.
  const double steps = static_cast<double>(C) / 128.0 + 136.0, rounding = steps / (1 << 23);
  return 1.02 * (e + f) + e * f + rounding;
}

}  // namespace rounded

TS_ISA_END

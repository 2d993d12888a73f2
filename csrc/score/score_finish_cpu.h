// The last step of both kernels of score_cpu: row sums of 64 keys -> mean, heads reduced, scores written.
#pragma once

#include "score/score_row_cpu.h"

TS_ISA_BEGIN

// Sum of the weights of the rows that see each of `count` <= 16 * vecs keys: what "visible mean" divides by.
static void visible_weight(const ScoreParams& p, int64_t b, int64_t h, int64_t key, int64_t count, int vecs, Vec* out) {
  for (int v = 0; v < vecs; ++v) out[v] = zero();
  for (int64_t l = 0; l < p.L; ++l) {
    const int64_t end = smaller(visible_keys(p, b, l) - key, count);
    const BiasRow bias = bias_row(p, b, h, l, key);
    const Vec weight = splat(row_weight(p, b, l));
    for (int v = 0; v < vecs && v * kLanes < end; ++v) {
      const int64_t n = end - v * kLanes;
      Mask sees = first_lanes(n);
      if (bias.data)
        sees &= bias.dtype == DType::kBool ? flagged_lanes(bias, v * kLanes, n) : above_minus_infinity(float_bias(bias, v * kLanes, n));
      out[v] = select(sees, add(out[v], weight), out[v]);
    }
  }
}

// What a mean over rows divides by.
static double row_divisor(const ScoreParams& p, int64_t b) {
  if (!p.row_weights && !p.query_positions) return static_cast<double>(p.L);
  double sum = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    sum += p.row_weights ? static_cast<double>(p.row_weights[b * p.L + l]) : p.query_positions[b * p.L + l] >= 0 ? 1.0 : 0.0;
  }
  return sum;
}

// What head_reduction multiplies the sum over heads by; 0 = the weights sum to 0.
static float head_scale(const ScoreParams& p, int64_t b) {
  if (p.head_reduction != Reduction::kMean) return 1.0f;
  if (!p.head_weights) return 1.0f / static_cast<float>(p.H);
  double sum = 0;
  for (int64_t h = 0; h < p.H; ++h) sum += static_cast<double>(p.head_weights[b * p.H + h]);
  return sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
}

constexpr int kReduceVecs = 4;  // 64 keys in registers while rows and heads go by

struct Slice {  // keys [key, key + count) of chunk c, count <= 64
  int64_t b, c, key, count;
  float row_scale, head_scale;  // 1 / divisor for mean, else 1; 0 = divisor was 0
};

[[maybe_unused]] static Slice make_slice(const ScoreParams& p, int64_t b, int64_t key, int64_t count) {
  const double divisor = p.query_reduction == Reduction::kMean ? row_divisor(p, b) : 1.0;
  return {b, 0, key, count, divisor == 0.0 ? 0.0f : static_cast<float>(1.0 / divisor), head_scale(p, b)};
}

// scores[at...] = x, on top of what is to be accumulated.
TS_INLINE void write_scores(const ScoreParams& p, int64_t at, const Vec* x, int64_t count) {
  for (int v = 0; v < kReduceVecs && v * kLanes < count; ++v) {
    const int64_t i = at + v * kLanes, n = count - v * kLanes;
    store_upto(p.scores + i, p.accumulate ? add(load_upto(p.accumulate + i, n), x[v]) : x[v], n);
  }
}

TS_INLINE void combine_heads(const ScoreParams& p, const Slice& s, int64_t h, const Vec* x, Vec* total) {
  const float weight = p.head_weights ? p.head_weights[s.b * p.H + h] : 1.0f;
  for (int v = 0; v < kReduceVecs; ++v) {
    if (p.head_weights) {
      if (weight != 0.0f) total[v] = fma(x[v], splat(weight), total[v]);
    } else {
      total[v] = h == 0 ? x[v] : p.head_reduction == Reduction::kMax ? nan_max(total[v], x[v]) : add(total[v], x[v]);
    }
    if (p.head_reduction == Reduction::kMean && h == p.H - 1) total[v] = s.head_scale == 0.0f ? zero() : mul(total[v], splat(s.head_scale));
  }
}

// mean and "visible mean" of x, the sum over rows; keys that logits of no row reached get their 0. `weight` is of visible_weight.
TS_INLINE void finish_rows(const ScoreParams& p, const Slice& s, const Vec* weight, Vec* x) {
  for (int v = 0; v < kReduceVecs; ++v) {
    if (p.query_reduction == Reduction::kMean) {
      x[v] = s.row_scale == 0.0f ? zero() : mul(x[v], splat(s.row_scale));
    } else if (p.query_reduction == Reduction::kVisibleMean) {
      const Mask divides = greater(weight[v], zero()) | greater(zero(), weight[v]) | is_nan(weight[v]);
      x[v] = select(divides, div(x[v], weight[v]), zero());
    } else if (p.query_reduction == Reduction::kMax && p.activation == Activation::kLogit) {
      x[v] = select(above_minus_infinity(x[v]), x[v], zero());
    }
  }
}

// query_reduction other than none: row reductions of all heads, which row_sum(h, x) brings, into the scores of a slice.
template <typename RowSum>
TS_INLINE void finish_heads(const ScoreParams& p, const Slice& s, RowSum&& row_sum) {
  const int64_t R = p.range_end - p.range_begin, at = s.key - p.range_begin;
  const bool heads = p.head_reduction != Reduction::kNone, weigh = p.query_reduction == Reduction::kVisibleMean;
  Vec total[kReduceVecs] = {}, weight[kReduceVecs];
  for (int64_t h = 0; h < p.H; ++h) {
    Vec x[kReduceVecs];
    if (weigh && (h == 0 || (p.bias && p.bias_stride[1] != 0))) visible_weight(p, s.b, h, s.key, s.count, kReduceVecs, weight);
    row_sum(h, x);
    finish_rows(p, s, weight, x);
    if (heads) combine_heads(p, s, h, x, total);
    if (!heads) write_scores(p, (s.b * p.H + h) * R + at, x, s.count);
  }
  if (heads) write_scores(p, s.b * R + at, total, s.count);
}

TS_ISA_END

// Step 3 of score_cpu: mass * factor, rows first, then heads. 64 keys stay in registers while rows and heads go by in order.
#pragma once

#include "core/simd.h"
#include "score/score_cpu_layout.h"
#include "score/score_row_cpu.h"

TS_ISA_BEGIN

struct Task {
  const ScoreParams& p;
  const ScoreLayout& at;
  float* work;
  int64_t pass, row_begin, rows;  // rows of L in this pass: [row_begin, row_begin + rows)
};

TS_INLINE Task make_task(const ScoreParams& p, const ScoreLayout& at, int64_t pass) {
  const int64_t first = pass * at.pass_rows;
  return {p, at, static_cast<float*>(p.workspace), pass, first, smaller(at.pass_rows, p.L - first)};
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

// scores[at...] = x, on top of what is to be accumulated.
TS_INLINE void write_scores(const ScoreParams& p, int64_t at, const Vec* x, int64_t count) {
  for (int v = 0; v < kReduceVecs && v * kLanes < count; ++v) {
    const int64_t i = at + v * kLanes, n = count - v * kLanes;
    store_upto(p.scores + i, p.accumulate ? add(load_upto(p.accumulate + i, n), x[v]) : x[v], n);
  }
}

TS_INLINE void write(float* to, const Vec* x, int64_t count) {
#pragma GCC unroll 4
  for (int v = 0; v < kReduceVecs; ++v) store_upto(to + v * kLanes, x[v], count - v * kLanes);
}

// sum (or maximum) over rows [l, l + rows) of factor * mass, on top of x.
static void add_rows(const Task& t, const Slice& s, int64_t h, int64_t l, int64_t rows, bool maximum, Vec* x) {
  const ScoreParams& p = t.p;
  const int64_t head = s.b * p.Hkv + h / t.at.group, row = h % t.at.group * t.rows + l;
  const float* mass = t.work + t.at.mass + ((head * t.at.num_chunks + s.c) * t.at.group * t.at.pass_rows + row) * t.at.chunk;
  mass += s.key - t.at.key_begin - s.c * t.at.chunk;
  const float* factor = t.work + t.at.factor + ((s.b * t.at.num_chunks + s.c) * p.H + h) * t.at.pass_rows + l;
  Vec sum[kReduceVecs];
  const bool whole = s.count == kReduceVecs * kLanes;
  for (int v = 0; v < kReduceVecs; ++v) sum[v] = x[v];
  for (int64_t r = 0; r < rows; ++r, mass += t.at.chunk) {
    const Vec f = splat(factor[r]);
    if (whole && !maximum) {
#pragma GCC unroll 4
      for (int v = 0; v < kReduceVecs; ++v) sum[v] = fma(load(mass + v * kLanes), f, sum[v]);
      continue;
    }
    for (int v = 0; v < kReduceVecs; ++v) {
      const Vec e = load_n(mass + v * kLanes, s.count - v * kLanes);  // what lies beyond may belong to another task
      sum[v] = maximum ? nan_max(sum[v], mul(e, f)) : fma(e, f, sum[v]);
    }
  }
  for (int v = 0; v < kReduceVecs; ++v) x[v] = sum[v];
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

TS_INLINE float* rows_so_far(const Task& t, const Slice& s, int64_t h) {
  return t.work + t.at.rows + (s.b * t.p.H + h) * (t.p.range_end - t.p.range_begin) + s.key - t.p.range_begin;
}

// The row reduction of head h over all passes up to and including this one.
TS_INLINE void rows_of_head(const Task& t, const Slice& s, int64_t h, Vec* x) {
  for (int v = 0; v < kReduceVecs; ++v)
    x[v] = t.pass == 0 ? hidden_value(t.p) : load_n(rows_so_far(t, s, h) + v * kLanes, s.count - v * kLanes);
  add_rows(t, s, h, 0, t.rows, t.p.query_reduction == Reduction::kMax, x);
}

// query_reduction mean, sum, max: all heads into scores, from the stored row reductions or with this pass on top of them.
enum class RowsFrom { kStored, kThisPass };
static void finish_slice(const Task& t, const Slice& s, RowsFrom from) {
  const ScoreParams& p = t.p;
  const int64_t R = p.range_end - p.range_begin, at = s.key - p.range_begin;
  const bool heads = p.head_reduction != Reduction::kNone, weigh = p.query_reduction == Reduction::kVisibleMean;
  Vec total[kReduceVecs] = {}, weight[kReduceVecs];
  for (int64_t h = 0; h < p.H; ++h) {
    Vec x[kReduceVecs];
    if (weigh && (h == 0 || (p.bias && p.bias_stride[1] != 0))) visible_weight(p, s.b, h, s.key, s.count, kReduceVecs, weight);
    if (from == RowsFrom::kThisPass) {
      rows_of_head(t, s, h, x);
    } else {
      for (int v = 0; v < kReduceVecs; ++v) x[v] = load_n(rows_so_far(t, s, h) + v * kLanes, s.count - v * kLanes);
    }
    finish_rows(p, s, weight, x);
    if (heads) combine_heads(p, s, h, x, total);
    if (!heads) write_scores(p, (s.b * p.H + h) * R + at, x, s.count);
  }
  if (heads) write_scores(p, s.b * R + at, total, s.count);
}

static void store_slice(const Task& t, const Slice& s, int64_t first_head, int64_t last_head) {
  for (int64_t h = first_head; h < last_head; ++h) {
    Vec x[kReduceVecs];
    rows_of_head(t, s, h, x);
    write(rows_so_far(t, s, h), x, s.count);
  }
}

static void reduce_heads(const Task& t, const Slice& s) {  // query_reduction none
  const ScoreParams& p = t.p;
  const int64_t R = p.range_end - p.range_begin, at = s.key - p.range_begin;
  const bool heads = p.head_reduction != Reduction::kNone;
  for (int64_t l = 0; l < t.rows; ++l) {
    Vec total[kReduceVecs] = {};
    for (int64_t h = 0; h < p.H; ++h) {
      Vec x[kReduceVecs];
      for (int v = 0; v < kReduceVecs; ++v) x[v] = zero();
      add_rows(t, s, h, l, 1, false, x);
      if (heads) combine_heads(p, s, h, x, total);
      if (!heads) write_scores(p, ((s.b * p.H + h) * p.L + t.row_begin + l) * R + at, x, s.count);
    }
    if (heads) write_scores(p, (s.b * p.L + t.row_begin + l) * R + at, total, s.count);
  }
}

// f(slice) for every <= 64 keys of chunk c that are in the scored range.
template <typename F>
TS_INLINE void each_slice(const Task& t, int64_t b, int64_t c, F&& f) {
  const ScoreParams& p = t.p;
  const double divisor = p.query_reduction == Reduction::kMean ? row_divisor(p, b) : 1.0;
  Slice s = {b, c, 0, 0, divisor == 0.0 ? 0.0f : static_cast<float>(1.0 / divisor), head_scale(p, b)};
  const int64_t first = t.at.key_begin + c * t.at.chunk, stop = smaller(smaller(first + t.at.chunk, t.at.key_end), p.range_end);
  for (s.key = larger(first, p.range_begin); s.key < stop; s.key += kReduceVecs * kLanes) {
    s.count = smaller(kReduceVecs * kLanes, stop - s.key);
    f(s);
  }
}

TS_ISA_END

// Step 3 of score_cpu: mass * factor, rows first, then heads. 64 keys stay in registers while rows and heads go by in order.
#pragma once

#include "core/simd.h"
#include "score/score_cpu_layout.h"
#include "score/score_finish_cpu.h"

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

TS_INLINE float* rows_so_far(const Task& t, const Slice& s, int64_t h) {
  return t.work + t.at.rows + (s.b * t.p.H + h) * (t.p.range_end - t.p.range_begin) + s.key - t.p.range_begin;
}

// The row reduction of head h over all passes up to and including this one.
TS_INLINE void rows_of_head(const Task& t, const Slice& s, int64_t h, Vec* x) {
  for (int v = 0; v < kReduceVecs; ++v)
    x[v] = t.pass == 0 ? hidden_value(t.p) : load_n(rows_so_far(t, s, h) + v * kLanes, s.count - v * kLanes);
  add_rows(t, s, h, 0, t.rows, t.p.query_reduction == Reduction::kMax, x);
}

// The row reductions are the stored ones, or those with this pass on top of them.
enum class RowsFrom { kStored, kThisPass };
static void finish_slice(const Task& t, const Slice& s, RowsFrom from) {
  finish_heads(t.p, s, [&](int64_t h, Vec* x) {
    if (from == RowsFrom::kThisPass) {
      rows_of_head(t, s, h, x);
    } else {
      for (int v = 0; v < kReduceVecs; ++v) x[v] = load_n(rows_so_far(t, s, h) + v * kLanes, s.count - v * kLanes);
    }
  });
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
  Slice s = make_slice(p, b, 0, 0);
  s.c = c;
  const int64_t first = t.at.key_begin + c * t.at.chunk, stop = smaller(smaller(first + t.at.chunk, t.at.key_end), p.range_end);
  for (s.key = larger(first, p.range_begin); s.key < stop; s.key += kReduceVecs * kLanes) {
    s.count = smaller(kReduceVecs * kLanes, stop - s.key);
    f(s);
  }
}

TS_ISA_END

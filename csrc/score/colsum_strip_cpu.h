// A strip: up to 24 query rows of one head against all keys. Logits stay in L1/L2, become exps, and go into the head's column sums at once:
// one product and one exp per element, and the row's log-sum-exp for nothing.
#pragma once

#include "score/colsum_layout.h"
#include "score/score_row_cpu.h"
#include "score/score_tile_cpu.h"

TS_ISA_BEGIN

// Keys [first panel, last panel) of `pair` in panels of kPanelKeys columns; a panel is [D rounded up to 16][kPanelKeys].
template <typename T>
static void pack_keys(const ScoreParams& p, const ColsumLayout& at, int64_t pair, float* packed, int64_t first, int64_t last) {
  const T* base = static_cast<const T*>(p.key) + pair / p.Hkv * p.key_stride[0] + pair % p.Hkv * p.key_stride[1];
  const int64_t keys = at.key_end - at.key_begin, panel = colsum_ceil(p.D, 16) * 16 * kPanelKeys;
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = i * kPanelKeys;
    pack_panel(packed + i * panel, base + (at.key_begin + n) * p.key_stride[2], p.key_stride[2], keys - n, p.D);
  }
}

struct HeadRows {  // one query head: what its rows are weighted and normalised by, where they go
  int64_t b, h;
  const float* packed;   // keys of its key head
  const float* weights;  // [L], or null
  const float* lse_in;   // [L], or null
  float* lse_out;        // [L], or null
  float* columns;        // [at.columns]: sum (or maximum) over rows so far; null = nothing is wanted
  float* scores;         // [L, R]: the probabilities themselves instead; or null
  float* slot;           // scratch
};

// The strip's rows as float32: pointers into the query, or converted into the slot.
template <typename T>
static void strip_query(const ScoreParams& p, const ColsumLayout& at, const HeadRows& head, int64_t first, int64_t rows,
                        const float** query) {
  const T* base = static_cast<const T*>(p.query) + head.b * p.query_stride[0] + head.h * p.query_stride[1];
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = base + (first + r) * p.query_stride[2];
    if constexpr (sizeof(T) == 4) {
      query[r] = from;
    } else {
      float* to = head.slot + kStripRows * at.strip_stride + r * colsum_ceil(p.D, 16) * 16;
      for (int64_t d = 0; d < p.D; d += kLanes) store(to + d, p.D - d >= kLanes ? load(from + d) : load_n(from + d, p.D - d));
      query[r] = to;
    }
  }
}

// q.k of all rows and the first `keys` keys. A panel (8 KB at D = 128) stays in L1 while the rows pass by.
static void strip_dots(const ScoreParams& p, const Rows& rows, const float* packed, int64_t keys) {
  const int64_t panel = colsum_ceil(p.D, 16) * 16 * kPanelKeys;
  for (int64_t n = 0; n < keys; n += kPanelKeys, packed += panel) {
    int64_t d = 0;
    do {  // once even for D = 0
      tiles<kTileRows>(rows, n, d, packed + d * kPanelKeys, smaller(kPanelDims, p.D - d));
      d += kPanelDims;
    } while (d < p.D);
  }
}

// Logits of a row -> values and what they are to be multiplied by. Values of keys [visible, fill) become those of hidden keys.
static float strip_row(const ScoreParams& p, const HeadRows& head, int64_t key, int64_t l, float* values, int64_t visible, int64_t fill) {
  const float weight = head.weights ? head.weights[l] : 1.0f, *lse = head.lse_in ? head.lse_in + l : nullptr;
  const BiasRow bias = bias_row(p, head.b, head.h, l, key);
  const bool softmax = p.activation == Activation::kSoftmax;
  float maximum, sum;
  if (softmax) {
    mass_of_row(values, visible, fill, p.scale, bias, lse, &maximum, &sum);
  } else {
    values_of_row(p, values, visible, fill, bias, &maximum, &sum);
  }
  if (lse) {
    if (head.lse_out) head.lse_out[l] = *lse;
    return weight;
  }
  if (head.lse_out) head.lse_out[l] = row_lse(maximum, sum);
  if (!softmax) return weight;
  if (sum == sum) return sum == 0.0f ? 0.0f : weight / sum;
  nan_row(values, visible, bias);
  return weight;
}

// columns[n] = sum (or maximum) over the strip's rows of factor * value, in order, on top of what is there.
template <bool kMaximum>
static void strip_columns(const float* values, int64_t stride, const float* factor, int64_t rows, int64_t count, float* columns) {
  for (int64_t n = 0; n < count; n += 4 * kLanes) {
    Vec x[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) x[v] = load(columns + n + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec f = splat(factor[r]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec e = load(values + r * stride + n + v * kLanes);
        x[v] = kMaximum ? nan_max(x[v], mul(e, f)) : fma(e, f, x[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(columns + n + v * kLanes, x[v]);
  }
}

static void strip_store(const ScoreParams& p, const float* values, float factor, int64_t row, float* scores) {
  const int64_t R = p.range_end - p.range_begin;
  for (int64_t n = 0; n < R; n += kLanes) {
    Vec x = mul(load(values + n), splat(factor));
    if (p.accumulate) x = add(load_upto(p.accumulate + row * R + n, R - n), x);
    store_upto(scores + n, x, R - n);
  }
}

// Rows [first, first + rows) of a head.
template <typename T>
static void strip(const ScoreParams& p, const ColsumLayout& at, const HeadRows& head, int64_t first, int64_t rows) {
  const float* query[kStripRows];
  float factor[kStripRows];
  int64_t visible[kStripRows], most = 0;
  const int64_t keys = at.key_end - at.key_begin, begin = p.range_begin - at.key_begin, R = p.range_end - p.range_begin;
  for (int64_t r = 0; r < rows; ++r) {
    visible[r] = larger(0, smaller(visible_keys(p, head.b, first + r) - at.key_begin, keys));
    most = larger(most, visible[r]);
  }
  strip_query<T>(p, at, head, first, rows, query);
  strip_dots(p, Rows{query, head.slot, rows, at.strip_stride}, head.packed, most);
  // Columns go in slices of 64 from wherever the range begins: up to 63 keys behind the last visible one are read.
  const int64_t fill = head.scores ? at.strip_stride : smaller(at.strip_stride, (most + kLanes - 1) / kLanes * kLanes + 64);
  for (int64_t r = 0; r < rows; ++r) {
    factor[r] = strip_row(p, head, at.key_begin, first + r, head.slot + r * at.strip_stride, visible[r], fill);
  }
  const float* values = head.slot + begin;
  if (head.columns) {
    const int64_t count = smaller(R, most - begin);
    if (p.query_reduction == Reduction::kMax) {
      strip_columns<true>(values, at.strip_stride, factor, rows, count, head.columns);
    } else {
      strip_columns<false>(values, at.strip_stride, factor, rows, count, head.columns);
    }
  }
  for (int64_t r = 0; r < rows && head.scores; ++r) {
    const int64_t row = (head.b * p.H + head.h) * p.L + first + r;
    strip_store(p, values + r * at.strip_stride, factor[r], row, head.scores + (first + r) * R);
  }
}

TS_ISA_END

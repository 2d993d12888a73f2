// Tokens by output row: a stable counting sort with a row's own token first. Per instruction level; internal to the room.
#pragma once

#include "core/simd_narrow.h"
#include "merge/merge_cpu_layout.h"

TS_ISA_BEGIN

// The lists of one batch row, in the workspace.
struct RowLists {
  int32_t* start;
  int32_t* token;
  int32_t* row_of;
  float* divisor;
};

TS_INLINE RowLists row_lists(const MergeParams& p, int64_t b) {
  const MergeLayout at = merge_layout(p);
  int32_t* const base = static_cast<int32_t*>(p.workspace) + b * at.ints;
  return {base + at.start, base + at.token, base + at.row_of, reinterpret_cast<float*>(base + at.divisor)};
}

TS_INLINE void rows_of_tokens(const MergeParams& p, int64_t b, int32_t* row_of) {
  const int64_t* const inverse = p.inverse + b * p.inverse_stride;
  const int32_t none = static_cast<int32_t>(p.R);
  if (p.complement) {
    for (int64_t n = 0; n < p.N; ++n) row_of[n] = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      if (inverse[k] >= 0) row_of[inverse[k]] = none;
    }
    return;
  }
  for (int64_t n = 0; n < p.N; ++n) row_of[n] = inverse[n] < 0 ? none : static_cast<int32_t>(inverse[n]);
  if (p.from == nullptr) return;
  const int64_t* const from = p.from + b * p.from_stride;
  for (int64_t n = 0; n < p.N; ++n) row_of[n] = from[n] < 0 ? none : row_of[n];
}

static void build_lists(const MergeParams& p, int64_t b) {
  const RowLists lists = row_lists(p, b);
  const int64_t* const own = p.own != nullptr ? p.own + b * p.own_stride : nullptr;
  rows_of_tokens(p, b, lists.row_of);
  for (int64_t r = 0; r < p.R + 2; ++r) lists.start[r] = 0;
  for (int64_t n = 0; n < p.N; ++n) lists.start[lists.row_of[n] + 1] += 1;
  for (int64_t r = 0; r <= p.R; ++r) lists.start[r + 1] += lists.start[r];
  if (own != nullptr) {
    for (int64_t r = 0; r < p.R; ++r) {
      if (own[r] >= 0) lists.token[lists.start[r]++] = static_cast<int32_t>(own[r]);
    }
  }
  for (int64_t n = 0; n < p.N; ++n) {
    const int32_t r = lists.row_of[n];
    if (own == nullptr || r == p.R || own[r] != n) lists.token[lists.start[r]++] = static_cast<int32_t>(n);
  }
  for (int64_t r = p.R + 1; r > 0; --r) lists.start[r] = lists.start[r - 1];  // start[r] had become the end of row r
  lists.start[0] = 0;
}

// Sum over a row's tokens, one after the other; the number of tokens where values is null.
TS_INLINE float sum_of(const RowLists& lists, int64_t r, const float* values) {
  if (values == nullptr) return static_cast<float>(lists.start[r + 1] - lists.start[r]);
  float sum = 0.0f;
  for (int32_t i = lists.start[r]; i < lists.start[r + 1]; ++i) sum = sum + values[lists.token[i]];
  return sum;
}

TS_INLINE void fill_divisors(const MergeParams& p, int64_t b) {
  if (p.mode == MergeMode::kSum || p.mode == MergeMode::kAmax) return;
  const RowLists lists = row_lists(p, b);
  const float* const weights = p.weights != nullptr ? p.weights + b * p.N : nullptr;
  for (int64_t r = 0; r < p.R; ++r) lists.divisor[r] = sum_of(lists, r, weights) + p.epsilon;
}

template <typename T>
TS_INLINE const T* token_at(const MergeTensor& x, int64_t b, int64_t n, int64_t m) {
  return reinterpret_cast<const T*>(static_cast<const char*>(x.src) + b * x.stride_b + n * x.stride_n + m * x.stride_m);
}

// |token|, over all its segments: 16 lanes, then the fixed tree.
template <typename T>
static float norm_of(const MergeTensor& x, int64_t b, int64_t n) {
  const int64_t width = x.segment_bytes / static_cast<int64_t>(sizeof(T));
  Vec sum = zero();
  for (int64_t m = 0; m < x.segments; ++m) {
    const T* const from = token_at<T>(x, b, n, m);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) sum = fma(load(from + i), load(from + i), sum);
    if (i < width) sum = fma(load_n(from + i, width - i), load_n(from + i, width - i), sum);
  }
  return __builtin_sqrtf(reduce_add(sum));
}

// MLERP of a row: the largest norm of its tokens (the first in the row's order wins), the norm of its first token.
struct Norms {
  float largest, own;
  int32_t at;                                                        // token of the largest
  float scale() const { return own > 0.0f ? largest / own : 1.0f; }  // a zero destination: the plain mean
};

template <typename T>
TS_INLINE Norms norms_of(const MergeTensor& x, int64_t b, const int32_t* token, int32_t count) {
  Norms norms = {0.0f, norm_of<T>(x, b, token[0]), token[0]};
  norms.largest = norms.own;
  for (int32_t i = 1; i < count; ++i) {
    const float norm = norm_of<T>(x, b, token[i]);
    if (norm > norms.largest) norms.largest = norm, norms.at = token[i];
  }
  return norms;
}

TS_ISA_END

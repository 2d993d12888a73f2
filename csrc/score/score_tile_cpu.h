// Dot products of score_cpu: raw q.k of all rows of a group against one chunk of keys. Two forms, chosen by the number of rows.
//   few rows:  16 keys at a time, lanes run over D, one transposed tree sum; keys are read once, straight from memory.
//   more rows: 16 (AVX-512: 32) keys are transposed into a panel in L1, then register tiles of rows x keys run over it, lanes are keys.
// In the second form a logit is one chain of fused multiply-adds over d, so the tile's shape (which differs by level) cannot change a bit.
#pragma once

#include "core/simd.h"

TS_ISA_BEGIN

#if TS_ISA_LEVEL == 2
constexpr int kPanelVecs = 2, kTileRows = 8, kDotKeys = 8;  // 16 accumulators of 32 registers
#elif TS_ISA_LEVEL == 1
constexpr int kPanelVecs = 1, kTileRows = 6, kDotKeys = 4;  // a Vec is two registers: 12 accumulators of 16
#else
constexpr int kPanelVecs = 1, kTileRows = 2, kDotKeys = 2;
#endif
constexpr int kPanelKeys = kPanelVecs * kLanes;
constexpr int64_t kPanelDims = 256;  // 16 KB (AVX-512: 32 KB of the 48 KB L1) a panel; longer D go in blocks
constexpr int64_t kDotRows = 4;      // up to here rows re-read 16 keys from L1; beyond, transposing the keys pays. The same on all levels

struct Rows {                 // the rows of one task
  const float* const* query;  // [count] -> D floats
  float* mass;                // [count, stride]
  int64_t count, stride;
};

template <typename T>
TS_INLINE Vec dot_sixteen(const float* query, const T* keys, int64_t stride, int64_t count, int64_t D) {
  Vec part[kLanes];
#pragma GCC unroll 1
  for (int first = 0; first < kLanes; first += kDotKeys) {
    const T* key[kDotKeys];
    Vec sum[kDotKeys];
#pragma GCC unroll 8
    for (int j = 0; j < kDotKeys; ++j) {
      key[j] = keys + smaller(first + j, count - 1) * stride;  // past the end: the last key again, masked later
      sum[j] = zero();
    }
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) {
      const Vec q = load(query + d);
#pragma GCC unroll 8
      for (int j = 0; j < kDotKeys; ++j) {
        sum[j] = fma(q, load(key[j] + d), sum[j]);
        prefetch(key[j] + kLanes * stride + d);  // the next 16 keys; past the end it does no harm
      }
    }
    if (d < D) {
      const Vec q = load_n(query + d, D - d);
#pragma GCC unroll 8
      for (int j = 0; j < kDotKeys; ++j) sum[j] = fma(q, load_n(key[j] + d, D - d), sum[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kDotKeys; ++j) part[first + j] = sum[j];
  }
  return reduce_rows(part);
}

template <typename T>
static void dot_few_rows(const Rows& rows, const T* keys, int64_t stride, int64_t count, int64_t D) {
  for (int64_t n = 0; n < count; n += kLanes) {
    for (int64_t r = 0; r < rows.count; ++r) {
      store(rows.mass + r * rows.stride + n, dot_sixteen(rows.query[r], keys + n * stride, stride, count - n, D));
    }
  }
}

template <typename T>
TS_INLINE void pack_panel(float* panel, const T* keys, int64_t stride, int64_t count, int64_t dims) {
  for (int v = 0; v < kPanelVecs; ++v) {
    const T* key[kLanes];
    for (int j = 0; j < kLanes; ++j) key[j] = keys + smaller(v * kLanes + j, count - 1) * stride;
    for (int64_t d = 0; d < dims; d += kLanes) {
      Vec x[kLanes];
      if (d + kLanes <= dims) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          x[j] = load(key[j] + d);
          prefetch(key[j] + kPanelKeys * stride + d);  // the next panel arrives while the tiles of this one run
        }
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) x[j] = load_n(key[j] + d, dims - d);
      }
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(panel + (d + j) * kPanelKeys + v * kLanes, x[j]);
    }
  }
}

template <int kRows>
static void tile(const float* const* query, int64_t first_dim, const float* panel, int64_t dims, float* out, int64_t stride) {
  Vec sum[kRows][kPanelVecs];
  const float* q[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    q[r] = query[r] + first_dim;
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) sum[r][v] = first_dim == 0 ? zero() : load(out + r * stride + v * kLanes);
  }
  for (int64_t d = 0; d < dims; ++d) {
    Vec k[kPanelVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) k[v] = load(panel + d * kPanelKeys + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(q[r][d]);
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVecs; ++v) sum[r][v] = fma(x, k[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) store(out + r * stride + v * kLanes, sum[r][v]);
  }
}

template <int kRows>
static void tiles(const Rows& rows, int64_t n, int64_t first_dim, const float* panel, int64_t dims) {
  int64_t r = 0;
  for (; r + kRows <= rows.count; r += kRows)
    tile<kRows>(rows.query + r, first_dim, panel, dims, rows.mass + r * rows.stride + n, rows.stride);
  if constexpr (kRows > 1) {
    const Rows rest = {rows.query + r, rows.mass + r * rows.stride, rows.count - r, rows.stride};
    if (rest.count > 0) tiles<kRows - 1>(rest, n, first_dim, panel, dims);
  }
}

template <typename T>
static void dot_many_rows(const Rows& rows, const T* keys, int64_t stride, int64_t count, int64_t D) {
  alignas(64) float panel[kPanelDims * kPanelKeys];
  for (int64_t n = 0; n < count; n += kPanelKeys) {
    int64_t d = 0;
    do {  // once even for D = 0: the logits are 0 then
      const int64_t dims = smaller(kPanelDims, D - d);
      pack_panel(panel, keys + n * stride + d, stride, count - n, dims);
      tiles<kTileRows>(rows, n, d, panel, dims);
      d += kPanelDims;
    } while (d < D);
  }
}

// mass[r, n] = q[r] . k[n] for n in [0, count); up to a panel's width beyond is written too (the stride leaves room for it).
template <typename T>
static void dot_chunk(const Rows& rows, const T* keys, int64_t stride, int64_t count, int64_t D) {
  if (rows.count <= kDotRows) {
    dot_few_rows(rows, keys, stride, count, D);
  } else {
    dot_many_rows(rows, keys, stride, count, D);
  }
}

TS_ISA_END

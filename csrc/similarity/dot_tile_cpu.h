// Dot products between all rows of two sets, in blocks: what cosine_cpu and diverse_cpu have in common.
//
// Rows are packed into panels of 16: panel[d][lane], channels outside, so one panel serves both sides of a product. A register tile takes
// rows of one panel as broadcasts and panels of the other side as vectors: 6 x 16 (AVX2: 12 accumulators of 16 registers), 8 x 48 (AVX-512:
// 24 of 32). 128 channels at a time: the vectors' panels (AVX2 8 KB, AVX-512 24 KB) stay in L1 while the rows stream from L2.
// A dot product is the sum, over blocks of 128 channels, of one chain of fused multiply-adds: neither the tile's shape nor the side that a
// row is on changes a bit, and the error grows with 128 + C / 128, not with C.
// Items are floats (a channel) or int32 (two channels as int16, cosine_filter_cpu.h): the same tiles, 128 items at a time.
#pragma once

#include "core/simd_int.h"
#include "similarity/panels_cpu.h"

TS_ISA_BEGIN

TS_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

namespace dots {

#if TS_ISA_LEVEL == 2
constexpr int kTileRows = 8, kTilePanels = 3;
#elif TS_ISA_LEVEL == 1
constexpr int kTileRows = 6, kTilePanels = 1;  // a Vec is two registers
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
constexpr int64_t kDims = 128;

// out[r][p * 16 ...] (+)= rows . panels over `dims` items. row[r] -> the row's first item, its next one 16 items further.
template <int kRows, int kPanels, typename Item>
static void tile(const Item* const* row, const Item* panel, int64_t panel_step, int64_t dims, bool begin, Item* out, int64_t out_stride) {
  using Lanes = decltype(load(panel));
  Lanes sum[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) sum[r][p] = splat(Item{0});
  }
  for (int64_t d = 0; d < dims * kLanes; d += kLanes) {
    Lanes x[kPanels];
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) x[p] = load(panel + p * panel_step + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Lanes y = splat(row[r][d]);
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) sum[r][p] = multiply_add(y, x[p], sum[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      Item* const to = out + r * out_stride + p * kLanes;
      store(to, begin ? sum[r][p] : add(load(to), sum[r][p]));
    }
  }
}

template <typename Item>
struct SideOf {        // packed rows, at the first item of the block in hand
  const Item* data;    // panel 0
  int64_t panel_step;  // items from a panel to the next
};
using Side = SideOf<float>;

// Rows [first, last) of `a` against panels [p, p + kPanels) of `b`.
template <int kRows, int kPanels, typename Item>
static void rows_of_tiles(SideOf<Item> a, int64_t first, int64_t last, const Item* panel, int64_t panel_step, int64_t dims, bool begin,
                          Item* out, int64_t stride) {
  int64_t r = first;
  for (; r + kRows <= last; r += kRows) {
    const Item* row[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) row[i] = a.data + (r + i) / kLanes * a.panel_step + (r + i) % kLanes;
    tile<kRows, kPanels>(row, panel, panel_step, dims, begin, out + r * stride, stride);
  }
  if constexpr (kRows > 1) {
    if (r < last) rows_of_tiles<kRows - 1, kPanels>(a, r, last, panel, panel_step, dims, begin, out, stride);
  }
}

template <int kPanels, typename Item>
static int64_t columns_of_tiles(SideOf<Item> a, int64_t rows, SideOf<Item> b, int64_t p, int64_t panels, int64_t dims, bool begin,
                                bool upper, Item* out, int64_t stride) {
  for (; p + kPanels <= panels; p += kPanels) {
    const int64_t last = upper ? smaller(rows, (p + kPanels) * kLanes) : rows;
    rows_of_tiles<kTileRows, kPanels>(a, 0, last, b.data + p * b.panel_step, b.panel_step, dims, begin, out + p * kLanes, stride);
  }
  return p;
}

// out[r, c] (+)= a[r] . b[c] over one block of `dims` <= 128 items, r < rows, c < 16 * panels. `begin` overwrites.
// `upper`: a and b are the same rows, and what lies below the 16 x 16 blocks of the diagonal is left undefined.
template <typename Item>
static void block(SideOf<Item> a, int64_t rows, SideOf<Item> b, int64_t panels, int64_t dims, bool begin, bool upper, Item* out,
                  int64_t stride) {
  int64_t p = columns_of_tiles<kTilePanels>(a, rows, b, 0, panels, dims, begin, upper, out, stride);
  if constexpr (kTilePanels > 1) columns_of_tiles<1>(a, rows, b, p, panels, dims, begin, upper, out, stride);
}

// The same over all C items of two packed sets.
template <typename Item>
static void all_channels(SideOf<Item> a, int64_t rows, SideOf<Item> b, int64_t panels, int64_t C, bool upper, Item* out, int64_t stride) {
  int64_t d = 0;
  do {  // once even for C = 0: the products are 0 then
    const SideOf<Item> from = {a.data + d * kLanes, a.panel_step}, to = {b.data + d * kLanes, b.panel_step};
    block(from, rows, to, panels, smaller(kDims, C - d), d == 0, upper, out, stride);
    d += kDims;
  } while (d < C);
}

// Packs channels [d, d + dims) of up to 16 rows; row[j] -> C values. Lane j of the result: the row's sum of squares over them, one chain.
template <typename T>
static Vec pack(const T* const* row, int64_t first, int64_t dims, float* to) {
  Vec squares = zero();
  for (int64_t d = 0; d < dims; d += kLanes) {
    Vec x[kLanes];
    if (d + kLanes <= dims) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) x[j] = load(row[j] + first + d);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) x[j] = load_n(row[j] + first + d, dims - d);
    }
    transpose(x);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      squares = fma(x[j], x[j], squares);
      store(to + (d + j) * kLanes, x[j]);
    }
  }
  return squares;
}

// Packs whole rows; lane j of the result: row j . row j, summed exactly as block() sums it.
template <typename T>
static Vec pack_panel(const T* const* row, int64_t C, float* to) {
  Vec squares = zero();
  for (int64_t d = 0; d < C; d += kDims) squares = add(squares, pack(row, d, smaller(kDims, C - d), to + d * kLanes));
  return squares;
}

// 1 / |row|, 0 for a row of norm 0.
TS_INLINE Vec inverse_norm(Vec squares) {
  const Vec inverse = div(splat(1.0f), sqrt(squares));
  return select(greater(squares, zero()) | is_nan(squares), inverse, zero());
}

// Scales every row of a packed panel; returns its new sums of squares.
[[maybe_unused]] static Vec scale_panel(float* panel, int64_t C, Vec factor) {
  Vec squares = zero();
  for (int64_t d = 0; d < C; d += kDims) {
    Vec part = zero();
    float* const at = panel + d * kLanes;
    for (int64_t i = 0; i < smaller(kDims, C - d) * kLanes; i += kLanes) {
      const Vec x = mul(load(at + i), factor);
      part = fma(x, x, part);
      store(at + i, x);
    }
    squares = add(squares, part);
  }
  return squares;
}

}  // namespace dots

TS_ISA_END

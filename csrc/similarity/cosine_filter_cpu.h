// The nearest column of every row by int16 products first: for many channels, where multiplications are all that counts.
//
// A product of two rounded rows is off by at most 6e-4 at C = 1152 (rounded_cpu.h), so every column whose rounded product lies within twice
// that of a row's largest is a candidate: 1.3 of 365 for random rows. Candidates get the exact product, with the additions of dot_tile_cpu.h
// in the same order, and only that is compared: values and indices are those of the float path, bit for bit.
// Rows that are not finite, or whose norm is not 1 (denormal ones), and blocks where a row has more than 16 candidates (copies of a token)
// are left to the float path.
#pragma once

#include "similarity/cosine_block_cpu.h"
#include "similarity/rounded_cpu.h"

TS_ISA_BEGIN

namespace {
namespace filter {

constexpr int kListed = 16;
constexpr int32_t kNothing = -1500000000;  // below every product, and a margin further down is still an int32

// Candidates of one row: columns in ascending order.
struct Listed {
  int32_t top = kNothing, count = 0;
  int32_t dot[kListed], column[kListed];

  void drop_far(int32_t margin) {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      if (dot[i] < top - margin) continue;
      dot[kept] = dot[i];
      column[kept++] = column[i];
    }
    count = kept;
  }

  // False: too many.
  bool add(int32_t new_dot, int32_t new_column, int32_t margin) {
    if (new_dot < top - margin) return true;
    if (new_dot > top) top = new_dot;
    if (count == kListed) drop_far(margin);
    if (count == kListed) return false;
    dot[count] = new_dot;
    column[count++] = new_column;
    return true;
  }
};

TS_INLINE int64_t panel_items(const CosineParams& p) { return rounded::panel_items(p.C); }
TS_INLINE float* floats(const Task& t, int64_t offset) { return static_cast<float*>(t.p.workspace) + offset; }
TS_INLINE int32_t* items(const Task& t, int64_t offset) { return static_cast<int32_t*>(t.p.workspace) + offset; }
TS_INLINE int32_t* a_items(const Task& t, int64_t g) { return items(t, t.at.a_items) + g * dot_ceil(t.p.M, kPanelRows) * panel_items(t.p); }
TS_INLINE int32_t* b_items(const Task& t, int64_t g) { return items(t, t.at.b_items) + g * dot_ceil(t.p.N, kPanelRows) * panel_items(t.p); }
TS_INLINE float* a_error(const Task& t, int64_t g) { return floats(t, t.at.a_error) + g * dot_round_up(t.p.M, kPanelRows); }
TS_INLINE float* b_error(const Task& t, int64_t g) { return floats(t, t.at.b_error) + g * dot_round_up(t.p.N, kPanelRows); }

// How far below a row's largest rounded product its nearest column may be, in units of 1 / 32767^2. False: not bounded.
static bool find_margins(const Task& t, int64_t g, const Block& x, int64_t columns, int32_t* margin) {
  const float* const error = b_error(t, g);
  float f = 0.0f;
  for (int64_t n = x.column; n < x.column + columns; ++n) f = error[n] > f ? error[n] : f;
  for (int64_t r = 0; r < x.rows; ++r) {
    const double off = rounded::largest_difference(a_error(t, g)[x.row + r], f, t.p.C);
    const double twice = 2.0 * off * rounded::kScale * rounded::kScale + 2.0;
    if (!(twice < 5e8)) return false;
    margin[r] = static_cast<int32_t>(twice);
  }
  return true;
}

// Lists the candidates of a block of products. False: a row has too many.
static bool list_block(const Task& t, const Block& x, const int32_t* dots, const int32_t* margin, Listed* listed) {
  for (int64_t r = 0; r < x.rows; ++r, dots += kDotBlock) {
    for (int64_t i = 0; i * kLanes < x.columns; ++i) {
      const IntVec dot = load(dots + i * kLanes);
      Mask near = greater(dot, splat(listed[r].top - margin[r] - 1)) & taken(t.p, x, x.row + r, i);
      if (!near) continue;
      int32_t lane[kLanes];
      store(lane, dot);
      for (; near; near &= near - 1) {
        const int j = __builtin_ctz(near);
        const int32_t column = static_cast<int32_t>(x.column + i * kLanes + j);
        if (!listed[r].add(lane[j], column, margin[r])) return false;
      }
    }
  }
  return true;
}

// One column for each of the 16 rows of a panel: their products, added up as dots::all_channels does.
template <typename T>
static Vec exact_dots(const float* panel, const T* const* column, int64_t C) {
  alignas(64) float packed[dots::kDims * kLanes];
  Vec total = zero();
  for (int64_t d = 0; d < C; d += dots::kDims) {
    const int64_t dims = smaller(dots::kDims, C - d);
    dots::pack(column, d, dims, packed);
    Vec sum = zero();
    for (int64_t i = 0; i < dims * kLanes; i += kLanes) sum = fma(load(panel + d * kLanes + i), load(packed + i), sum);
    total = d == 0 ? sum : add(total, sum);
  }
  return total;
}

// Compares the exact products of the candidates of a panel's rows; the first of each row in one go, then the second, ...
template <typename T>
static void compare_candidates(const Task& t, int64_t g, int64_t b, int64_t row, Listed* listed, float* rank, float* index) {
  const float* const panel = a_panels(t, g) + row / kPanelRows * dot_panel_floats(t.p.C);
  int32_t most = 1;
  for (int64_t j = 0; j < smaller(kLanes, t.p.M - row); ++j) most = listed[j].count > most ? listed[j].count : most;
  for (int32_t i = 0; i < most; ++i) {
    const T* column[kLanes];
    Mask there = 0;
    for (int64_t j = 0; j < kLanes; ++j) {
      if (row + j < t.p.M && i < listed[j].count) there |= 1u << j;
      column[j] = b_row<T>(t.p, b, there >> j & 1u ? listed[j].column[i] : 0);
    }
    float lane[kLanes];
    store(lane, exact_dots(panel, column, t.p.C));
    for (; there; there &= there - 1) {
      const int j = __builtin_ctz(there);
      const int64_t n = listed[j].column[i];
      const float value = lane[j] * b_inverse(t, g)[n];
      if (value > rank[j]) {
        rank[j] = value;
        index[j] = as_index(n);
      }
    }
  }
}

// The nearest of the columns [x.column, x.column + columns) for every row of the block. False: nothing is written, the float path has to.
template <typename T>
static bool nearest(const Task& t, int64_t g, Block& x, int64_t columns, float* rank, float* index) {
  alignas(64) int32_t products[kDotBlock * kDotBlock], margin[kDotBlock];
  Listed listed[kDotBlock];
  if (!find_margins(t, g, x, columns, margin)) return false;
  const int64_t step = panel_items(t.p), end = x.column + columns;
  const dots::SideOf<int32_t> a = {a_items(t, g) + x.row / kPanelRows * step, step};
  int64_t width = 48;  // at first: tokens that are all alike cost 1.2 times the float path then, with 144 columns 1.5 times
  for (; x.column < end; x.column += x.columns, width = kDotBlock) {
    x.columns = smaller(width, end - x.column);
    const dots::SideOf<int32_t> b = {b_items(t, g) + x.column / kPanelRows * step, step};
    dots::all_channels(a, x.rows, b, dot_ceil(x.columns, kPanelRows), step / kPanelRows, false, products, kDotBlock);
    find_allowed(t.p, x);
    if (!list_block(t, x, products, margin, listed)) return false;
  }
  for (int64_t r = 0; r < x.rows; ++r) listed[r].drop_far(margin[r]);
  for (int64_t r = 0; r < x.rows; r += kPanelRows) {
    compare_candidates<T>(t, g, x.b, x.row + r, listed + r, rank + r, index + r);
  }
  return true;
}

}  // namespace filter
}  // namespace

TS_ISA_END

// The blocks of dot products that cosine_cpu works on. Per instruction level; internal to the room.
#pragma once

#include "core/simd.h"
#include "similarity/cosine_cpu_layout.h"
#include "similarity/cosine_sum_cpu.h"
#include "similarity/dot_tile_cpu.h"

TS_ISA_BEGIN

namespace {

constexpr int64_t kBlockPanels = kDotBlock / kPanelRows;
constexpr float kNanRank = -4.0f;  // below every cosine, above an empty place (-inf)

struct Block {  // dot products of up to 144 rows of a with up to 144 rows of b
  int64_t b, row, rows, column, columns;
  alignas(64) float dot[kDotBlock * kDotBlock];
  alignas(64) float inverse[kDotBlock];  // 1 / |b|, negative where the lowest similarity is wanted
  Mask allowed[kBlockPanels];            // columns that exist and are candidates
};

using Task = sums::Task;

// Lists hold an index as the bits of a float, so that vectors carry both; such floats are moved, never computed with.
TS_INLINE float as_index(int64_t column) { return float_of_bits(static_cast<uint32_t>(column)); }

TS_INLINE float* a_panels(const Task& t, int64_t g) {
  return static_cast<float*>(t.p.workspace) + t.at.a + g * dot_ceil(t.p.M, kPanelRows) * dot_panel_floats(t.p.C);
}
TS_INLINE float* b_panels(const Task& t, int64_t g) {
  return static_cast<float*>(t.p.workspace) + t.at.b + g * dot_ceil(t.p.N, kPanelRows) * dot_panel_floats(t.p.C);
}
TS_INLINE float* b_inverse(const Task& t, int64_t g) {
  return static_cast<float*>(t.p.workspace) + t.at.inverse + g * dot_round_up(t.p.N, 16);
}

TS_INLINE const int64_t* a_list(const CosineParams& p, int64_t b) { return p.a_rows ? p.a_rows + b * p.a_rows_stride : nullptr; }
TS_INLINE const int64_t* b_list(const CosineParams& p, int64_t b) { return p.b_rows ? p.b_rows + b * p.b_rows_stride : nullptr; }
template <typename T>
TS_INLINE const T* row_at(const void* data, int64_t stride, const int64_t* list, int64_t i) {
  return static_cast<const T*>(data) + (list == nullptr ? i : list[i] < 0 ? 0 : list[i]) * stride;
}
template <typename T>
TS_INLINE const T* a_row(const CosineParams& p, int64_t b, int64_t i) {
  return row_at<T>(p.a, p.a_stride[1], a_list(p, b), i) + b * p.a_stride[0];
}
template <typename T>
TS_INLINE const T* b_row(const CosineParams& p, int64_t b, int64_t i) {
  return row_at<T>(p.b, p.b_stride[1], b_list(p, b), i) + b * p.b_stride[0];
}

// The columns of a block that exist and are candidates.
TS_INLINE void find_allowed(const CosineParams& p, Block& x) {
  const uint8_t* const allowed = p.candidates ? p.candidates + x.b * p.candidates_stride + x.column : nullptr;
  for (int64_t i = 0; i * kLanes < x.columns; ++i) {
    const int64_t left = x.columns - i * kLanes;
    x.allowed[i] = first_lanes(left);
    if (allowed && left >= kLanes) x.allowed[i] = nonzero_bytes(allowed + i * kLanes);
    for (int64_t j = 0; allowed && left < kLanes && j < left; ++j) {
      if (!allowed[i * kLanes + j]) x.allowed[i] &= ~(1u << j);
    }
  }
}

// The columns of panel i that row m may take.
TS_INLINE Mask taken(const CosineParams& p, const Block& x, int64_t m, int64_t i) {
  const int64_t self = m - x.column - i * kLanes;
  return p.exclude_self && self >= 0 && self < kLanes ? x.allowed[i] & ~(1u << self) : x.allowed[i];
}

}  // namespace

TS_ISA_END

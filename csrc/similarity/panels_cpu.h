// Sizes that plans and kernels of this room share. Static functions: every object file has its own copy.
#pragma once

#include <cstdint>

namespace tokensieve {

// Rows and columns of one block of dot products: a multiple of 16 (panels), 6 and 8 (tile rows) and 48 (tile columns). Its result is 83 KB,
// and 128 channels of its two sides 147 KB: together half of a 512 KB L2.
constexpr int64_t kDotBlock = 144;
constexpr int64_t kPanelRows = 16;

static inline int64_t dot_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t dot_round_up(int64_t a, int64_t b) { return dot_ceil(a, b) * b; }
static inline int64_t dot_panel_floats(int64_t C) { return dot_round_up(C, 16) * kPanelRows; }

// Images that share one workspace: as many as fit into 256 MB, at least one, so memory does not grow with the batch.
static inline int64_t images_at_once(int64_t B, int64_t floats_per_image) {
  const int64_t fit = (int64_t{64} << 20) / (floats_per_image > 0 ? floats_per_image : 1);
  const int64_t images = fit > 1 ? fit : 1;
  return images < B ? images : B;
}

}  // namespace tokensieve

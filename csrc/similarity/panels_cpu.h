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

// Images that share one workspace: as many as fit into 28 MB, at least one. Memory does not grow with the batch, and what is below 32 MB the
// C library's allocator keeps for the next call: fresh pages for 32 images of 196 x 3584 took a fifth of their products' time.
static inline int64_t images_at_once(int64_t B, int64_t floats_per_image) {
  const int64_t fit = (int64_t{7} << 20) / (floats_per_image > 0 ? floats_per_image : 1);
  const int64_t images = fit > 1 ? fit : 1;
  return images < B ? images : B;
}

// Hands out offsets in floats from the 64-byte aligned workspace, each for `images` images; sizes are rounded up to 16.
struct Offsets {
  int64_t images, floats = 0;
  int64_t take(int64_t size) {
    const int64_t from = floats;
    floats += images * dot_round_up(size, 16);
    return from;
  }
};

}  // namespace tokensieve

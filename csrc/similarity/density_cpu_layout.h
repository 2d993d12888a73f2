// How density_cpu and nearest_cpu lay out their workspaces; plans and kernels read the same numbers. Static functions: every object file has
// its own copy.
#pragma once

#include "similarity/density.h"
#include "similarity/panels_cpu.h"

namespace tokensieve {

constexpr int64_t kDensityStrips = 8;  // of kDotBlock rows, in hand at once where the matrix is not stored

struct DensityLayout {
  int64_t rows = 0;         // N, rounded up to whole panels: the pitch of the distances
  int64_t blocks = 0;       // of kDotBlock rows
  int64_t stored_rows = 0;  // rows of distances in the workspace
  int64_t images = 0;       // worked on together
  int64_t mean = 0;         // [C rounded up to 16]
  int64_t panels = 0;       // [rows / 16][C rounded up to 16][16]: the tokens less their mean
  int64_t squares = 0;      // [rows]: x . x of those
  int64_t distances = 0;    // [stored_rows][rows]: squared
  int64_t maxima = 0;       // [blocks][blocks]: the largest finite one of a pair of blocks
  int64_t real = 0;         // [rows / 16] uint32: lanes that are tokens and no padding
  int64_t heaps = 0;        // [blocks][k] uint64
  int64_t density = 0;      // [rows]: first the sums; -1 for padding
  int64_t missing = 0;      // [rows]: of the k neighbours, those that are padding
  int64_t most = 0;         // [1]: distance of a token without a denser one
  int64_t floats = 0;       // all of it
};

static inline DensityLayout density_layout(const DensityParams& p, bool store_distances) {
  DensityLayout at;
  at.rows = dot_round_up(p.N, kPanelRows);
  at.blocks = dot_ceil(p.N, kDotBlock);
  at.stored_rows = store_distances ? at.rows : dot_round_up(kDensityStrips * kDotBlock, kPanelRows);
  const int64_t panels = at.rows / kPanelRows * dot_panel_floats(p.C);
  at.images = images_at_once(p.B, panels + at.stored_rows * at.rows);
  Offsets offsets = {at.images};
  at.mean = offsets.take(p.C);
  at.panels = offsets.take(panels);
  at.squares = offsets.take(at.rows);
  at.distances = offsets.take(at.stored_rows * at.rows);
  at.maxima = offsets.take(at.blocks * at.blocks);
  at.real = offsets.take(at.rows / kPanelRows);
  at.heaps = offsets.take(2 * at.blocks * p.k);
  at.density = offsets.take(at.rows);
  at.missing = offsets.take(at.rows);
  at.most = offsets.take(1);
  at.floats = offsets.floats;
  return at;
}

struct NearestLayout {
  int64_t rows = 0, center_rows = 0;  // N and K, rounded up to whole panels
  int64_t images = 0;
  int64_t mean = 0;                               // [C rounded up to 16]
  int64_t panels = 0, squares = 0;                // of the tokens, as above
  int64_t center_panels = 0, center_squares = 0;  // of the centres; the square of no centre is infinite
  int64_t floats = 0;
};

static inline NearestLayout nearest_layout(const NearestParams& p) {
  NearestLayout at;
  at.rows = dot_round_up(p.N, kPanelRows);
  at.center_rows = dot_round_up(p.K, kPanelRows);
  const int64_t panels = at.rows / kPanelRows * dot_panel_floats(p.C), centers = at.center_rows / kPanelRows * dot_panel_floats(p.C);
  at.images = images_at_once(p.B, panels + centers);
  Offsets offsets = {at.images};
  at.mean = offsets.take(p.C);
  at.panels = offsets.take(panels);
  at.squares = offsets.take(at.rows);
  at.center_panels = offsets.take(centers);
  at.center_squares = offsets.take(at.center_rows);
  at.floats = offsets.floats;
  return at;
}

}  // namespace tokensieve

// How diverse_cpu lays out its workspace; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include "similarity/diverse.h"
#include "similarity/panels_cpu.h"

namespace tokensieve {

struct DiverseLayout {
  int64_t rows = 0;    // N, rounded up to whole panels: the pitch of the distance matrix
  int64_t blocks = 0;  // of kDotBlock rows
  int64_t pairs = 0;   // of blocks, i <= j
  int64_t images = 0;  // worked on together
  // Offsets in floats from the 64-byte aligned workspace; every size is a multiple of 16 and holds `images`.
  int64_t panels = 0;     // [rows / 16][C rounded up to 16][16]: the candidates, for the cosine scaled to norm 1
  int64_t squares = 0;    // [rows]: x . x of those
  int64_t nearest = 0;    // [blocks][rows]: distance to the nearest other candidate within a block
  int64_t best = 0;       // [rows]: distance to the nearest pick; -1 for picks and padding
  int64_t distances = 0;  // [rows][rows], or with recomputed rows [rows]
  int64_t tokens = 0;     // [rows] int32: position of every candidate
  int64_t counts = 0;     // [1, padded] int32: candidates
  int64_t floats = 0;     // all of it
};

static inline DiverseLayout diverse_layout(const DiverseParams& p, bool store_distances) {
  DiverseLayout at;
  at.rows = dot_round_up(p.N, kPanelRows);
  at.blocks = dot_ceil(p.N, kDotBlock);
  at.pairs = at.blocks * (at.blocks + 1) / 2;
  const int64_t sizes[7] = {at.rows / kPanelRows * dot_panel_floats(p.C),
                            at.rows,
                            at.blocks * at.rows,
                            at.rows,
                            store_distances ? at.rows * at.rows : at.rows,
                            at.rows,
                            16};
  int64_t* const offsets[7] = {&at.panels, &at.squares, &at.nearest, &at.best, &at.distances, &at.tokens, &at.counts};
  int64_t one = 0;
  for (const int64_t size : sizes) one += size;
  at.images = images_at_once(p.B, one);
  for (int i = 0; i < 7; ++i) {
    *offsets[i] = at.floats;
    at.floats += at.images * sizes[i];
  }
  return at;
}

}  // namespace tokensieve

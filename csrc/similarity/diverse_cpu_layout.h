// How diverse_cpu lays out its workspace; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include <initializer_list>

#include "similarity/diverse.h"
#include "similarity/panels_cpu.h"

namespace tokensieve {

struct DiverseLayout {
  int64_t rows = 0;     // N, rounded up to whole panels: the pitch of the distance matrix
  int64_t blocks = 0;   // of kDotBlock rows
  int64_t pairs = 0;    // of blocks, i <= j
  int64_t images = 0;   // worked on together
  bool filter = false;  // rounded products first
  // Offsets in floats from the 64-byte aligned workspace; every size is a multiple of 16 and holds `images`.
  int64_t panels = 0;     // [rows / 16][C rounded up to 16][16]: the candidates, for the cosine scaled to norm 1
  int64_t squares = 0;    // [rows]: x . x of those
  int64_t nearest = 0;    // [blocks][rows]: distance to the nearest other candidate within a block
  int64_t best = 0;       // [rows]: distance to the nearest pick; -1 for picks and padding
  int64_t distances = 0;  // [rows][rows], or with recomputed rows [rows]
  int64_t tokens = 0;     // [rows] int32: position of every candidate
  int64_t states = 0;     // [1, padded] ImageState
  // filter: rows as int16 and norms of what rounding took; factors that scale to norm 1; what pick_by_bounds knows (diverse_filter_cpu.h)
  int64_t items = 0, error = 0, inverse = 0, lower = 0, seen = 0, picked = 0;
  int64_t floats = 0;  // all of it
};

// Rounded products pay where multiplications are all that counts (rounded_cpu.h has the upper limit).
static inline bool diverse_filters(const DiverseParams& p, bool store_distances) {
  return store_distances && p.metric == DiverseMetric::kCosine && p.N >= 64 && p.C >= 256 && p.C <= 16384;
}

static inline DiverseLayout diverse_layout(const DiverseParams& p, bool store_distances) {
  DiverseLayout at;
  at.filter = diverse_filters(p, store_distances);
  at.rows = dot_round_up(p.N, kPanelRows);
  at.blocks = dot_ceil(p.N, kDotBlock);
  at.pairs = at.blocks * (at.blocks + 1) / 2;
  const int64_t panels = at.rows / kPanelRows * dot_panel_floats(p.C), filtered = at.filter ? at.rows : 0;
  const auto place = [&](int64_t images) {
    Offsets offsets = {images};
    at.panels = offsets.take(panels);
    at.squares = offsets.take(at.rows);
    at.nearest = offsets.take(at.blocks * at.rows);
    at.best = offsets.take(at.rows);
    at.distances = offsets.take(store_distances ? at.rows * at.rows : at.rows);
    at.tokens = offsets.take(at.rows);
    at.states = offsets.take(1);
    at.items = offsets.take(at.filter ? panels / 2 : 0);
    for (int64_t* const offset : {&at.error, &at.inverse, &at.lower, &at.seen, &at.picked}) *offset = offsets.take(filtered);
    at.images = images;
    at.floats = offsets.floats;
  };
  place(1);
  place(images_at_once(p.B, at.floats));
  return at;
}

}  // namespace tokensieve

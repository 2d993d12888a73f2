// How diverse_cpu lays out its workspace; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include "similarity/diverse.h"
#include "similarity/panels_cpu.h"

namespace tokensieve {

constexpr int64_t kDiverseSeeds = 48;  // tokens whose nearest neighbour is looked for at once: a multiple of 16 and of a tile's rows
constexpr int64_t kDiverseGroups = 3;  // of kDiverseVisits tokens, compared with the picks at once
constexpr int64_t kDiverseVisits = 6;  // three groups hold the 16 candidates of a sweep; the rows of an AVX2 tile

// What is known of one image while its first pick is looked for.
struct alignas(64) DiverseState {
  int32_t candidates, open;  // open: tokens that may still be the first pick; 0 where it was given
  int32_t token;             // the best whose nearest neighbour is known; its distance is `value`
  float value;
  int32_t seeds, seed[kDiverseSeeds];  // at work, ascending
};

struct DiverseLayout {
  int64_t rows = 0;    // N, rounded up to whole panels
  int64_t blocks = 0;  // of kDotBlock rows
  int64_t images = 0;  // worked on together
  // Offsets in floats from the 64-byte aligned workspace; every size is a multiple of 16 and holds `images`.
  int64_t panels = 0;        // [rows / 16][C rounded up to 16][16]: the candidates, for the cosine scaled to norm 1
  int64_t squares = 0;       // [rows]: x . x of those
  int64_t scales = 0;        // [rows]: what they were scaled by (cosine)
  int64_t nearest = 0;       // [rows]: distance to the nearest other candidate met so far
  int64_t left = 0;          // [rows]: the same, of the block in hand with the blocks behind it
  int64_t right = 0;         // [rows]: and with those before it
  int64_t slots = 0;         // [blocks][kDiverseSeeds]: nearest of every block to the seeds
  int64_t best = 0;          // [rows]: distance to the nearest pick seen; -1 for picks and padding
  int64_t seen = 0;          // [rows] int32: picks that `best` knows
  int64_t picks = 0;         // [K / 16][C rounded up to 16][16]: the picks
  int64_t pick_squares = 0;  // [K rounded up to 16]
  int64_t visits = 0;        // [kDiverseGroups][C rounded up to 16][16]: tokens that are compared with the picks
  int64_t tokens = 0;        // [rows] int32: position of every candidate
  int64_t states = 0;        // DiverseState
  int64_t floats = 0;        // all of it
};

static inline DiverseLayout diverse_layout(const DiverseParams& p) {
  DiverseLayout at;
  at.rows = dot_round_up(p.N, kPanelRows);
  at.blocks = dot_ceil(p.N, kDotBlock);
  const int64_t panel = dot_panel_floats(p.C), picks = dot_ceil(p.K, kPanelRows);
  const int64_t sizes[] = {at.rows / kPanelRows * panel,
                           at.rows,
                           at.rows,
                           at.rows,
                           at.rows,
                           at.rows,
                           at.blocks * kDiverseSeeds,
                           at.rows,
                           at.rows,
                           picks * panel,
                           picks * kPanelRows,
                           kDiverseGroups * panel,
                           at.rows,
                           static_cast<int64_t>(sizeof(DiverseState) / 4)};
  int64_t* const offsets[] = {&at.panels, &at.squares, &at.scales, &at.nearest,      &at.left,   &at.right,  &at.slots,
                              &at.best,   &at.seen,    &at.picks,  &at.pick_squares, &at.visits, &at.tokens, &at.states};
  constexpr int kParts = static_cast<int>(sizeof(sizes) / sizeof(sizes[0]));
  int64_t one = 0;
  for (const int64_t size : sizes) one += size;
  at.images = images_at_once(p.B, one);
  for (int i = 0; i < kParts; ++i) {
    *offsets[i] = at.floats;
    at.floats += at.images * sizes[i];
  }
  return at;
}

}  // namespace tokensieve

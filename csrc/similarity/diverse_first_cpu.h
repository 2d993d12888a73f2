// The first pick of select_diverse: the candidate whose nearest other candidate is farthest, without all pairs.
//
// A token is out as soon as any other is nearer to it than the nearest of the leader, the best token whose nearest is known (at the same
// distance, if the leader has the lower index); what stays to the end has met everybody. Blocks meet in a circle: block b meets itself,
// then b + 1, b + 2, ..., so every pair is met once and each step brings news to all. A pair of blocks with few open tokens computes only
// their rows. Leaders come from seeds, the open tokens with the farthest nearest so far, which are compared with everybody at once.
// 2880 random rows: a third of all pairs; fewer where tokens have close neighbours, as those of an image do. Never more than all pairs
// once and the seeds'. Which pairs are skipped depends on the values only, not on threads or levels, and no skipped one can be the answer.
#pragma once

#include "core/parallel.h"
#include "similarity/diverse_image_cpu.h"

TS_ISA_BEGIN

namespace diverse {

struct Rows {
  const int32_t* list;  // ascending
  int64_t count;
  bool run;  // consecutive from the start of a block: already packed
};

// Distances of rows to the tokens of a block: least[r] = its nearest there; columns[j] = the nearest of the rows, if nearer than before.
static void meet_block(const Task& t, const Image& image, Rows rows, int64_t block, float* least, float* columns) {
  alignas(64) float dot[kDotBlock * kDotBlock], packed[kDotBlock * dots::kDims];
  const int64_t C = t.p.C, panel_floats = dot_panel_floats(C), first = block * kBlockPanels;
  const int64_t panels = smaller(kBlockPanels, dot_ceil(image.n, kPanelRows) - first);
  const bool upper = rows.run && rows.list[0] == block * kDotBlock;  // the block itself: one triangle
  int64_t d = 0;
  do {
    const int64_t dims = smaller(dots::kDims, C - d);
    dots::Side a = {image.panels + rows.list[0] / kPanelRows * panel_floats + d * kLanes, panel_floats};
    if (!rows.run) {
      pack_rows(t, image, rows.list, rows.count, d, dims, packed);
      a = {packed, dot_panel_floats(dims)};
    }
    dots::block(a, rows.count, {image.panels + first * panel_floats + d * kLanes, panel_floats}, panels, dims, d == 0, upper, dot,
                kDotBlock);
    d += dots::kDims;
  } while (d < C);
  Vec near[kBlockPanels];
  for (int64_t k = 0; k < panels; ++k) near[k] = load(columns + k * kLanes);
  for (int64_t r = 0; r < rows.count; ++r) {
    const Vec own = splat(image.squares[rows.list[r]]);
    const int64_t self = rows.list[r] - first * kLanes;
    Vec row = splat(kInfinity);
    for (int64_t k = upper ? r / kLanes : 0; k < panels; ++k) {
      Vec x = distance(t.p.metric, load(dot + r * kDotBlock + k * kLanes), own, load(image.squares + (first + k) * kLanes));
      Mask real = first_lanes(image.n - (first + k) * kLanes);
      if (self >= k * kLanes && self < (k + 1) * kLanes) real &= ~(1u << (self - k * kLanes));  // not its own neighbour
      if (real != 0xffffu) x = select(real, x, splat(kInfinity));
      row = min(x, row);
      near[k] = min(x, near[k]);
    }
    least[r] = reduce_min(row);
  }
  for (int64_t k = 0; k < panels; ++k) store(columns + k * kLanes, near[k]);
}

static int64_t open_tokens(const Image& image, int64_t block, int32_t* list) {
  const Leader leader = {image.state->value, image.state->token};
  int64_t count = 0;
  for (int64_t i = block * kDotBlock; i < smaller((block + 1) * kDotBlock, image.n); ++i) {
    list[count] = static_cast<int32_t>(i);
    count += ahead(image.nearest[i], i, leader) ? 1 : 0;
  }
  return count;
}

// Writes `left` of block b and `right` of block c, which no other task of this step writes.
static void meet_pair(const Task& t, const Image& image, int64_t b, int64_t c) {
  int32_t mine[kDotBlock], theirs[kDotBlock];
  float least[kDotBlock];
  int64_t rows = open_tokens(image, b, mine), others = b == c ? 0 : open_tokens(image, c, theirs);
  const int64_t all = smaller(kDotBlock, image.n - b * kDotBlock);
  const bool whole = rows + others >= all || (b == c && rows > 0);
  if (whole) {  // every pair once, for both
    for (int64_t i = 0; i < all; ++i) mine[i] = static_cast<int32_t>(b * kDotBlock + i);
    rows = all;
    others = 0;
  }
  if (rows > 0) {
    meet_block(t, image, {mine, rows, whole}, c, least, image.right + c * kDotBlock);
    for (int64_t r = 0; r < rows; ++r) image.left[mine[r]] = least[r] < image.left[mine[r]] ? least[r] : image.left[mine[r]];
  }
  if (others > 0) {
    meet_block(t, image, {theirs, others, false}, b, least, image.left + b * kDotBlock);
    for (int64_t r = 0; r < others; ++r) image.right[theirs[r]] = least[r] < image.right[theirs[r]] ? least[r] : image.right[theirs[r]];
  }
}

// What the tasks found becomes common knowledge; up to kDiverseSeeds open tokens become seeds.
static void settle(const Image& image, bool seeds) {
  DiverseState& state = *image.state;
  const int64_t padded = dot_round_up(image.n, kLanes);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec x = min(min(load(image.left + i), load(image.right + i)), load(image.nearest + i));
    store(image.nearest + i, x);
    store(image.best + i, x);
  }
  state.seeds = 0;
  for (; seeds && state.seeds < kDiverseSeeds; ++state.seeds) {
    const Leader top = leader_of(image.best, padded);
    if (!ahead(top.value, top.token, {state.value, state.token})) break;
    image.best[top.token] = -1.0f;
    int32_t at = state.seeds;  // ascending: neighbours in x are neighbours in the packing
    for (; at > 0 && state.seed[at - 1] > top.token; --at) state.seed[at] = state.seed[at - 1];
    state.seed[at] = static_cast<int32_t>(top.token);
  }
}

static void count_open(const Image& image) {
  const Leader leader = {image.state->value, image.state->token};
  int32_t open = 0;
  for (int64_t i = 0; i < image.n; ++i) open += ahead(image.nearest[i], i, leader) ? 1 : 0;
  image.state->open = open;
}

// The seeds have met every block: they know their nearest, and one of them may lead.
static void crown(const Image& image) {
  DiverseState& state = *image.state;
  for (int32_t s = 0; s < state.seeds; ++s) {
    float least = kInfinity;
    for (int64_t block = 0; block < dot_ceil(image.n, kDotBlock); ++block) {
      const float near = image.slots[block * kDiverseSeeds + s];
      least = near < least ? near : least;
    }
    image.nearest[state.seed[s]] = least;
    if (ahead(least, state.seed[s], {state.value, state.token})) {
      state.value = least;
      state.token = state.seed[s];
    }
  }
  settle(image, false);
  count_open(image);
}

static void begin_search(const Image& image, int64_t given) {
  DiverseState& state = *image.state;
  state.open = given >= 0 ? 0 : static_cast<int32_t>(image.n);
  state.seeds = 0;
  state.value = -1.0f;
  state.token = static_cast<int32_t>(given >= 0 ? given : 0);
  for (int64_t i = 0; i < dot_round_up(image.n, kLanes); ++i) {
    image.nearest[i] = i < image.n ? kInfinity : -1.0f;
    image.left[i] = image.right[i] = kInfinity;
  }
}

// After it, state.token of every image is its first pick.
static void find_first(const Task& t, ParallelForFn threads) {
  const int64_t blocks = t.at.blocks, sweep = 1 + 20000 / (t.p.N + 1);
  for (int64_t step = 0; step <= blocks / 2; ++step) {
    parallel_for(threads, t.images * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Image image = image_of(t, i / blocks);
        const int64_t b = i % blocks, all = dot_ceil(image.n, kDotBlock);
        if (image.state->open == 0 || b >= all || 2 * step > all || (2 * step == all && b >= step)) continue;
        meet_pair(t, image, b, (b + step) % all);
      }
    });
    const bool seeds = ((step + 2) & (step + 1)) == 0;  // steps 0, 2, 6, 14, ...
    parallel_for(threads, t.images, sweep, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const Image image = image_of(t, g);
        if (image.state->open > 0) settle(image, seeds && 2 * (step + 1) <= dot_ceil(image.n, kDotBlock));
      }
    });
    if (!seeds) continue;
    parallel_for(threads, t.images * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Image image = image_of(t, i / blocks);
        const int64_t block = i % blocks;
        if (image.state->open == 0 || image.state->seeds == 0 || block >= dot_ceil(image.n, kDotBlock)) continue;
        meet_block(t, image, {image.state->seed, image.state->seeds, false}, block, image.slots + block * kDiverseSeeds,
                   image.right + block * kDotBlock);
      }
    });
    parallel_for(threads, t.images, sweep, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const Image image = image_of(t, g);
        if (image.state->open > 0) crown(image);
      }
    });
  }
  for (int64_t g = 0; g < t.images; ++g) {  // who is still open has met everybody
    const Image image = image_of(t, g);
    if (image.state->open == 0) continue;
    const Leader top = leader_of(image.nearest, dot_round_up(image.n, kLanes));
    if (ahead(top.value, top.token, {image.state->value, image.state->token})) image.state->token = static_cast<int32_t>(top.token);
  }
}

}  // namespace diverse

TS_ISA_END

// The picks of select_diverse after the first, without a distance to every pick from every token.
//
// best[i], the distance to the nearest of the picks that token i has met, only falls, so the token with the largest is the next pick if it
// has met all of them; if not, it meets the missing ones, and the sweep is made again. A token that lost goes on from where it stopped when
// its best leads again: 2880 random rows and 320 picks take 40 distances a token. A sweep gives the largest of each of 16 lanes; those that
// lead the best token that has met all picks are brought on together, six against 16 picks at a time, until that token leads them.
// Where a pick made many tokens meet it, the next one meets all of them at once, at the price of reading all rows.
#pragma once

#include "core/parallel.h"
#include "similarity/diverse_image_cpu.h"

TS_ISA_BEGIN

namespace diverse {

template <typename T>
static void add_pick_of(const Task& t, const Image& image, int64_t token, float* to) {
  const DiverseParams& p = t.p;
  const T* const row = static_cast<const T*>(p.x) + image.b * p.x_stride[0] + image.tokens[token] * p.x_stride[1];
  const Vec scale = splat(p.metric == DiverseMetric::kCosine ? image.scales[token] : 1.0f);
  for (int64_t d = 0; d < p.C; d += kLanes) {
    const int64_t dims = smaller(kLanes, p.C - d);
    float lane[kLanes];
    store(lane, mul(dims == kLanes ? load(row + d) : load_n(row + d, dims), scale));
    for (int64_t j = 0; j < dims; ++j) to[(d + j) * kLanes] = lane[j];
  }
}

// Pick number `number` takes its lane in the panels of the picks.
static void add_pick(const Task& t, const Image& image, int64_t token, int64_t number) {
  const int64_t panel_floats = dot_panel_floats(t.p.C), page = number / kLanes;
  float* const panel = image.picks + page * panel_floats;
  if (number % kLanes == 0) {  // lanes without a pick are computed too: zeros, not denormals
    for (int64_t i = 0; i < panel_floats; i += kLanes) store(panel + i, zero());
    store(image.pick_squares + page * kLanes, zero());
  }
  image.pick_squares[number] = image.squares[token];
  float* const to = panel + number % kLanes;
  if (t.p.dtype == DType::kFloat32) {
    add_pick_of<float>(t, image, token, to);
  } else if (t.p.dtype == DType::kFloat16) {
    add_pick_of<Half>(t, image, token, to);
  } else {
    add_pick_of<BFloat>(t, image, token, to);
  }
}

// Every token meets the last of `done` picks.
static void meet_all(const Task& t, const Image& image, int64_t token, int64_t done, ParallelForFn threads) {
  const int64_t panel_floats = dot_panel_floats(t.p.C), panels = dot_ceil(image.n, kPanelRows);
  const dots::Side a = {image.panels + token / kLanes * panel_floats + token % kLanes, panel_floats};
  const Vec own = splat(image.squares[token]);
  parallel_for(threads, panels, 1 + 20000 / (t.p.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float dot[kLanes];
      dots::all_channels(a, 1, {image.panels + k * panel_floats, panel_floats}, 1, t.p.C, false, dot, 0);
      float* const best = image.best + k * kLanes;
      store(best, min(distance(t.p.metric, load(dot), own, load(image.squares + k * kLanes)), load(best)));
      int32_t* const seen = image.seen + k * kLanes;
      for (int j = 0; j < kLanes; ++j) seen[j] += seen[j] == done - 1 ? 1 : 0;
    }
  });
}

// Up to kDiverseVisits tokens meet the picks that they have not met, 16 at a time, until `known` leads them.
static void visit(const Task& t, const Image& image, const int32_t* list, int64_t count, int64_t done, const Leader& known, float* panel) {
  const int64_t C = t.p.C, panel_floats = dot_panel_floats(C);
  int64_t page = image.seen[list[0]] / kLanes;
  for (int64_t i = 1; i < count; ++i) page = smaller(page, image.seen[list[i]] / kLanes);
  for (int64_t d = 0; d < C; d += dots::kDims) pack_rows(t, image, list, count, d, smaller(dots::kDims, C - d), panel + d * kLanes);
  for (; page * kLanes < done; ++page) {
    int32_t lane[kDiverseVisits];
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t token = list[i];
      lane[rows] = static_cast<int32_t>(i);
      rows += image.seen[token] / kLanes == page && ahead(image.best[token], token, known) ? 1 : 0;
    }
    if (rows == 0) continue;
    float dot[kDiverseVisits * kLanes];
    dots::all_channels({panel, 0, lane}, rows, {image.picks + page * panel_floats, panel_floats}, 1, C, false, dot, kLanes);
    const Vec squares = load(image.pick_squares + page * kLanes);
    const Mask met = first_lanes(done - page * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t token = list[lane[r]];
      const Vec x = distance(t.p.metric, load(dot + r * kLanes), splat(image.squares[token]), squares);
      const float near = reduce_min(select(met, x, splat(kInfinity)));
      image.best[token] = near < image.best[token] ? near : image.best[token];
      image.seen[token] = static_cast<int32_t>(smaller(done, (page + 1) * kLanes));
    }
  }
}

// The token that is farthest from `done` picks; `met` counts those that had to meet some.
static int64_t next_pick(const Task& t, const Image& image, int64_t done, int64_t* met, ParallelForFn threads) {
  const int64_t padded = dot_round_up(image.n, kLanes), panel_floats = dot_panel_floats(t.p.C);
  Leader known = {-1.0f, 0};  // the best of those that have met all picks
  for (*met = 0;;) {
    Leader lanes[kLanes];
    lane_leaders(image.best, padded, lanes);
    const Leader top = leader_of(lanes);
    if (image.seen[top.token] == done) return top.token;
    for (int j = 0; j < kLanes; ++j) {
      if (image.seen[lanes[j].token] == done && ahead(lanes[j].value, lanes[j].token, known)) known = lanes[j];
    }
    int32_t list[kLanes];
    int64_t count = 0;
    for (int j = 0; j < kLanes; ++j) {
      const int32_t token = static_cast<int32_t>(lanes[j].token);
      // While nobody is known, only the top and those that miss picks of the last page alone, which may become known cheaply.
      const bool cheap = known.value >= 0.0f || token == top.token || image.seen[token] / kLanes == (done - 1) / kLanes;
      list[count] = token;
      count += image.seen[token] < done && cheap && ahead(lanes[j].value, token, known) ? 1 : 0;
    }
    // Six tokens against 16 picks of 4096 channels: 8 us, worth a second thread.
    parallel_for(threads, dot_ceil(count, kDiverseVisits), 1 + 4000 / (t.p.C + 1), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * kDiverseVisits;
        visit(t, image, list + first, smaller(kDiverseVisits, count - first), done, known, image.visits + g * panel_floats);
      }
    });
    *met += count;
    for (int64_t i = 0; i < count; ++i) {
      if (image.seen[list[i]] == done && ahead(image.best[list[i]], list[i], known)) known = {image.best[list[i]], list[i]};
    }
  }
}

static void pick_tokens(const Task& t, const Image& image, ParallelForFn threads) {
  const DiverseParams& p = t.p;
  const int64_t picks = smaller(p.K, image.n), padded = dot_round_up(image.n, kLanes);
  int64_t* const out = p.index + image.b * p.K;
  for (int64_t i = picks; i < p.K; ++i) out[i] = -1;
  if (picks == 0) return;
  for (int64_t i = 0; i < padded; ++i) {
    image.best[i] = i < image.n ? kInfinity : -1.0f;
    image.seen[i] = 0;
  }
  int64_t last = image.state->token, met = image.n;
  for (int64_t done = 0;;) {
    out[done] = image.tokens[last];
    image.best[last] = -1.0f;
    if (done + 1 == picks) break;
    add_pick(t, image, last, done++);
    if (met * 6 > image.n) meet_all(t, image, last, done, threads);
    last = next_pick(t, image, done, &met, threads);
  }
  if (p.order == DiverseOrder::kPick) return;
  int64_t kept = 0;
  for (int64_t i = 0; i < image.n; ++i) {
    if (image.best[i] == -1.0f) out[kept++] = image.tokens[i];
  }
}

}  // namespace diverse

TS_ISA_END

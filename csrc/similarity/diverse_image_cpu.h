// What the steps of diverse_cpu work on: one image's part of the workspace, distances, the farthest token. Per instruction level.
#pragma once

#include "core/simd.h"
#include "similarity/diverse_cpu_layout.h"
#include "similarity/dot_tile_cpu.h"

TS_ISA_BEGIN

namespace {

struct ImageState {
  int32_t n;     // candidates
  int32_t done;  // picks are found
  float off;     // rounded products' distances are off by at most this; negative: not known
};

struct Image {
  int64_t b;  // in the batch
  int64_t n;  // candidates
  ImageState* state;
  float *panels, *squares, *nearest, *best, *distances;
  float *error, *inverse, *lower;  // with the filter
  int32_t *tokens, *items, *seen, *picked;
};

struct DiverseTask {
  const DiverseParams& p;
  const DiverseLayout& at;
  bool store;
  int64_t first_image, images;
};

[[maybe_unused]] Image image_of(const DiverseTask& t, int64_t g) {
  float* const work = static_cast<float*>(t.p.workspace);
  const DiverseLayout& at = t.at;
  const int64_t panels = at.rows / kPanelRows * dot_panel_floats(t.p.C);
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(work + offset); };
  Image image;
  image.b = t.first_image + g;
  image.state = reinterpret_cast<ImageState*>(work + at.states + g * 16);
  image.n = image.state->n;
  image.panels = work + at.panels + g * panels;
  image.squares = work + at.squares + g * at.rows;
  image.nearest = work + at.nearest + g * at.blocks * at.rows;
  image.best = work + at.best + g * at.rows;
  image.distances = work + at.distances + g * (t.store ? at.rows * at.rows : at.rows);
  image.tokens = ints(at.tokens) + g * at.rows;
  image.items = ints(at.items) + g * panels / 2;
  image.error = work + at.error + g * at.rows;
  image.inverse = work + at.inverse + g * at.rows;
  image.lower = work + at.lower + g * at.rows;
  image.seen = ints(at.seen) + g * at.rows;
  image.picked = ints(at.picked) + g * at.rows;
  return image;
}

template <typename T>
const T* token_row(const DiverseParams& p, const Image& image, int64_t i) {
  return static_cast<const T*>(p.x) + image.b * p.x_stride[0] + image.tokens[i] * p.x_stride[1];
}

// Never negative; a NaN gives 0. Rows of the same values have a == b == dot, and sqrt(a * a) == a, so their distance is exactly 0.
TS_INLINE Vec distance(DiverseMetric metric, Vec dot, Vec a, Vec b) {
  const Vec d = metric == DiverseMetric::kCosine ? sub(splat(1.0f), div(dot, sqrt(mul(a, b)))) : sub(add(a, b), add(dot, dot));
  return max(d, zero());
}

// best[j] = min(best[j], row[j]); returns the index of the largest, the lowest of equals. Lanes remember their vector's number as a float.
[[maybe_unused]] int64_t update_and_pick(float* best, const float* row, int64_t n) {
  Vec top = splat(-kInfinity), where = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec x = load(best + i);
    if (row) {
      x = min(load(row + i), x);
      store(best + i, x);
    }
    const Mask better = greater(x, top);
    top = select(better, x, top);
    where = select(better, splat(static_cast<float>(i / kLanes)), where);
  }
  float value[kLanes], vector[kLanes];
  store(value, top);
  store(vector, where);
  int64_t pick = static_cast<int64_t>(vector[0]) * kLanes;
  float most = value[0];
  for (int j = 1; j < kLanes; ++j) {
    const int64_t index = static_cast<int64_t>(vector[j]) * kLanes + j;
    if (value[j] > most || (value[j] == most && index < pick)) {
      most = value[j];
      pick = index;
    }
  }
  return pick;
}

// The given first pick among the candidates, or -1.
[[maybe_unused]] int64_t given_first(const DiverseParams& p, const Image& image) {
  if (!p.first || p.first[image.b] < 0) return -1;
  int64_t low = 0, high = image.n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (image.tokens[middle] < p.first[image.b]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < image.n && image.tokens[low] == p.first[image.b] ? low : -1;
}

// best = the distance to the nearest other candidate; -1 for padding.
[[maybe_unused]] void find_nearest(const DiverseTask& t, const Image& image) {
  for (int64_t i = 0; i < dot_round_up(image.n, kLanes); i += kLanes) {
    Vec least = splat(kInfinity);
    for (int64_t block = 0; block < dot_ceil(image.n, kDotBlock); ++block) least = min(load(image.nearest + block * t.at.rows + i), least);
    store(image.best + i, select(first_lanes(image.n - i), least, splat(-1.0f)));
  }
}

// Behind the last pick -1; by position: the picks, whose best is -1, once more in ascending order.
[[maybe_unused]] void write_picks(const DiverseParams& p, const Image& image, int64_t picks) {
  int64_t* const out = p.index + image.b * p.K;
  for (int64_t i = picks; i < p.K; ++i) out[i] = -1;
  if (p.order == DiverseOrder::kPick) return;
  int64_t kept = 0;
  for (int64_t i = 0; i < image.n && kept < picks; ++i) {
    if (image.best[i] == -1.0f) out[kept++] = image.tokens[i];
  }
}

}  // namespace

TS_ISA_END

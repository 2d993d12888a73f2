// One image of select_diverse on the CPU: where its parts lie, its distances, and the order that decides between tokens.
#pragma once

#include "core/simd.h"
#include "similarity/diverse_cpu_layout.h"
#include "similarity/dot_tile_cpu.h"

TS_ISA_BEGIN

namespace diverse {

constexpr int64_t kBlockPanels = kDotBlock / kPanelRows;

struct Image {
  int64_t b;  // in the batch
  int64_t n;  // candidates
  float *panels, *squares, *scales, *nearest, *left, *right, *slots, *best, *picks, *pick_squares, *visits;
  int32_t *seen, *tokens;
  DiverseState* state;
};

struct Task {
  const DiverseParams& p;
  const DiverseLayout& at;
  int64_t first_image, images;
};

static Image image_of(const Task& t, int64_t g) {
  float* const work = static_cast<float*>(t.p.workspace);
  const DiverseLayout& at = t.at;
  const int64_t panel = dot_panel_floats(t.p.C), picks = dot_ceil(t.p.K, kPanelRows);
  Image image;
  image.b = t.first_image + g;
  image.panels = work + at.panels + g * (at.rows / kPanelRows * panel);
  image.squares = work + at.squares + g * at.rows;
  image.scales = work + at.scales + g * at.rows;
  image.nearest = work + at.nearest + g * at.rows;
  image.left = work + at.left + g * at.rows;
  image.right = work + at.right + g * at.rows;
  image.slots = work + at.slots + g * at.blocks * kDiverseSeeds;
  image.best = work + at.best + g * at.rows;
  image.seen = reinterpret_cast<int32_t*>(work + at.seen) + g * at.rows;
  image.picks = work + at.picks + g * picks * panel;
  image.pick_squares = work + at.pick_squares + g * picks * kPanelRows;
  image.visits = work + at.visits + g * kDiverseGroups * panel;
  image.tokens = reinterpret_cast<int32_t*>(work + at.tokens) + g * at.rows;
  image.state = reinterpret_cast<DiverseState*>(work + at.states) + g;
  image.n = image.state->candidates;
  return image;
}

// Never negative; a NaN gives 0. Rows of the same values have a == b == dot, and sqrt(a * a) == a, so their distance is exactly 0.
TS_INLINE Vec distance(DiverseMetric metric, Vec dot, Vec a, Vec b) {
  const Vec d = metric == DiverseMetric::kCosine ? sub(splat(1.0f), div(dot, sqrt(mul(a, b)))) : sub(add(a, b), add(dot, dot));
  return max(d, zero());
}

TS_INLINE float reduce_min(Vec x) { return 0.0f - reduce_max(sub(zero(), x)); }

template <typename T>
static void pack_rows_of(const Task& t, const Image& image, const int32_t* list, int64_t count, int64_t d, int64_t dims, float* to) {
  const DiverseParams& p = t.p;
  const T* const base = static_cast<const T*>(p.x) + image.b * p.x_stride[0];
  for (int64_t r = 0; r < count; r += kLanes) {
    const T* row[kLanes];
    float scale[kLanes];
    for (int j = 0; j < kLanes; ++j) {  // behind the last row: that one again
      const int32_t token = list[smaller(r + j, count - 1)];
      row[j] = base + image.tokens[token] * p.x_stride[1];
      scale[j] = p.metric == DiverseMetric::kCosine ? image.scales[token] : 1.0f;
    }
    dots::pack(row, d, dims, to);
    if (p.metric == DiverseMetric::kCosine) {
      const Vec factor = load(scale);
      for (int64_t i = 0; i < dims * kLanes; i += kLanes) store(to + i, mul(load(to + i), factor));
    }
    to += dot_panel_floats(dims);
  }
}

// Channels [d, d + dims) of the listed candidates in panels of 16, bit for bit what image.panels holds. From the rows, not from there: 16
// channels of one token are one cache line in x and 16 in the panels.
static void pack_rows(const Task& t, const Image& image, const int32_t* list, int64_t count, int64_t d, int64_t dims, float* to) {
  if (t.p.dtype == DType::kFloat32) {
    pack_rows_of<float>(t, image, list, count, d, dims, to);
  } else if (t.p.dtype == DType::kFloat16) {
    pack_rows_of<Half>(t, image, list, count, d, dims, to);
  } else {
    pack_rows_of<BFloat>(t, image, list, count, d, dims, to);
  }
}

struct Leader {
  float value;  // -1: nobody
  int64_t token;
};

// Whether a token of this distance comes before the leader: farther, ties to the lower index.
TS_INLINE bool ahead(float value, int64_t token, const Leader& leader) {
  return value > leader.value || (value == leader.value && token < leader.token);
}

// The largest of every 16th value, first met, and its place. `padded`: a multiple of 16.
static void lane_leaders(const float* values, int64_t padded, Leader* lanes) {
  Vec top = splat(-kInfinity), where = zero();  // the number of a vector as a float: exact below 2^24
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec x = load(values + i);
    where = where_greater(x, top, splat(static_cast<float>(i / kLanes)), where);
    top = max(x, top);
  }
  float value[kLanes], vector[kLanes];
  store(value, top);
  store(vector, where);
  for (int j = 0; j < kLanes; ++j) lanes[j] = {value[j], static_cast<int64_t>(vector[j]) * kLanes + j};
}

static Leader leader_of(const Leader* lanes) {
  Leader leader = lanes[0];
  for (int j = 1; j < kLanes; ++j) {
    if (ahead(lanes[j].value, lanes[j].token, leader)) leader = lanes[j];
  }
  return leader;
}

static Leader leader_of(const float* values, int64_t padded) {
  Leader lanes[kLanes];
  lane_leaders(values, padded, lanes);
  return leader_of(lanes);
}

}  // namespace diverse

TS_ISA_END

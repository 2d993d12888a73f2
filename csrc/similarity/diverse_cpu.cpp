// select_diverse on the CPU: x [B, N, C] (float32, float16, bfloat16) -> index [B, K] int64, greedy max-min. Source: DivPrune (arXiv
// 2503.02175, section 3.3); its loop takes the minimum over all picks anew for every pick, O(K^2 N). This is the same answer in O(K N).
//
// Algorithm: (1) candidates are packed into panels, for the cosine scaled to norm 1; (2) distances of every pair of 144-row blocks i <= j,
// once, written to both places of the matrix, with the distance to the nearest other token taken along; (3) per pick one sweep over the
// last pick's row: distance to the nearest pick = min(so far, row), and its maximum. Where the matrix is not stored (plan), step 3 computes
// the row, and step 2 only runs where a first pick has to be found.
//
// Work: N^2 C multiply-adds (half of the full product), K N minima. N = 2880, C = 4096: 17 G multiply-adds, 190 ms on two AVX2 cores at
// 90 G a second; packing reads 47 MB and the picks 4 MB. Bound by multiply-adds.
// Exact and deterministic: same bits on every level and number of threads; ties to the lowest index.
#include "core/simd.h"
#include "similarity/diverse_cpu_layout.h"
#include "similarity/dot_tile_cpu.h"

TS_ISA_BEGIN

namespace {

struct Image {
  int64_t b;  // in the batch
  int64_t n;  // candidates
  float *panels, *squares, *nearest, *best, *distances;
  int32_t* tokens;
};

struct DiverseTask {
  const DiverseParams& p;
  const DiverseLayout& at;
  bool store;
  int64_t first_image, images;
};

Image image_of(const DiverseTask& t, int64_t g) {
  float* const work = static_cast<float*>(t.p.workspace);
  const DiverseLayout& at = t.at;
  Image image;
  image.b = t.first_image + g;
  image.panels = work + at.panels + g * (at.rows / kPanelRows * dot_panel_floats(t.p.C));
  image.squares = work + at.squares + g * at.rows;
  image.nearest = work + at.nearest + g * at.blocks * at.rows;
  image.best = work + at.best + g * at.rows;
  image.distances = work + at.distances + g * (t.store ? at.rows * at.rows : at.rows);
  image.tokens = reinterpret_cast<int32_t*>(work + at.tokens) + g * at.rows;
  image.n = reinterpret_cast<const int32_t*>(work + at.counts)[g * 16];
  return image;
}

// Positions of the candidates, ascending, so that the tie rule holds among them too.
void list_candidates(const DiverseTask& t, int64_t g) {
  const DiverseParams& p = t.p;
  const Image image = image_of(t, g);
  const uint8_t* const allowed = p.candidates ? p.candidates + image.b * p.candidates_stride : nullptr;
  int32_t n = 0;
  for (int64_t i = 0; i < p.N; ++i) {
    image.tokens[n] = static_cast<int32_t>(i);
    n += !allowed || allowed[i] ? 1 : 0;
  }
  reinterpret_cast<int32_t*>(static_cast<float*>(p.workspace) + t.at.counts)[g * 16] = n;
}

template <typename T>
void pack_tokens(const DiverseTask& t, const Image& image, int64_t panel) {
  const DiverseParams& p = t.p;
  const T* const base = static_cast<const T*>(p.x) + image.b * p.x_stride[0];
  const T* row[kLanes];
  for (int j = 0; j < kLanes; ++j) {  // behind the last candidate: that one again
    row[j] = base + image.tokens[smaller(panel * kLanes + j, image.n - 1)] * p.x_stride[1];
  }
  float* const to = image.panels + panel * dot_panel_floats(p.C);
  Vec squares = dots::pack_panel(row, p.C, to);
  if (p.metric == DiverseMetric::kCosine) {
    squares = dots::scale_panel(to, p.C, dots::inverse_norm(squares));
    squares = select(greater(squares, zero()) | is_nan(squares), squares, splat(1.0f));  // norm 0: cosine 0
  }
  store(image.squares + panel * kLanes, squares);
}

// Never negative; a NaN gives 0. Rows of the same values have a == b == dot, and sqrt(a * a) == a, so their distance is exactly 0.
TS_INLINE Vec distance(DiverseMetric metric, Vec dot, Vec a, Vec b) {
  const Vec d = metric == DiverseMetric::kCosine ? sub(splat(1.0f), div(dot, sqrt(mul(a, b)))) : sub(add(a, b), add(dot, dot));
  return max(d, zero());
}

// 16 x 16 dot products of panels i <= j become distances, go to both places of the matrix, and give every token its nearest in the other.
TS_INLINE void finish_square(const DiverseTask& t, const Image& image, const float* dot, int64_t i, int64_t j, Vec* near_i, Vec* near_j) {
  const int64_t pitch = t.at.rows;
  const Vec squares_j = load(image.squares + j * kLanes);
  const Mask real_j = first_lanes(image.n - j * kLanes);
  Vec x[kLanes], least = *near_j;
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    x[r] = distance(t.p.metric, load(dot + r * kDotBlock), splat(image.squares[i * kLanes + r]), squares_j);
    if (t.store) store(image.distances + (i * kLanes + r) * pitch + j * kLanes, x[r]);
    x[r] = select(i == j ? real_j & ~(1u << r) : real_j, x[r], splat(kInfinity));  // neither itself nor padding is a neighbour
    if (i * kLanes + r < image.n) least = min(x[r], least);
  }
  *near_j = least;
  if (i == j) return;
  transpose(x);
  least = *near_i;
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (t.store) store(image.distances + (j * kLanes + r) * pitch + i * kLanes, x[r]);
    least = min(x[r], least);
  }
  *near_i = least;
}

void distance_block(const DiverseTask& t, const Image& image, int64_t bi, int64_t bj) {
  alignas(64) float dot[kDotBlock * kDotBlock];
  constexpr int64_t kBlockPanels = kDotBlock / kPanelRows;
  const int64_t C = t.p.C, panel_floats = dot_panel_floats(C), all = dot_ceil(image.n, kPanelRows);
  const int64_t i0 = bi * kBlockPanels, j0 = bj * kBlockPanels;
  const int64_t rows = smaller(kBlockPanels, all - i0), columns = smaller(kBlockPanels, all - j0);
  const dots::Side a = {image.panels + i0 * panel_floats, panel_floats}, b = {image.panels + j0 * panel_floats, panel_floats};
  dots::all_channels(a, rows * kLanes, b, columns, C, bi == bj, dot, kDotBlock);
  Vec near_i[kBlockPanels], near_j[kBlockPanels];
  for (int64_t k = 0; k < kBlockPanels; ++k) near_i[k] = near_j[k] = splat(kInfinity);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = bi == bj ? i : 0; j < columns; ++j) {
      finish_square(t, image, dot + i * kLanes * kDotBlock + j * kLanes, i0 + i, j0 + j, near_i + i, near_j + j);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {  // slot [other block][token], so every slot has one writer
    const Vec own = bi == bj ? min(near_i[i], near_j[i]) : near_i[i];
    store(image.nearest + bj * t.at.rows + (i0 + i) * kLanes, own);
  }
  if (bi == bj) return;
  for (int64_t j = 0; j < columns; ++j) store(image.nearest + bi * t.at.rows + (j0 + j) * kLanes, near_j[j]);
}

// best[j] = min(best[j], row[j]); returns the index of the largest, the lowest of equals. Lanes remember their vector's number as a float.
int64_t update_and_pick(float* best, const float* row, int64_t n) {
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
int64_t given_first(const DiverseParams& p, const Image& image) {
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

int64_t most_isolated(const DiverseTask& t, const Image& image) {
  const int64_t padded = dot_round_up(image.n, kLanes);
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vec least = splat(kInfinity);
    for (int64_t block = 0; block < dot_ceil(image.n, kDotBlock); ++block) least = min(load(image.nearest + block * t.at.rows + i), least);
    store(image.best + i, select(first_lanes(image.n - i), least, splat(-1.0f)));
  }
  return update_and_pick(image.best, nullptr, padded);
}

void distance_row(const DiverseTask& t, const Image& image, int64_t token, ParallelForFn threads) {
  const int64_t panel_floats = dot_panel_floats(t.p.C), panels = dot_ceil(image.n, kPanelRows);
  const dots::Side a = {image.panels + token / kLanes * panel_floats + token % kLanes, panel_floats};
  const Vec own = splat(image.squares[token]);
  parallel_for(threads, panels, 1 + 20000 / (t.p.C + 1), [&](int64_t begin, int64_t end) {
    float* const row = image.distances + begin * kLanes;
    dots::all_channels(a, 1, {image.panels + begin * panel_floats, panel_floats}, end - begin, t.p.C, false, row, 0);
    for (int64_t i = 0; i < (end - begin) * kLanes; i += kLanes) {
      store(row + i, distance(t.p.metric, load(row + i), own, load(image.squares + begin * kLanes + i)));
    }
  });
}

void pick_tokens(const DiverseTask& t, const Image& image, ParallelForFn threads) {
  const DiverseParams& p = t.p;
  const int64_t picks = smaller(p.K, image.n), padded = dot_round_up(image.n, kLanes);
  int64_t* const out = p.index + image.b * p.K;
  for (int64_t i = picks; i < p.K; ++i) out[i] = -1;
  if (picks == 0) return;
  int64_t last = given_first(p, image);
  if (last < 0) last = most_isolated(t, image);
  for (int64_t i = 0; i < padded; ++i) image.best[i] = i < image.n ? kInfinity : -1.0f;
  for (int64_t done = 0;;) {
    out[done++] = image.tokens[last];
    image.best[last] = -1.0f;
    if (done == picks) break;
    if (!t.store) distance_row(t, image, last, threads);
    last = update_and_pick(image.best, t.store ? image.distances + last * t.at.rows : image.distances, padded);
  }
  if (p.order == DiverseOrder::kPick) return;
  int64_t kept = 0;
  for (int64_t i = 0; i < image.n; ++i) {
    if (image.best[i] == -1.0f) out[kept++] = image.tokens[i];
  }
}

template <typename T>
void run_images(const DiverseTask& t, ParallelForFn threads) {
  const int64_t panels = t.at.rows / kPanelRows, C = t.p.C;
  parallel_for(threads, t.images, 1 + 50000 / (t.p.N + 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) list_candidates(t, g);
  });
  parallel_for(threads, t.images * panels, 1 + 4000 / (C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Image image = image_of(t, i / panels);
      if (i % panels * kPanelRows < image.n) pack_tokens<T>(t, image, i % panels);
    }
  });
  parallel_tasks(threads, t.images * t.at.pairs, 1 + 20 / (C + 1), [&](int64_t i) {
    const Image image = image_of(t, i / t.at.pairs);
    if (!t.store && given_first(t.p, image) >= 0) return;
    int64_t bi = 0, rest = i % t.at.pairs;
    for (; rest >= t.at.blocks - bi; ++bi) rest -= t.at.blocks - bi;
    if ((bi + rest) * kDotBlock < image.n) distance_block(t, image, bi, bi + rest);
  });
  if (!t.store) {  // rows are shared among the threads
    for (int64_t g = 0; g < t.images; ++g) pick_tokens(t, image_of(t, g), threads);
    return;
  }
  parallel_for(threads, t.images, 1 + 20000 / (t.p.K * (t.p.N / 8 + 20) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) pick_tokens(t, image_of(t, g), nullptr);
  });
}

}  // namespace

Status diverse_level(const DiverseParams& p, bool store_distances, ParallelForFn threads) {
  const DiverseLayout at = diverse_layout(p, store_distances);
  for (int64_t b = 0; b < p.B; b += at.images) {
    const DiverseTask t = {p, at, store_distances, b, smaller(at.images, p.B - b)};
    if (p.dtype == DType::kFloat32) {
      run_images<float>(t, threads);
    } else if (p.dtype == DType::kFloat16) {
      run_images<Half>(t, threads);
    } else {
      run_images<BFloat>(t, threads);
    }
  }
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status diverse_level(const DiverseParams& params, bool store_distances, ParallelForFn threads))

Status diverse_cpu(const DiverseParams& params, const DiversePlan& plan, CpuLevel level, ParallelForFn threads) {
  const DiverseParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("x must be float32, float16 or bfloat16");
  if (p.N >= int64_t{1} << 24) return Status::error("N must be below 2^24");
  if (p.K < 0 || p.K > p.N) return Status::error("k must be in [0, N]");
  for (int64_t b = 0; p.first && b < p.B; ++b) {
    if (p.first[b] < -1 || p.first[b] >= p.N) return Status::error("first must be in [-1, N)");
  }
  if (p.B == 0 || p.K == 0) return Status::success();
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, diverse_level(params, plan.store_distances, threads))
}
}  // namespace tokensieve
#endif

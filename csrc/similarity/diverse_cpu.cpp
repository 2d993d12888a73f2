// select_diverse on the CPU: x [B, N, C] (float32, float16, bfloat16) -> index [B, K] int64, greedy max-min. Source: DivPrune (arXiv
// 2503.02175, section 3.3); its loop takes the minimum over all picks anew for every pick, O(K^2 N). This is the same answer in O(K N).
//
// Algorithm: (1) candidates are packed into panels, for the cosine scaled to norm 1; (2) distances of every pair of 144-row blocks i <= j,
// once, written to both places of the matrix, with the distance to the nearest other token taken along; (3) per pick one sweep over the
// last pick's row: distance to the nearest pick = min(so far, row), and its maximum. Where the matrix is not stored (plan), step 3 computes
// the row, and step 2 only runs where a first pick has to be found. Cosines of many channels: int16 products in step 2, exact ones only of
// pairs that decide (diverse_filter_cpu.h).
//
// Work: N^2 C / 2 multiply-adds (half of the full product), K N minima. N = 2880, C = 4096: 17 G multiply-adds, 190 ms on two AVX2 cores at
// 90 G a second, 105 ms as int16 at 160 G; packing reads 47 MB and the picks 4 MB. Bound by multiply-adds.
// Exact and deterministic: same bits on every level and number of threads; ties to the lowest index.
#include "similarity/diverse_filter_cpu.h"

TS_ISA_BEGIN

namespace {

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
  *image.state = {n, 0, -1.0f};
}

template <typename T>
void pack_tokens(const DiverseTask& t, const Image& image, int64_t panel) {
  const DiverseParams& p = t.p;
  const T* row[kLanes];  // behind the last candidate: that one again
  for (int j = 0; j < kLanes; ++j) row[j] = token_row<T>(p, image, smaller(panel * kLanes + j, image.n - 1));
  float* const to = image.panels + panel * dot_panel_floats(p.C);
  Vec squares = dots::pack_panel(row, p.C, to);
  if (p.metric == DiverseMetric::kCosine) {
    const Vec inverse = dots::inverse_norm(squares);
    squares = dots::scale_panel(to, p.C, inverse);
    if (t.at.filter) {
      store(image.inverse + panel * kLanes, inverse);
      const Vec error = rounded::round_panel(to, p.C, splat(1.0f), image.items + panel * rounded::panel_items(p.C));
      store(image.error + panel * kLanes, error);
    }
    squares = select(greater(squares, zero()) | is_nan(squares), squares, splat(1.0f));  // norm 0: cosine 0
  }
  store(image.squares + panel * kLanes, squares);
}

TS_INLINE Vec distance_of(const DiverseTask& t, const float* dot, Vec a, Vec b) { return distance(t.p.metric, load(dot), a, b); }
// Of rounded products: of rows of norm 1, or 0 and then 1.
TS_INLINE Vec distance_of(const DiverseTask&, const int32_t* dot, Vec, Vec) {
  const Vec unit = splat(1.0f / (rounded::kScale * rounded::kScale));
  return max(sub(splat(1.0f), mul(to_float(load(dot)), unit)), zero());
}

// 16 x 16 dot products of panels i <= j become distances, go to both places of the matrix, and give every token its nearest in the other.
template <typename Item>
TS_INLINE void finish_square(const DiverseTask& t, const Image& image, const Item* dot, int64_t i, int64_t j, Vec* near_i, Vec* near_j) {
  const int64_t pitch = t.at.rows;
  const Vec squares_j = load(image.squares + j * kLanes);
  const Mask real_j = first_lanes(image.n - j * kLanes);
  Vec x[kLanes], least = *near_j;
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    x[r] = distance_of(t, dot + r * kDotBlock, splat(image.squares[i * kLanes + r]), squares_j);
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

// panels: of `items` items a row.
template <typename Item>
void distance_block(const DiverseTask& t, const Image& image, const Item* panels, int64_t panel_step, int64_t items, int64_t bi,
                    int64_t bj) {
  alignas(64) Item dot[kDotBlock * kDotBlock];
  constexpr int64_t kBlockPanels = kDotBlock / kPanelRows;
  const int64_t all = dot_ceil(image.n, kPanelRows);
  const int64_t i0 = bi * kBlockPanels, j0 = bj * kBlockPanels;
  const int64_t rows = smaller(kBlockPanels, all - i0), columns = smaller(kBlockPanels, all - j0);
  const dots::SideOf<Item> a = {panels + i0 * panel_step, panel_step}, b = {panels + j0 * panel_step, panel_step};
  dots::all_channels(a, rows * kLanes, b, columns, items, bi == bj, dot, kDotBlock);
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
  const int64_t picks = smaller(t.p.K, image.n), padded = dot_round_up(image.n, kLanes);
  int64_t last = picks > 0 ? given_first(t.p, image) : 0;
  if (last < 0) {
    find_nearest(t, image);
    last = update_and_pick(image.best, nullptr, padded);
  }
  for (int64_t i = 0; i < padded; ++i) image.best[i] = i < image.n ? kInfinity : -1.0f;
  for (int64_t done = 0; done < picks;) {
    t.p.index[image.b * t.p.K + done++] = image.tokens[last];
    image.best[last] = -1.0f;
    if (done == picks) break;
    if (!t.store) distance_row(t, image, last, threads);
    last = update_and_pick(image.best, t.store ? image.distances + last * t.at.rows : image.distances, padded);
  }
  write_picks(t.p, image, picks);
}

// run(image, bi, bj) for all pairs of blocks bi <= bj of every image.
template <typename Run>
void for_each_pair(const DiverseTask& t, ParallelForFn threads, Run&& run) {
  parallel_tasks(threads, t.images * t.at.pairs, 1 + 20 / (t.p.C + 1), [&](int64_t i) {
    const Image image = image_of(t, i / t.at.pairs);
    int64_t bi = 0, rest = i % t.at.pairs;
    for (; rest >= t.at.blocks - bi; ++bi) rest -= t.at.blocks - bi;
    if ((bi + rest) * kDotBlock < image.n) run(image, bi, bi + rest);
  });
}

// Picks by rounded products, of the images where that can be done.
template <typename T>
void run_filter(const DiverseTask& t, ParallelForFn threads) {
  const int64_t step = rounded::panel_items(t.p.C);
  parallel_for(threads, t.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Image image = image_of(t, g);
      image.state->off = filter::largest_difference<T>(t.p, image);
    }
  });
  for_each_pair(t, threads, [&](const Image& image, int64_t bi, int64_t bj) {
    if (image.state->off >= 0.0f) distance_block<int32_t>(t, image, image.items, step, step / kPanelRows, bi, bj);
  });
  parallel_for(threads, t.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Image image = image_of(t, g);
      image.state->done = image.state->off >= 0.0f && filter::Picker<T>(t, image).run();
    }
  });
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
  if (t.at.filter) run_filter<T>(t, threads);
  for_each_pair(t, threads, [&](const Image& image, int64_t bi, int64_t bj) {
    if (image.state->done || (!t.store && given_first(t.p, image) >= 0)) return;
    distance_block(t, image, image.panels, dot_panel_floats(C), C, bi, bj);
  });
  if (!t.store) {  // rows are shared among the threads
    for (int64_t g = 0; g < t.images; ++g) pick_tokens(t, image_of(t, g), threads);
    return;
  }
  parallel_for(threads, t.images, 1 + 20000 / (t.p.K * (t.p.N / 8 + 20) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Image image = image_of(t, g);
      if (!image.state->done) pick_tokens(t, image, nullptr);
    }
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

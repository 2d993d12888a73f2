// select_diverse on the CPU: x [B, N, C] (float32, float16, bfloat16) -> index [B, K] int64, greedy max-min. Source: DivPrune (arXiv
// 2503.02175, section 3.3); its loop takes the minimum over all picks anew for every pick, O(K^2 N), from a matrix of all N^2 distances.
// This is the same answer from a fraction of the distances, and no matrix.
//
// Algorithm: (1) candidates are packed into panels, for the cosine scaled to norm 1; (2) the first pick, the token whose nearest other is
// farthest: a token that has met a neighbour nearer than the leader's is done (diverse_first_cpu.h); (3) the other picks: a token meets
// the picks that it has not met only when its distance to those that it has met is the largest of all (diverse_picks_cpu.h).
//
// Work: N^2 C / 2 + K N C multiply-adds at most, but for the seeds of (2); of random rows a third of the first part and an eighth of the
// second, of image tokens, which have near neighbours, less. Bound by multiply-adds, as memory goes by N C: packing reads and writes it.
// Exact and deterministic: a distance has the same bits wherever it is computed, and only distances that cannot decide are left out, so the
// picks are those of the loop over the full matrix, on every level and number of threads; ties to the lowest index.
#include "core/simd.h"
#include "similarity/diverse_first_cpu.h"
#include "similarity/diverse_picks_cpu.h"

TS_ISA_BEGIN

namespace diverse {

// Positions of the candidates, ascending, so that the tie rule holds among them too.
static void list_candidates(const Task& t, int64_t g) {
  const DiverseParams& p = t.p;
  const Image image = image_of(t, g);
  const uint8_t* const allowed = p.candidates ? p.candidates + image.b * p.candidates_stride : nullptr;
  int32_t n = 0;
  for (int64_t i = 0; i < p.N; ++i) {
    image.tokens[n] = static_cast<int32_t>(i);
    n += !allowed || allowed[i] ? 1 : 0;
  }
  image.state->candidates = n;
}

// The given first pick among the candidates, or -1.
static int64_t given_first(const DiverseParams& p, const Image& image) {
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

template <typename T>
static void pack_tokens(const Task& t, const Image& image, int64_t panel) {
  const DiverseParams& p = t.p;
  const T* const base = static_cast<const T*>(p.x) + image.b * p.x_stride[0];
  const T* row[kLanes];
  for (int j = 0; j < kLanes; ++j) {  // behind the last candidate: that one again
    row[j] = base + image.tokens[smaller(panel * kLanes + j, image.n - 1)] * p.x_stride[1];
  }
  float* const to = image.panels + panel * dot_panel_floats(p.C);
  Vec squares = dots::pack_panel(row, p.C, to);
  if (p.metric == DiverseMetric::kCosine) {
    const Vec scale = dots::inverse_norm(squares);
    store(image.scales + panel * kLanes, scale);
    squares = dots::scale_panel(to, p.C, scale);
    squares = select(greater(squares, zero()) | is_nan(squares), squares, splat(1.0f));  // norm 0: cosine 0
  }
  store(image.squares + panel * kLanes, squares);
}

template <typename T>
static void run_images(const Task& t, ParallelForFn threads) {
  const int64_t panels = t.at.rows / kPanelRows, C = t.p.C;
  parallel_for(threads, t.images, 1 + 50000 / (t.p.N + 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      list_candidates(t, g);
      const Image image = image_of(t, g);
      begin_search(image, given_first(t.p, image));
    }
  });
  parallel_for(threads, t.images * panels, 1 + 4000 / (C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Image image = image_of(t, i / panels);
      if (i % panels * kPanelRows < image.n) pack_tokens<T>(t, image, i % panels);
    }
  });
  find_first(t, threads);
  if (t.images == 1) return pick_tokens(t, image_of(t, 0), threads);
  parallel_for(threads, t.images, 1 + 2000 / (t.p.K * (C / 16 + t.p.N / 64 + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) pick_tokens(t, image_of(t, g), nullptr);
  });
}

}  // namespace diverse

Status diverse_level(const DiverseParams& p, ParallelForFn threads) {
  const DiverseLayout at = diverse_layout(p);
  for (int64_t b = 0; b < p.B; b += at.images) {
    const diverse::Task t = {p, at, b, smaller(at.images, p.B - b)};
    if (p.dtype == DType::kFloat32) {
      diverse::run_images<float>(t, threads);
    } else if (p.dtype == DType::kFloat16) {
      diverse::run_images<Half>(t, threads);
    } else {
      diverse::run_images<BFloat>(t, threads);
    }
  }
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status diverse_level(const DiverseParams& params, ParallelForFn threads))

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
  TS_CPU_SWITCH(level, diverse_level(params, threads))
}
}  // namespace tokensieve
#endif

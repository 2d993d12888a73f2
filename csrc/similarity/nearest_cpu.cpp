// nearest_center on the CPU: x [B, N, C], centers [B, K] -> labels [B, N] int64, the centre that is nearest to each token. Source: DPC-KNN
// (arXiv 2204.08680, section 3.2).
//
// Algorithm: tokens and centres less the tokens' mean are packed into panels; per block of 144 tokens the squared distances to 144 centres at
// a time, and a running minimum. Where products cannot tell which centre is nearest, differences decide. A centre has its own label.
//
// Work: N K C multiply-adds: N = 2880, K = 720, C = 1024: 2.1 G, 24 ms on two AVX2 cores at 90 G a second. Bound by multiply-adds; packing reads
// N C values twice. Deterministic: same bits on every level and number of threads; ties to the first centre.
#include "similarity/centered_cpu.h"
#include "similarity/density_cpu_layout.h"
#include "similarity/near_rows_cpu.h"

TS_ISA_BEGIN

namespace {

struct NearestTask {
  const NearestParams& p;
  const NearestLayout& at;
  int64_t first_image, images;
};

struct Image {
  int64_t b;
  float *mean, *panels, *squares, *center_panels, *center_squares;
  const int64_t* centers;
};

Image image_of(const NearestTask& t, int64_t g) {
  float* const work = static_cast<float*>(t.p.workspace);
  const NearestLayout& at = t.at;
  const int64_t panel = dot_panel_floats(t.p.C);
  const auto of = [&](int64_t offset, int64_t size) { return work + offset + g * dot_round_up(size, 16); };
  Image image;
  image.b = t.first_image + g;
  image.mean = of(at.mean, t.p.C);
  image.panels = of(at.panels, at.rows / kPanelRows * panel);
  image.squares = of(at.squares, at.rows);
  image.center_panels = of(at.center_panels, at.center_rows / kPanelRows * panel);
  image.center_squares = of(at.center_squares, at.center_rows);
  image.centers = t.p.centers + image.b * t.p.K;
  return image;
}

template <typename T>
void pack_tokens(const NearestTask& t, const Image& image, int64_t panel) {
  const NearestParams& p = t.p;
  const T* const x = static_cast<const T*>(p.x) + image.b * p.x_stride[0];
  const T* row[kLanes];
  for (int j = 0; j < kLanes; ++j) row[j] = x + smaller(panel * kLanes + j, p.N - 1) * p.x_stride[1];
  store(image.squares + panel * kLanes, centered::pack(row, image.mean, p.C, image.panels + panel * dot_panel_floats(p.C)));
}

template <typename T>
void pack_centers(const NearestTask& t, const Image& image, int64_t panel) {
  const NearestParams& p = t.p;
  const T* const x = static_cast<const T*>(p.x) + image.b * p.x_stride[0];
  const T* row[kLanes];
  Mask real = 0;
  for (int j = 0; j < kLanes; ++j) {
    const int64_t c = panel * kLanes + j, token = c < p.K ? image.centers[c] : -1;
    real |= token >= 0 ? 1u << j : 0u;
    row[j] = x + (token >= 0 ? token : 0) * p.x_stride[1];
  }
  const Vec squares = centered::pack(row, image.mean, p.C, image.center_panels + panel * dot_panel_floats(p.C));
  store(image.center_squares + panel * kLanes, select(real, squares, splat(kInfinity)));
}

// 16 tokens: the centre that products say is the nearest, and whether it is nearer than every other one whatever they are off by.
struct Labels {
  Vec label, closest, second, bound;  // the two smallest that a distance may be; the nearest centre is not farther than `bound`

  static Labels start(float label) { return {splat(label), splat(kInfinity), splat(kInfinity), splat(kInfinity)}; }
  void meet(Vec distance, Vec off, float center) {
    const Vec low = near::closest(distance, off);
    label = where_greater(closest, low, splat(center), label);
    second = where_greater(closest, low, closest, min(low, second));
    closest = min(low, closest);
    bound = min(near::farthest(distance, off), bound);
  }
  Mask unsure() const { return greater(splat(kInfinity), bound) & ~greater(second, bound); }
};

template <typename T>
int64_t nearest_by_differences(const near::Tokens<T>& tokens, int64_t token, const int64_t* centers, int64_t K) {
  int64_t nearest = -1;
  float least = kInfinity;
  for (int64_t c = 0; c < K && least > 0.0f; ++c) {
    const float distance = centers[c] >= 0 ? tokens.difference(token, centers[c]) : kInfinity;
    if (distance < least) {
      least = distance;
      nearest = c;
    }
  }
  return nearest;
}

template <typename T>
void write_labels(const NearestTask& t, const Image& image, const Labels& found, int64_t token) {
  const NearestParams& p = t.p;
  const near::Tokens<T> tokens = {static_cast<const T*>(p.x) + image.b * p.x_stride[0], p.x_stride[1], p.C};
  int64_t* const out = p.labels + image.b * p.N;
  const Mask unsure = found.unsure();
  float label[kLanes];
  store(label, found.label);
  for (int64_t i = 0; i < smaller(kLanes, p.N - token); ++i) {
    out[token + i] = unsure >> i & 1 ? nearest_by_differences(tokens, token + i, image.centers, p.K) : static_cast<int64_t>(label[i]);
  }
}

template <typename T>
void label_block(const NearestTask& t, const Image& image, int64_t block) {
  alignas(64) float dot[kDotBlock * kDotBlock];
  constexpr int64_t kBlockPanels = kDotBlock / kPanelRows;
  const NearestParams& p = t.p;
  const int64_t panel_floats = dot_panel_floats(p.C), first = block * kBlockPanels;
  const int64_t columns = smaller(kBlockPanels, t.at.rows / kPanelRows - first);
  const dots::Side tokens = {image.panels + first * panel_floats, panel_floats};
  const Vec doubt = splat(centered::doubt(p.C));
  int64_t lowest = 0;
  while (lowest < p.K && image.centers[lowest] < 0) ++lowest;
  Labels found[kBlockPanels];
  for (int64_t j = 0; j < columns; ++j) found[j] = Labels::start(lowest < p.K ? static_cast<float>(lowest) : -1.0f);
  for (int64_t c = 0; c < p.K; c += kDotBlock) {
    const int64_t centers = smaller(kDotBlock, p.K - c);
    const dots::Side side = {image.center_panels + c / kPanelRows * panel_floats, panel_floats};
    dots::all_channels(side, centers, tokens, columns, p.C, false, dot, kDotBlock);
    for (int64_t j = 0; j < columns; ++j) {
      const Vec squares = load(image.squares + (first + j) * kLanes);
      for (int64_t i = 0; i < centers; ++i) {
        const Vec square = splat(image.center_squares[c + i]);
        const Vec d = centered::squared_distance(load(dot + i * kDotBlock + j * kLanes), square, squares);
        found[j].meet(d, mul(doubt, add(square, squares)), static_cast<float>(c + i));
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) write_labels<T>(t, image, found[j], (first + j) * kLanes);
}

template <typename T>
Status run(const NearestParams& p, ParallelForFn threads) {
  const NearestLayout at = nearest_layout(p);
  const int64_t panels = at.rows / kPanelRows, all = panels + at.center_rows / kPanelRows, parts = dot_ceil(p.C, 64);
  const int64_t blocks = dot_ceil(p.N, kDotBlock);
  for (int64_t b = 0; b < p.B; b += at.images) {
    const NearestTask t = {p, at, b, smaller(at.images, p.B - b)};
    parallel_for(threads, t.images * parts, 1 + 100000 / (64 * p.N), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Image image = image_of(t, i / parts);
        const int64_t d = i % parts * 64;
        const T* const x = static_cast<const T*>(p.x) + image.b * p.x_stride[0];
        centered::mean_rows(x, p.x_stride[1], p.N, d, smaller(d + 64, p.C), image.mean);
      }
    });
    parallel_for(threads, t.images * all, 1 + 4000 / (p.C + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Image image = image_of(t, i / all);
        if (i % all < panels) {
          pack_tokens<T>(t, image, i % all);
        } else {
          pack_centers<T>(t, image, i % all - panels);
        }
      }
    });
    parallel_tasks(threads, t.images * blocks, 1 + 20000 / ((p.K + 1) * (p.C + 1)),
                   [&](int64_t i) { label_block<T>(t, image_of(t, i / blocks), i % blocks); });
    for (int64_t g = 0; g < t.images; ++g) {  // from behind: of a token that is listed twice, the first place counts
      const Image image = image_of(t, g);
      for (int64_t c = p.K - 1; c >= 0; --c) {
        if (image.centers[c] >= 0) p.labels[image.b * p.N + image.centers[c]] = c;
      }
    }
  }
  return Status::success();
}

}  // namespace

Status nearest_level(const NearestParams& p, ParallelForFn threads) {
  if (p.dtype == DType::kFloat32) return run<float>(p, threads);
  if (p.dtype == DType::kFloat16) return run<Half>(p, threads);
  return run<BFloat>(p, threads);
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status nearest_level(const NearestParams& params, ParallelForFn threads))

Status nearest_cpu(const NearestParams& params, const NearestPlan& plan, CpuLevel level, ParallelForFn threads) {
  const NearestParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("x must be float32, float16 or bfloat16");
  if (p.N >= int64_t{1} << 24 || p.K >= int64_t{1} << 24) return Status::error("N and K must be below 2^24");
  if (p.B == 0 || p.N == 0) return Status::success();
  for (int64_t i = 0; i < p.B * p.K; ++i) {
    if (p.centers[i] < -1 || p.centers[i] >= p.N) return Status::error("centers must be in [-1, N)");
  }
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, nearest_level(params, threads))
}
}  // namespace tokensieve
#endif

// knn_density on the CPU: x [B, N, C] (float32, float16, bfloat16) -> density, distance [B, N] float32. Source: DPC-KNN as in TCFormer
// (arXiv 2204.08680, section 3.2), which stores the matrix of distances, sorts its rows and builds two more matrices of masks.
//
// Algorithm: (1) tokens less their mean are packed into panels; (2) squared distances of every pair of 144-row blocks i <= j, once, written to
// both places of the matrix; (3) per row the k smallest, and the density; (4) per row the nearest of the denser tokens. Products say which
// tokens (3) and (4) may mean, differences decide among them (near_rows_cpu.h). Beyond 8192 tokens 8 strips of 144 rows replace the matrix,
// and (2) runs before (3) and before (4).
//
// Work: N^2 C / 2 multiply-adds; steps 3 and 4 read the matrix twice each. N = 2880, C = 1024: 4.2 G multiply-adds, 47 ms on two AVX2 cores at
// 90 G a second; the matrix is 33 MB, 3 ms a pass. Bound by multiply-adds. Many tokens that are alike beside their distance to the mean all go
// through differences: N^2 C of them at worst.
// Deterministic: same bits on every level and number of threads.
#include "similarity/centered_cpu.h"
#include "similarity/density_cpu_layout.h"
#include "similarity/near_rows_cpu.h"

TS_ISA_BEGIN

namespace {

struct DensityTask {
  const DensityParams& p;
  const DensityLayout& at;
  bool store;
  int64_t first_image, images;
};

struct Image {
  int64_t b;  // in the batch
  float *mean, *panels, *squares, *distances, *maxima, *density, *missing, *most;
  uint32_t* real;
  uint64_t* heaps;
};

Image image_of(const DensityTask& t, int64_t g) {
  float* const work = static_cast<float*>(t.p.workspace);
  const DensityLayout& at = t.at;
  const auto of = [&](int64_t offset, int64_t size) { return work + offset + g * dot_round_up(size, 16); };
  Image image;
  image.b = t.first_image + g;
  image.mean = of(at.mean, t.p.C);
  image.panels = of(at.panels, at.rows / kPanelRows * dot_panel_floats(t.p.C));
  image.squares = of(at.squares, at.rows);
  image.distances = of(at.distances, at.stored_rows * at.rows);
  image.maxima = of(at.maxima, at.blocks * at.blocks);
  image.real = reinterpret_cast<uint32_t*>(of(at.real, at.rows / kPanelRows));
  image.heaps = reinterpret_cast<uint64_t*>(of(at.heaps, 2 * at.blocks * t.p.k));
  image.density = of(at.density, at.rows);
  image.missing = of(at.missing, at.rows);
  image.most = of(at.most, 1);
  return image;
}

template <typename T>
const T* tokens_of(const DensityTask& t, const Image& image) {
  return static_cast<const T*>(t.p.x) + image.b * t.p.x_stride[0];
}

template <typename T>
void pack_tokens(const DensityTask& t, const Image& image, int64_t panel) {
  const DensityParams& p = t.p;
  const T* row[kLanes];
  for (int j = 0; j < kLanes; ++j) row[j] = tokens_of<T>(t, image) + smaller(panel * kLanes + j, p.N - 1) * p.x_stride[1];
  store(image.squares + panel * kLanes, centered::pack(row, image.mean, p.C, image.panels + panel * dot_panel_floats(p.C)));
  Mask real = first_lanes(p.N - panel * kLanes);
  for (int j = 0; p.mask && j < kLanes && panel * kLanes + j < p.N; ++j) {
    if (!p.mask[image.b * p.mask_stride + panel * kLanes + j]) real &= ~(1u << j);
  }
  image.real[panel] = real;
}

// 16 x 16 products of panels i and j become squared distances in `row` (and transposed in `mirror`, if any); `most` grows to the largest.
TS_INLINE void finish_square(const float* dot, const float* squares_i, Vec squares_j, bool diagonal, float* row, float* mirror,
                             int64_t pitch, Vec& most) {
  Vec x[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    x[r] = centered::squared_distance(load(dot + r * kDotBlock), splat(squares_i[r]), squares_j);
    if (diagonal) x[r] = select(1u << r, zero(), x[r]);  // a token is at 0 from itself, finite or not
    store(row + r * pitch, x[r]);
    most = where_greater(splat(kInfinity), x[r], max(x[r], most), most);
  }
  if (!mirror) return;
  transpose(x);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) store(mirror + r * pitch, x[r]);
}

// Distances of blocks bi and bj; row 0 of the matrix in hand is token `first_row`.
void distance_block(const DensityTask& t, const Image& image, int64_t bi, int64_t bj, int64_t first_row, bool both) {
  alignas(64) float dot[kDotBlock * kDotBlock];
  constexpr int64_t kBlockPanels = kDotBlock / kPanelRows;
  const int64_t C = t.p.C, panel_floats = dot_panel_floats(C), all = t.at.rows / kPanelRows, pitch = t.at.rows;
  const int64_t i0 = bi * kBlockPanels, j0 = bj * kBlockPanels;
  const int64_t rows = smaller(kBlockPanels, all - i0), columns = smaller(kBlockPanels, all - j0);
  const dots::Side a = {image.panels + i0 * panel_floats, panel_floats}, b = {image.panels + j0 * panel_floats, panel_floats};
  dots::all_channels(a, rows * kLanes, b, columns, C, both && bi == bj, dot, kDotBlock);
  Vec most = zero();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = both && bi == bj ? i : 0; j < columns; ++j) {
      const int64_t pi = i0 + i, pj = j0 + j;
      float* const row = image.distances + (pi * kLanes - first_row) * pitch + pj * kLanes;
      float* const mirror = both && pi != pj ? image.distances + (pj * kLanes - first_row) * pitch + pi * kLanes : nullptr;
      finish_square(dot + i * kLanes * kDotBlock + j * kLanes, image.squares + pi * kLanes, load(image.squares + pj * kLanes), pi == pj,
                    row, mirror, pitch, most);
    }
  }
  image.maxima[bi * t.at.blocks + bj] = reduce_max(most);
}

near::Row row_of(const DensityTask& t, const Image& image, int64_t i, int64_t first_row) {
  return {image.distances + (i - first_row) * t.at.rows, image.squares, image.squares[i], centered::doubt(t.p.C), i, t.at.rows};
}

// Sums of the squared distances of a block's rows to their nearest real tokens, in density[], and how many of the k are missing.
template <typename T>
void near_sums(const DensityTask& t, const Image& image, int64_t block, int64_t first_row) {
  const DensityParams& p = t.p;
  const near::Tokens<T> tokens = {tokens_of<T>(t, image), p.x_stride[1], p.C};
  uint64_t* const keys = image.heaps + block * p.k;
  for (int64_t i = block * kDotBlock; i < smaller((block + 1) * kDotBlock, p.N); ++i) {
    const near::Row row = row_of(t, image, i, first_row);
    const int64_t have = near::smallest(tokens, row, image.real, p.k - 1, keys);
    float sum = 0.0f;
    for (int64_t n = 0; n < have; ++n) sum += near::distance_of(keys[n]);
    image.density[i] = sum;
    image.missing[i] = static_cast<float>(p.k - 1 - have);
  }
}

// Sums of squares -> densities, of one image; `far` is the distance of padding.
void finish_density(const DensityTask& t, const Image& image, float far) {
  const DensityParams& p = t.p;
  const float share = p.C > 0 ? 1.0f / (static_cast<float>(p.C) * static_cast<float>(p.k)) : 0.0f;
  const Vec of_padding = splat(-far * far / static_cast<float>(p.k));
  for (int64_t i = 0; i < t.at.rows; i += kLanes) {
    const Vec missing = load(image.missing + i);
    const Vec of_real = mul(load(image.density + i), splat(-share));
    Vec density = exp(where_greater(missing, zero(), fma(missing, of_padding, of_real), of_real));
    if (p.noise) density = fma(load_n(p.noise + image.b * p.N + i, p.N - i), splat(1e-6f), density);
    const Mask real = image.real[i / kLanes];
    store_n(p.density + image.b * p.N + i, select(real, density, zero()), p.N - i);
    store(image.density + i, select(real, density, splat(-1.0f)));
  }
}

template <typename T>
void denser_distances(const DensityTask& t, const Image& image, int64_t block, int64_t first_row) {
  const DensityParams& p = t.p;
  const near::Tokens<T> tokens = {tokens_of<T>(t, image), p.x_stride[1], p.C};
  const float share = p.C > 0 ? 1.0f / static_cast<float>(p.C) : 0.0f, most = *image.most;
  for (int64_t i = block * kDotBlock; i < smaller((block + 1) * kDotBlock, p.N); ++i) {
    const float squared = near::nearest_denser(tokens, row_of(t, image, i, first_row), image.density, !p.noise);
    const float own = __builtin_sqrtf(squared * share);
    p.distance[image.b * p.N + i] = own < most ? own : most;
  }
}

template <typename T>
void pack_images(const DensityTask& t, ParallelForFn threads) {
  const DensityParams& p = t.p;
  const int64_t panels = t.at.rows / kPanelRows, parts = dot_ceil(p.C, 64);
  parallel_for(threads, t.images * parts, 1 + 100000 / (64 * p.N), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Image image = image_of(t, i / parts);
      const int64_t d = i % parts * 64;
      centered::mean_rows(tokens_of<T>(t, image), p.x_stride[1], p.N, d, smaller(d + 64, p.C), image.mean);
    }
  });
  parallel_for(threads, t.images * panels, 1 + 4000 / (p.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_tokens<T>(t, image_of(t, i / panels), i % panels);
  });
}

// Runs body(image, block, first_row) for every block of rows, after its distances are there. `fresh`: the stored ones are not there yet.
template <typename Body>
void over_rows(const DensityTask& t, bool fresh, ParallelForFn threads, const Body& body) {
  const int64_t blocks = t.at.blocks, pairs = blocks * (blocks + 1) / 2;
  if (t.store) {
    parallel_tasks(threads, fresh ? t.images * pairs : 0, 1 + 20 / (t.p.C + 1), [&](int64_t i) {
      int64_t bi = 0, rest = i % pairs;
      for (; rest >= blocks - bi; ++bi) rest -= blocks - bi;
      distance_block(t, image_of(t, i / pairs), bi, bi + rest, 0, true);
    });
    parallel_tasks(threads, t.images * blocks, 1 + 200 / (t.p.N + 1),
                   [&](int64_t i) { body(image_of(t, i / blocks), i % blocks, int64_t{0}); });
    return;
  }
  for (int64_t g = 0; g < t.images; ++g) {
    const Image image = image_of(t, g);
    for (int64_t first = 0; first < blocks; first += kDensityStrips) {
      parallel_tasks(threads, smaller(kDensityStrips, blocks - first), 1, [&](int64_t i) {
        for (int64_t bj = 0; bj < blocks; ++bj) distance_block(t, image, first + i, bj, first * kDotBlock, false);
        body(image, first + i, first * kDotBlock);
      });
    }
  }
}

// The largest finite distance of an image.
float largest_distance(const DensityTask& t, const Image& image) {
  float most = 0.0f;
  for (int64_t i = 0; i < t.at.blocks; ++i) {
    for (int64_t j = t.store ? i : 0; j < t.at.blocks; ++j) {
      const float here = image.maxima[i * t.at.blocks + j];
      most = here > most ? here : most;
    }
  }
  return t.p.C > 0 ? __builtin_sqrtf(most / static_cast<float>(t.p.C)) : 0.0f;
}

// The distance of padding, as far as these images and those before them tell.
float distance_of_padding(const DensityTask& t, float far) {
  for (int64_t g = 0; t.p.mask && g < t.images; ++g) {
    const float here = largest_distance(t, image_of(t, g)) + 1.0f;
    far = here > far ? here : far;
  }
  return far;
}

// What a token without a denser one gets.
void finish_most(const DensityTask& t, const Image& image, float far) {
  bool padding = false;
  for (int64_t i = 0; i < t.at.rows; i += kLanes) padding |= image.real[i / kLanes] != first_lanes(t.p.N - i);
  *image.most = padding ? far : largest_distance(t, image);
}

template <typename T>
Status run(const DensityParams& p, bool store_distances, ParallelForFn threads) {
  const DensityLayout at = density_layout(p, store_distances);
  const auto task_of = [&](int64_t b) { return DensityTask{p, at, store_distances, b, smaller(at.images, p.B - b)}; };
  const auto find_sums = [&](const DensityTask& t) {
    pack_images<T>(t, threads);
    over_rows(t, true, threads, [&](const Image& image, int64_t block, int64_t row) { near_sums<T>(t, image, block, row); });
  };
  float far = 0.0f;  // takes a pass over all images, and the work is done twice if they do not fit into the workspace together
  if (p.mask && at.images < p.B) {
    for (int64_t b = 0; b < p.B; b += at.images) {
      find_sums(task_of(b));
      far = distance_of_padding(task_of(b), far);
    }
  }
  for (int64_t b = 0; b < p.B; b += at.images) {
    const DensityTask t = task_of(b);
    find_sums(t);
    far = distance_of_padding(t, far);
    parallel_for(threads, t.images, 1 + 4000 / p.N, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        finish_density(t, image_of(t, g), far);
        finish_most(t, image_of(t, g), far);
      }
    });
    over_rows(t, false, threads, [&](const Image& image, int64_t block, int64_t row) { denser_distances<T>(t, image, block, row); });
  }
  return Status::success();
}

}  // namespace

Status density_level(const DensityParams& p, bool store_distances, ParallelForFn threads) {
  if (p.dtype == DType::kFloat32) return run<float>(p, store_distances, threads);
  if (p.dtype == DType::kFloat16) return run<Half>(p, store_distances, threads);
  return run<BFloat>(p, store_distances, threads);
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status density_level(const DensityParams& params, bool store_distances, ParallelForFn threads))

Status density_cpu(const DensityParams& params, const DensityPlan& plan, CpuLevel level, ParallelForFn threads) {
  const DensityParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("x must be float32, float16 or bfloat16");
  if (p.N >= int64_t{1} << 24) return Status::error("N must be below 2^24");
  if (p.B == 0 || p.N == 0) return Status::success();
  if (p.k < 1 || p.k > p.N) return Status::error("k must be in [1, N]");
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, density_level(params, plan.store_distances, threads))
}
}  // namespace tokensieve
#endif

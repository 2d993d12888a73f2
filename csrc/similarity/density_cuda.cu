// knn_density and nearest_center on CUDA: element type and plan -> kernels.
#include "similarity/density_kernel.cuh"

namespace tokensieve {
namespace density {
namespace {

dim3 blocks_of(int64_t count) { return dim3(static_cast<unsigned>(count)); }
constexpr int64_t kMaxBlocks = 0x7fffffff;

// Tokens as the tiles read them: float32 less the mean, from the workspace, anything else as it is.
struct Tokens {
  const void* x;
  int64_t batch_stride, row_stride;
};

template <typename T, typename Params>
Status center(const Params& p, float* centered, void* stream, Tokens& tokens) {
  tokens = {p.x, p.x_stride[0], p.x_stride[1]};
  if constexpr (sizeof(T) == 4) {
    const int64_t stride = centered_stride(p.C);
    if (stride == 0) return Status::success();
    tokens = {centered, p.N * stride, stride};
    const int64_t blocks = p.B * ceil_div(stride, kCenterChannels);
    if (blocks > kMaxBlocks) return Status::error("more than 2^31 - 1 blocks");
    return simt::launch(center_kernel, blocks_of(blocks), dim3(kThreads), 0, stream, static_cast<const float*>(p.x), p.x_stride[0],
                        p.x_stride[1], p.N, p.C, centered, stride);
  }
  return Status::success();
}

// Calls step(image, images, first tile of rows, tiles of rows) for what the matrix holds at a time.
template <typename Step>
Status over_strips(const DensityParams& p, const DensityPlan& plan, int tiles, const Step& step) {
  if (plan.store_distances) return step(int64_t{0}, p.B, 0, tiles);
  const int per_strip = static_cast<int>(ceil_div(plan.strip_rows, kTile));
  for (int64_t b = 0; b < p.B; ++b) {
    for (int tile = 0; tile < tiles; tile += per_strip) {
      const Status status = step(b, int64_t{1}, tile, tile + per_strip < tiles ? per_strip : tiles - tile);
      if (!status.ok()) return status;
    }
  }
  return Status::success();
}

template <typename T>
Status launch(const DensityParams& p, const DensityPlan& plan, void* stream) {
  const Layout at = layout(p, plan);
  unsigned char* const work = static_cast<unsigned char*>(p.workspace);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(work + offset); };
  Args a = {p,
            floats(at.dots),
            floats(at.squares),
            floats(at.sums),
            floats(at.missing),
            floats(at.largest),
            floats(at.density),
            floats(at.most),
            0,
            0,
            0,
            0};
  const int tiles = static_cast<int>(ceil_div(p.N, kTile));
  if (p.B * tiles * tiles > kMaxBlocks) return Status::error("more than 2^31 - 1 blocks");
  Tokens tokens;
  Status status = center<T>(p, floats(at.centered), stream, tokens);
  const bool wide = similarity::is_wide(static_cast<const T*>(tokens.x), tokens.batch_stride, tokens.row_stride);
  const auto gram = [&](int64_t b, int64_t images, int tile, int row_tiles, float* dots, float* squares) {
    const T* const x = static_cast<const T*>(tokens.x) + b * tokens.batch_stride;
    const similarity::Gram g = {
        x, tokens.batch_stride, tokens.row_stride, p.N, p.C, dots, squares ? squares + b * p.N : nullptr, tile, row_tiles, tiles, wide};
    return simt::launch(similarity::gram_kernel<T>, blocks_of(images * g.blocks_per_image()), dim3(kThreads), similarity::kTileBytes,
                        stream, g);
  };
  const auto rows_in_hand = [&](int64_t b, int64_t images, int tile, int row_tiles) {
    a.first_image = b, a.first_row = int64_t{tile} * kTile;
    const int64_t left = p.N - a.first_row, rows = int64_t{row_tiles} * kTile;
    a.rows = rows < left ? rows : left;
    a.count = images * a.rows;
    return blocks_of(ceil_div(a.count, kWarps));
  };
  if (status.ok() && !plan.store_distances) status = gram(0, p.B, 0, tiles, nullptr, a.squares);
  if (!status.ok()) return status;
  status = over_strips(p, plan, tiles, [&](int64_t b, int64_t images, int tile, int row_tiles) {
    const Status products = gram(b, images, tile, row_tiles, a.dots, plan.store_distances ? a.squares : nullptr);
    const dim3 grid = rows_in_hand(b, images, tile, row_tiles);
    return products.ok() ? simt::launch(sums_kernel<T>, grid, dim3(kThreads), 0, stream, a) : products;
  });
  if (status.ok()) status = simt::launch(finish_kernel, blocks_of(p.B), dim3(kThreads), 0, stream, a);
  if (!status.ok()) return status;
  return over_strips(p, plan, tiles, [&](int64_t b, int64_t images, int tile, int row_tiles) {
    const Status products = plan.store_distances ? Status::success() : gram(b, images, tile, row_tiles, a.dots, nullptr);
    const dim3 grid = rows_in_hand(b, images, tile, row_tiles);
    return products.ok() ? simt::launch(denser_kernel<T>, grid, dim3(kThreads), 0, stream, a) : products;
  });
}

template <typename T>
Status launch_nearest(const NearestParams& p, void* stream) {
  const NearestLayout at = nearest_layout(p);
  unsigned char* const work = static_cast<unsigned char*>(p.workspace);
  Tokens tokens;
  Status status = center<T>(p, reinterpret_cast<float*>(work + at.centered), stream, tokens);
  NearestArgs a = {p,
                   tokens.x,
                   tokens.batch_stride,
                   tokens.row_stride,
                   reinterpret_cast<float*>(work + at.squares),
                   static_cast<int>(ceil_div(p.N, kTile)),
                   static_cast<int>(ceil_div(p.K, kTile)),
                   false};
  a.wide = similarity::is_wide(static_cast<const T*>(tokens.x), tokens.batch_stride, tokens.row_stride);
  if (p.B * a.tiles > kMaxBlocks || p.B * p.K > kMaxBlocks) return Status::error("more than 2^31 - 1 blocks");
  const dim3 block(kThreads);
  if (status.ok() && p.K > 0) status = simt::launch(centers_kernel<T>, blocks_of(ceil_div(p.B * p.K, kWarps)), block, 0, stream, a);
  if (status.ok()) status = simt::launch(label_kernel<T>, blocks_of(p.B * a.tiles), block, similarity::kTileBytes, stream, a);
  if (status.ok() && p.K > 0) status = simt::launch(own_kernel, blocks_of(ceil_div(p.B * p.K, kThreads)), block, 0, stream, p);
  return status;
}

}  // namespace
}  // namespace density

Status density_cuda(const DensityParams& params, const DensityPlan& plan, void* stream) {
  const DensityParams& p = params;
  if (p.B == 0 || p.N == 0) return Status::success();
  if (p.N >= 0x7fffffff) return Status::error("N must be below 2^31 - 1");
  if (p.k < 1 || p.k > p.N) return Status::error("k must be in [1, N]");
  if (!plan.store_distances && plan.strip_rows < 1) return Status::error("strip_rows must be 1 or more");
  switch (p.dtype) {
    case DType::kFloat32:
      return density::launch<float>(p, plan, stream);
    case DType::kFloat16:
      return density::launch<__half>(p, plan, stream);
    case DType::kBFloat16:
      return density::launch<__nv_bfloat16>(p, plan, stream);
    default:
      return Status::error("x must be float32, float16 or bfloat16");
  }
}

Status nearest_cuda(const NearestParams& params, const NearestPlan&, void* stream) {
  const NearestParams& p = params;
  if (p.B == 0 || p.N == 0) return Status::success();
  if (p.N >= 0x7fffffff) return Status::error("N must be below 2^31 - 1");
  switch (p.dtype) {
    case DType::kFloat32:
      return density::launch_nearest<float>(p, stream);
    case DType::kFloat16:
      return density::launch_nearest<__half>(p, stream);
    case DType::kBFloat16:
      return density::launch_nearest<__nv_bfloat16>(p, stream);
    default:
      return Status::error("x must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

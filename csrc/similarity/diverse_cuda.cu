// select_diverse on CUDA: element type and plan -> kernels.
#include "similarity/diverse_kernel.cuh"

namespace tokensieve {
namespace diverse {
namespace {

Args arguments(const DiverseParams& p, const DiversePlan& plan) {
  const Layout at = layout(p, plan.store_distances);
  unsigned char* work = static_cast<unsigned char*>(p.workspace);
  Args a = {};
  a.p = p;
  a.dots = reinterpret_cast<float*>(work + at.dots);
  a.squares = reinterpret_cast<float*>(work + at.squares);
  a.nearest = reinterpret_cast<float*>(work + at.nearest);
  a.best = reinterpret_cast<float*>(work + at.best);
  a.picked = reinterpret_cast<uint32_t*>(work + at.picked);
  a.winners = reinterpret_cast<unsigned long long*>(work + at.winners);
  a.words = at.words, a.step_blocks = at.step_blocks;
  a.tiles = static_cast<int>(ceil_div(p.N, kTile));
  a.lazy = plan.blocks_per_image != 0;  // 0: one pick a round, for the tests
  return a;
}

dim3 blocks_of(int64_t count) { return dim3(static_cast<unsigned>(count)); }

Status pick(const Args& a, const DiversePlan& plan, void* stream) {
  const dim3 grid = blocks_of(a.p.B), block(static_cast<unsigned>(plan.threads));
  const int64_t items = ceil_div(a.p.N, plan.threads);
  if (items <= 1) return simt::launch(pick_kernel<1>, grid, block, 0, stream, a);
  if (items <= 4) return simt::launch(pick_kernel<4>, grid, block, 0, stream, a);
  if (items <= kMaxItems) return simt::launch(pick_kernel<kMaxItems>, grid, block, 0, stream, a);
  return simt::launch(pick_kernel<0>, grid, block, 0, stream, a);
}

template <typename T>
Status launch(const DiverseParams& p, const DiversePlan& plan, void* stream) {
  Args a = arguments(p, plan);
  a.wide = similarity::is_wide(static_cast<const T*>(p.x), p.x_stride[0], p.x_stride[1]);
  const dim3 block(kThreads);
  const size_t shared = similarity::kTileBytes;
  const int64_t per_image = plan.store_distances ? int64_t{a.tiles} * a.tiles : a.tiles;
  if (p.B * per_image > 0x7fffffff || p.B * a.step_blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  const similarity::Gram gram = {p.x, p.x_stride[0], p.x_stride[1], p.N,   p.C, plan.store_distances ? a.dots : nullptr, a.squares,
                                 0,   a.tiles,       a.tiles,       a.wide};
  Status status = simt::launch(similarity::gram_kernel<T>, blocks_of(p.B * per_image), block, shared, stream, gram);
  if (plan.store_distances) {
    if (status.ok()) status = simt::launch(nearest_kernel, blocks_of(ceil_div(p.B * p.N, similarity::kWarps)), block, 0, stream, a);
    return status.ok() ? pick(a, plan, stream) : status;
  }
  if (status.ok()) status = simt::launch(nearest_tiles_kernel<T>, blocks_of(p.B * a.tiles), block, shared, stream, a);
  if (status.ok())
    status = simt::launch(clear_kernel, blocks_of(ceil_div(p.B * a.words, kThreads)), block, 0, stream, a.picked, p.B * a.words);
  for (int64_t k = 0; status.ok() && k <= p.K; ++k) {
    status = simt::launch(step_kernel<T>, blocks_of(p.B * a.step_blocks), block, 0, stream, a, k);
  }
  if (status.ok() && p.order == DiverseOrder::kPosition) status = simt::launch(sort_kernel, blocks_of(p.B), block, 0, stream, a);
  return status;
}

}  // namespace
}  // namespace diverse

Status diverse_cuda(const DiverseParams& params, const DiversePlan& plan, void* stream) {
  const DiverseParams& p = params;
  if (p.B == 0 || p.K == 0) return Status::success();
  if (p.N >= 0x7fffffff) return Status::error("N must be below 2^31 - 1");
  if (p.K < 0 || p.K > p.N) return Status::error("K must be in [0, N]");
  if (plan.threads < 64 || plan.threads > 1024 || plan.threads % 32 != 0) {
    return Status::error("threads must be a multiple of 32 from 64 to 1024");
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return diverse::launch<float>(p, plan, stream);
    case DType::kFloat16:
      return diverse::launch<__half>(p, plan, stream);
    case DType::kBFloat16:
      return diverse::launch<__nv_bfloat16>(p, plan, stream);
    default:
      return Status::error("x must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

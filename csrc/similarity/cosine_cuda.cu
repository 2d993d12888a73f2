// cosine_match and cosine_scores on CUDA: element type, reduction and plan -> kernels.
#include "similarity/cosine_kernel.cuh"

namespace tokensieve {
namespace cosine {
namespace {

Args arguments(const CosineParams& p, const CosinePlan& plan) {
  const Layout at = layout(p, plan.splits);
  unsigned char* work = static_cast<unsigned char*>(p.workspace);
  Args a = {};
  a.p = p;
  a.inverse_a = reinterpret_cast<float*>(work + at.inverse_a);
  a.inverse_b = reinterpret_cast<float*>(work + at.inverse_b);
  a.rank = reinterpret_cast<float*>(work + at.rank);
  a.index = reinterpret_cast<int32_t*>(work + at.index);
  a.partial = reinterpret_cast<float*>(work + at.partial);
  a.counts = reinterpret_cast<int32_t*>(work + at.counts);
  a.sum = reinterpret_cast<float*>(work + at.sum);
  a.count = reinterpret_cast<int32_t*>(work + at.count);
  a.padded_m = at.padded_m, a.padded_n = at.padded_n, a.padded_c = at.padded_c;
  a.row_tiles = at.padded_m / kTile, a.column_tiles = at.padded_n / kTile;
  a.splits = plan.splits, a.channel_blocks = at.channel_blocks;
  a.keep = static_cast<int>(keep_of(p));
  return a;
}

Status launch(void (*kernel)(Args), int64_t blocks, size_t shared, void* stream, const Args& a) {
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared, stream, a);
}

template <typename T>
Status run(const CosineParams& p, const CosinePlan& plan, void* stream) {
  Args a = arguments(p, plan);
  a.wide_a = similarity::is_wide(static_cast<const T*>(p.a), p.a_stride[0], p.a_stride[1]);
  a.wide_b = similarity::is_wide(static_cast<const T*>(p.b), p.b_stride[0], p.b_stride[1]);
  Status status = launch(norms_kernel<T>, ceil_div(p.B * (a.padded_m + a.padded_n), kWarps), 0, stream, a);
  if (!status.ok()) return status;
  if (sums_rows(p)) {
    status = launch(sum_kernel<T>, p.B * a.channel_blocks * a.splits, 0, stream, a);
    return status.ok() ? launch(dot_kernel<T>, ceil_div(p.B * p.M, kWarps), 0, stream, a) : status;
  }
  const int64_t blocks = p.B * a.row_tiles * a.splits;
  const size_t shared = static_cast<size_t>(plan.smem_bytes);
  if (a.keep == 0) return launch(match_kernel<T, Keep::kAll>, blocks, shared, stream, a);
  if (a.keep == 1) return launch(match_kernel<T, Keep::kOne>, blocks, shared, stream, a);
  return launch(match_kernel<T, Keep::kList>, blocks, shared, stream, a);
}

}  // namespace
}  // namespace cosine

Status cosine_cuda(const CosineParams& params, const CosinePlan& plan, void* stream) {
  const CosineParams& p = params;
  if (p.N >= int64_t{1} << 31) return Status::error("N must be below 2^31");
  if (p.T < 1 || p.T > kMaxNeighbours) return Status::error("k must be in [1, 32]");
  if (p.reduction != CosineReduction::kMatch && !p.largest) return Status::error("only kMatch looks for the lowest similarity");
  if (p.B == 0 || p.M == 0 || (p.reduction == CosineReduction::kNone && p.N == 0)) return Status::success();
  if (plan.splits < 1) return Status::error("splits must be at least 1");
  switch (p.dtype) {
    case DType::kFloat32:
      return cosine::run<float>(p, plan, stream);
    case DType::kFloat16:
      return cosine::run<__half>(p, plan, stream);
    case DType::kBFloat16:
      return cosine::run<__nv_bfloat16>(p, plan, stream);
    default:
      return Status::error("a and b must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

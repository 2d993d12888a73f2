// bipartite_match on CUDA: element type and plan -> one launch, or two; one more where heads are averaged.
#include "merge/match_kernel.cuh"

namespace tokensieve {
namespace match {
namespace {

Args arguments(const MatchParams& p, const MatchPlan& plan) {
  const CudaLayout at = cuda_layout(p, plan.splits);
  unsigned char* work = static_cast<unsigned char*>(p.workspace);
  Args a = {};
  a.p = p;
  a.mean = reinterpret_cast<float*>(work + at.mean);
  a.value = reinterpret_cast<float*>(work + at.value);
  a.column = reinterpret_cast<int32_t*>(work + at.column);
  a.rank = reinterpret_cast<int32_t*>(work + at.rank);
  a.rows = p.H == 1 ? p.metric : a.mean;
  a.batch_stride = p.H == 1 ? p.metric_stride[0] : p.N * p.D;
  a.row_stride = p.H == 1 ? p.metric_stride[2] : p.D;
  a.row_tiles = at.row_tiles, a.column_tiles = at.column_tiles, a.rank_blocks = at.rank_blocks;
  a.splits = plan.splits, a.fused = plan.fused;
  return a;
}

Status launch(void (*kernel)(Args), int64_t blocks, int64_t shared, void* stream, const Args& a) {
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), static_cast<size_t>(shared), stream, a);
}

// T: element type of the rows that are compared.
template <typename T>
Status match_and_rank(Args a, const MatchPlan& plan, void* stream) {
  a.wide = similarity::is_wide(static_cast<const T*>(a.rows), a.batch_stride, a.row_stride);
  const Status status = launch(match_kernel<T>, a.p.B * a.row_tiles * a.splits, plan.smem_bytes, stream, a);
  if (!status.ok() || a.fused) return status;
  return launch(rank_kernel, a.p.B * a.rank_blocks, kKeys * 8, stream, a);
}

template <typename T>
Status run(const MatchParams& p, const MatchPlan& plan, void* stream) {
  const Args a = arguments(p, plan);
  if (p.H == 1) return match_and_rank<T>(a, plan, stream);
  const int64_t blocks = ceil_div(p.B * p.N * p.D, kThreads);
  const Status status = blocks > 0 ? launch(mean_kernel<T>, blocks, 0, stream, a) : Status::success();
  return status.ok() ? match_and_rank<float>(a, plan, stream) : status;
}

}  // namespace
}  // namespace match

Status match_cuda(const MatchParams& params, const MatchPlan& plan, void* stream) {
  const MatchParams& p = params;
  if (p.N >= (int64_t{1} << 31) - 64) return Status::error("N must be below 2^31 - 64");
  if (p.r < 0 || p.r > p.S) return Status::error("r must be in [0, S]");
  if (p.B == 0) return Status::success();
  if (plan.splits < 1) return Status::error("splits must be at least 1");
  if (plan.fused && p.S > match::kFusedSources) return Status::error("one block ranks at most 512 sources");
  if (!p.semaphores || (plan.workspace_bytes > 0 && !p.workspace)) return Status::error("workspace or semaphores are missing");
  switch (p.dtype) {
    case DType::kFloat32:
      return match::run<float>(p, plan, stream);
    case DType::kFloat16:
      return match::run<__half>(p, plan, stream);
    case DType::kBFloat16:
      return match::run<__nv_bfloat16>(p, plan, stream);
    default:
      return Status::error("metric must be float32, float16 or bfloat16");
  }
}

}  // namespace tokensieve

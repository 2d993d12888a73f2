// Pooling and its gradients on CUDA: element type and vector -> kernel, one launch (means over several slices of the tokens: two).
#include "merge/pool_grad_kernel.cuh"
#include "merge/pool_kernel.cuh"
#include "merge/pool_rows_kernel.cuh"

namespace tokensieve {
namespace {

template <typename T, typename Call>
Status with_vector(int vector, Call&& call) {
  constexpr int kFull = 16 / sizeof(T);
  if (vector == kFull) return call(merge::Tag<T, kFull>());
  return vector == 1 ? call(merge::Tag<T, 1>()) : Status::error("a vector is 16 bytes or one element");
}

// Runs call(Tag) with the element type and the elements of a vector.
template <typename Call>
Status with_tag(DType dtype, int vector, Call&& call) {
  switch (dtype) {
    case DType::kFloat32:
      return with_vector<float>(vector, call);
    case DType::kFloat16:
      return with_vector<__half>(vector, call);
    case DType::kBFloat16:
      return with_vector<__nv_bfloat16>(vector, call);
    default:
      return Status::error("x must be float32, float16 or bfloat16");
  }
}

template <typename Args>
Status launch(void (*kernel)(Args), int64_t blocks, void* stream, const Args& args) {
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(pool::kThreads), 0, stream, args);
}

// One warp an item.
template <typename Args>
Status launch_rows(void (*kernel)(Args), const pool::Rows& rows, void* stream, const Args& args) {
  return rows.count == 0 ? Status::success() : launch(kernel, pool::ceil_div<int64_t>(rows.count, pool::kWarps), stream, args);
}

}  // namespace

Status pool_cuda(const PoolParams& params, const PoolPlan& plan, void* stream) {
  pool::PoolArgs args;
  if (const char* why = pool::pool_args(params, plan, false, args)) return Status::error(why);
  return with_tag(params.dtype, plan.vector, [&](auto tag) {
    using Tag = decltype(tag);
    return launch_rows(pool::pool_kernel<typename Tag::Type, Tag::kElements>, args.rows, stream, args);
  });
}

Status pool_grad_cuda(const PoolParams& params, const PoolPlan& plan, void* stream) {
  pool::PoolArgs args;
  if (const char* why = pool::pool_args(params, plan, true, args)) return Status::error(why);
  if (params.scores_grad != nullptr) args.rows.count = params.B * args.N;  // tokens of no width too: their scores' gradient is 0
  return with_tag(params.dtype, plan.vector, [&](auto tag) {
    using Tag = decltype(tag);
    const auto kernel = params.kind == PoolKind::kMax ? pool::pool_max_grad_kernel<typename Tag::Type, Tag::kElements>
                                                      : pool::pool_grad_kernel<typename Tag::Type, Tag::kElements>;
    return launch_rows(kernel, args.rows, stream, args);
  });
}

Status runs_cuda(const RunsParams& params, const PoolPlan& plan, void* stream) {
  pool::RunsArgs args;
  if (const char* why = pool::runs_args(params, plan, false, args)) return Status::error(why);
  return with_tag(params.dtype, plan.vector, [&](auto tag) {
    using Tag = decltype(tag);
    return launch_rows(pool::runs_kernel<typename Tag::Type, Tag::kElements>, args.rows, stream, args);
  });
}

Status runs_grad_cuda(const RunsParams& params, const PoolPlan& plan, void* stream) {
  pool::RunsArgs args;
  if (const char* why = pool::runs_args(params, plan, true, args)) return Status::error(why);
  return with_tag(params.dtype, plan.vector, [&](auto tag) {
    using Tag = decltype(tag);
    return launch_rows(pool::runs_grad_kernel<typename Tag::Type, Tag::kElements>, args.rows, stream, args);
  });
}

Status means_cuda(const MeansParams& params, const PoolPlan& plan, void* stream) {
  pool::MeansArgs args;
  if (const char* why = pool::means_args(params, plan, false, args)) return Status::error(why);
  const int64_t blocks = params.B * args.slices * args.chunks;
  if (blocks == 0) return Status::success();
  return with_tag(params.dtype, plan.vector, [&](auto tag) {
    using Tag = decltype(tag);
    using T = typename Tag::Type;
    const auto kernel = plan.rows_per_block == pool::kMeansGroups ? pool::means_kernel<T, Tag::kElements, 1>
                                                                  : pool::means_kernel<T, Tag::kElements, pool::kMeansTokens>;
    const Status status = launch(kernel, blocks, stream, args);
    if (!status.ok() || args.slices == 1) return status;
    return launch(pool::means_rows_kernel<T>, pool::ceil_div<int64_t>(params.B * params.T * params.C, pool::kThreads), stream, args);
  });
}

Status means_grad_cuda(const MeansParams& params, const PoolPlan& plan, void* stream) {
  pool::MeansArgs args;
  if (const char* why = pool::means_args(params, plan, true, args)) return Status::error(why);
  return with_tag(params.dtype, plan.vector, [&](auto tag) {
    using Tag = decltype(tag);
    return launch_rows(pool::means_grad_kernel<typename Tag::Type, Tag::kElements>, args.grad_rows, stream, args);
  });
}

}  // namespace tokensieve

// merge_tokens and its gradient on CUDA: parameters -> kernel arguments, one launch (the gradient of a mean: two).
#include "merge/merge_grad_kernel.cuh"
#include "merge/merge_kernel.cuh"

namespace tokensieve {

Status merge_cuda(const MergeParams& params, const MergePlan& plan, void* stream) {
  merge::MergeArgs args;
  if (const char* why = merge::merge_args(params, plan, false, args)) return Status::error(why);
  if (params.B == 0 || params.R == 0) return Status::success();
  const bool largest = params.mode == MergeMode::kAmax, split = plan.column_blocks > 0;
  const auto kernel = split     ? largest ? merge::merge_long_kernel<true> : merge::merge_long_kernel<false>
                          : largest ? merge::merge_kernel<true>
                                : merge::merge_kernel<false>;
  const int64_t blocks = params.B * args.blocks_per_row * (split ? plan.column_blocks : 1);
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(merge::kThreads),
                      static_cast<size_t>(merge::merge_shared(args).ints) * 4, stream, args);
}

namespace {

// The divisors of a mean, which the gradient divides by: [B, R] each at the end of the workspace.
Status divisors(const MergeParams& params, const MergePlan& plan, merge::MergeArgs& args, void* stream) {
  float* const values = reinterpret_cast<float*>(static_cast<char*>(params.workspace) + plan.workspace_bytes) - 2 * params.B * params.R;
  args.divisor = values, args.count = values + params.B * params.R;
  merge::MergeArgs sums = args;
  sums.num_tensors = 0;
  sums.total = sums.log_total = nullptr;
  return simt::launch(merge::merge_kernel<false>, dim3(static_cast<unsigned>(params.B * sums.blocks_per_row)), dim3(merge::kThreads),
                      static_cast<size_t>(merge::merge_shared(sums).ints) * 4, stream, sums);
}

}  // namespace

Status merge_grad_cuda(const MergeParams& params, const MergePlan& plan, void* stream) {
  merge::MergeArgs args;
  if (const char* why = merge::merge_args(params, plan, true, args)) return Status::error(why);
  if (params.B == 0 || params.N == 0) return Status::success();
  const dim3 grid(static_cast<unsigned>(params.B * args.blocks_per_row));
  const size_t shared = static_cast<size_t>(merge::merge_shared(args).ints) * 4;
  if (params.mode == MergeMode::kAmax || params.mode == MergeMode::kMlerp) {
    return simt::launch(merge::merge_row_grad_kernel, grid, dim3(merge::kThreads), shared, stream, args);
  }
  if (params.mode != MergeMode::kSum && params.R > 0) {
    const Status status = divisors(params, plan, args, stream);
    if (!status.ok()) return status;
  }
  const size_t kept = args.complement ? static_cast<size_t>((args.N + 31) / 32) * 4 : 0;
  return simt::launch(merge::merge_linear_grad_kernel, grid, dim3(merge::kThreads), kept, stream, args);
}

}  // namespace tokensieve

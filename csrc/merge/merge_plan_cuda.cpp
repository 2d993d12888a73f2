// Plans of merge_cuda and merge_grad_cuda and the arguments of their kernels: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "merge/merge_args.h"

namespace tokensieve {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t token_bytes(const MergeParams& p) {
  int64_t row = 0;
  for (int i = 0; i < p.num_tensors; ++i) row += p.tensors[i].segments * p.tensors[i].segment_bytes;
  return row;
}

// 16 bytes where every address of a tensor allows it, else one element.
int vector_bytes(const MergeParams& p, const MergeTensor& t) {
  const int64_t rows = p.from != nullptr ? p.rows : p.N;
  uint64_t bits = reinterpret_cast<uintptr_t>(t.src) | reinterpret_cast<uintptr_t>(t.dst) | reinterpret_cast<uintptr_t>(t.grad) |
                  reinterpret_cast<uintptr_t>(t.out) | static_cast<uint64_t>(t.segment_bytes);
  if (p.B > 1) bits |= static_cast<uint64_t>(t.stride_b);
  if (rows > 1) bits |= static_cast<uint64_t>(t.stride_n);
  if (t.segments > 1) bits |= static_cast<uint64_t>(t.stride_m);
  return bits % 16 == 0 ? 16 : static_cast<int>(merge_type_bytes(t.type));
}

merge::MergeArg merge_arg(const MergeParams& p, MergeTensor t) {
  const int width = vector_bytes(p, t);
  const int64_t row = t.segments * t.segment_bytes;
  if (t.segments > 1 && t.stride_m == t.segment_bytes) t.segments = 1, t.segment_bytes = row;
  merge::MergeArg a;
  a.src = static_cast<const char*>(t.src), a.dst = static_cast<char*>(t.dst);
  a.grad = static_cast<const char*>(t.grad), a.out = static_cast<const char*>(t.out);
  a.b = t.stride_b, a.n = t.stride_n, a.m = t.stride_m;
  a.row = row;
  a.segments = static_cast<int>(t.segments), a.units = static_cast<int>(t.segment_bytes / width);
  a.vector = width, a.type = t.type;
  a.lanes = 1;
  while (a.lanes < 32 && a.lanes < row / width) a.lanes *= 2;
  if (p.mode == MergeMode::kMlerp) a.lanes = 32;  // norms are sums over a warp
  return a;
}

}  // namespace

namespace merge {

const char* merge_args(const MergeParams& p, const MergePlan& plan, bool grad, MergeArgs& a) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (p.num_tensors < 0 || p.num_tensors > kMaxMergeTensors) return "at most 8 tensors per launch";
  if (p.N >= kLimit || p.R >= kLimit || p.K >= kLimit) return "N and the number of output rows must be below 2^30";
  if (plan.blocks_per_row < 1 || plan.column_blocks < 0) return "the plan is not one of CUDA";
  for (int i = 0; i < p.num_tensors; ++i) {
    const int64_t row = p.tensors[i].segments * p.tensors[i].segment_bytes;
    if (row >= 2 * kLimit) return "a token must have less than 2^31 bytes";
    if (row > 0) a.tensors[a.num_tensors++] = merge_arg(p, p.tensors[i]);
  }
  a.inverse = p.inverse, a.from = p.from, a.own = p.mode == MergeMode::kAmax ? nullptr : p.own;  // the largest: the lowest token id wins
  a.weights = p.weights, a.size = p.size, a.total_grad = p.total_grad;
  a.total = p.total, a.log_total = p.log_total, a.weight_grad = p.weight_grad;
  a.inverse_stride = p.inverse_stride, a.from_stride = p.from_stride, a.own_stride = p.own_stride;
  a.rows = p.rows, a.N = static_cast<int>(p.N), a.R = static_cast<int>(p.R), a.K = static_cast<int>(p.K);
  a.epsilon = p.epsilon, a.mode = p.mode, a.complement = p.complement;
  a.column_blocks = plan.column_blocks;
  a.blocks_per_row = static_cast<int>(plan.column_blocks > 0 ? std::max<int64_t>(1, p.R) : plan.blocks_per_row);
  a.rows_per_block = static_cast<int>(ceil_div(std::max<int64_t>(1, p.R), a.blocks_per_row));
  a.tokens_per_block = grad ? static_cast<int>(ceil_div(p.N, a.blocks_per_row)) : 0;
  const int64_t blocks = p.B * a.blocks_per_row * std::max(1, plan.column_blocks);
  if (blocks >= 2 * kLimit) return "more than 2^31 - 1 blocks";
  if (p.N > kMaxSharedTokens) a.lists = static_cast<int*>(p.workspace);
  return nullptr;
}

}  // namespace merge

namespace {

int64_t list_bytes(const MergeParams& p, const MergePlan& plan) {
  if (p.N <= merge::kMaxSharedTokens) return 0;
  const int64_t blocks = plan.column_blocks > 0 ? p.R * plan.column_blocks : plan.blocks_per_row;
  return p.B * blocks * p.N * 4;
}

}  // namespace

MergePlan merge_plan_cuda(const MergeParams& p, const DeviceInfo& device) {
  MergePlan plan;
  const int64_t row = token_bytes(p), B = std::max<int64_t>(1, p.B), R = std::max<int64_t>(1, p.R);
  // Rows of 16 tokens and more that do not fill the card: a block takes 128 bytes of columns of one row and 32 groups share its tokens.
  if (p.mode != MergeMode::kMlerp && row > 0 && B * R <= device.num_sms && p.N >= 16 * R) {
    int64_t units = 1;
    for (int i = 0; i < p.num_tensors; ++i) {
      units = std::max(units, p.tensors[i].segments * p.tensors[i].segment_bytes / vector_bytes(p, p.tensors[i]));
    }
    plan.column_blocks = static_cast<int>(std::min<int64_t>(ceil_div(units, merge::kLongLanes), 1 << 16));
  }
  // Otherwise as gather: 64 KB read and written a block hide the lists that come first, and at most four blocks an SM.
  const int64_t wanted = ceil_div((p.N + p.R) * row, 64 * 1024), most = std::max<int64_t>(1, 4 * device.num_sms / B);
  // A block lists its rows in 12 bytes each of shared memory: at most 4096.
  plan.blocks_per_row = static_cast<int>(std::clamp<int64_t>(wanted, ceil_div(R, 4096), std::max(ceil_div(R, 4096), std::min(most, R))));
  plan.workspace_bytes = list_bytes(p, plan);
  plan.bytes_moved = p.B * ((p.N + p.R) * row + 8 * (p.complement ? p.K : p.N));
  return plan;
}

MergePlan merge_grad_plan_cuda(const MergeParams& p, const DeviceInfo& device) {
  MergePlan plan = merge_plan_cuda(p, device);
  plan.column_blocks = 0;
  // A warp takes a token (or a row): eight of them a block, four blocks an SM.
  const int64_t least = ceil_div(std::max<int64_t>(1, p.R), 4096),
                units = std::max<int64_t>(1, ceil_div(std::max(p.N, p.R), merge::kWarps));
  const int64_t most = std::max<int64_t>(1, 4 * device.num_sms / std::max<int64_t>(1, p.B));
  plan.blocks_per_row = static_cast<int>(std::max(least, std::min(units, most)));
  plan.workspace_bytes = list_bytes(p, plan) + p.B * p.R * 8;
  plan.bytes_moved = p.B * ((p.N + p.R) * token_bytes(p) + 8 * (p.complement ? p.K : p.N));
  return plan;
}

}  // namespace tokensieve

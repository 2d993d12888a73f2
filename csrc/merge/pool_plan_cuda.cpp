// Plans of the pooling kernels on CUDA and the arguments of those: host arithmetic only, so it is tested without a GPU.
#include <algorithm>
#include <initializer_list>

#include "merge/pool_cuda_args.h"

namespace tokensieve {
namespace {

using pool::ceil_div;

// 16 bytes where every address allows it, else one element. strides of one row count for nothing.
struct Stride {
  int64_t elements, rows;
};
int vector_of(DType dtype, int64_t C, std::initializer_list<const void*> pointers, std::initializer_list<Stride> strides) {
  const int64_t bytes = dtype_bytes(dtype);
  uint64_t bits = static_cast<uint64_t>(C * bytes);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  for (const Stride& s : strides) bits |= s.rows > 1 ? static_cast<uint64_t>(s.elements * bytes) : 0;
  return bits % 16 == 0 ? static_cast<int>(16 / bytes) : 1;
}

// A warp takes a whole row where rows give every SM 128 warps (two rounds of all it holds); else up to the 64 vectors it holds at once.
void split_rows(PoolPlan& plan, int64_t rows, int64_t C, const DeviceInfo& device, bool whole) {
  const int64_t most = std::max<int64_t>(1, ceil_div<int64_t>(C / plan.vector, pool::kChunk));
  const int64_t wanted = ceil_div<int64_t>(int64_t{128} * device.num_sms, std::max<int64_t>(1, rows));
  plan.splits = whole ? 1 : static_cast<int>(std::min<int64_t>(std::min(most, wanted), 1 << 20));
  plan.threads = pool::kThreads;
  plan.rows_per_block = pool::kWarps;
  plan.blocks = ceil_div<int64_t>(rows * plan.splits, pool::kWarps);
}

const char* rows_of(const PoolPlan& plan, int64_t rows, int64_t C, pool::Rows& out) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (plan.vector < 1 || plan.splits < 1 || C % plan.vector != 0) return "the plan is not one of CUDA";
  if (C >= kLimit || rows >= kLimit || rows * plan.splits >= kLimit - pool::kWarps) return "rows and channels must be below 2^31";
  out.units = static_cast<int>(C / plan.vector), out.splits = plan.splits;
  out.part = static_cast<int>(ceil_div<int64_t>(ceil_div<int64_t>(out.units, plan.splits), 32) * 32);
  out.count = out.units > 0 ? rows * plan.splits : 0;
  return nullptr;
}

bool fits_int(const PoolParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  for (const PoolAxis& a : p.axes) {
    if (a.in >= kLimit / 4 || a.out >= kLimit / 4) return false;
    if (p.kind == PoolKind::kBilinear ? a.in * a.out >= kLimit / 4 : p.adaptive && (a.step + 1) * (a.span + 1) >= kLimit) return false;
  }
  return pool::tokens(p) < kLimit && pool::outputs(p) * pool::window(p) < kLimit;
}

}  // namespace

namespace pool {

const char* pool_args(const PoolParams& p, const PoolPlan& plan, bool grad, PoolArgs& a) {
  if (!fits_int(p)) return "grid and size are too large: tokens x outputs of an axis must be below 2^29";
  if (grad && p.scores_grad != nullptr && plan.splits != 1) return "the plan must give a warp whole rows for the gradient of scores";
  a.x = p.x, a.grad = p.grad, a.forward = p.out, a.out = grad ? p.x_grad : p.out;
  a.scores = p.scores, a.scores_grad = p.scores_grad;
  a.stride_b = p.stride_b, a.stride_n = p.stride_n;
  for (int i = 0; i < 3; ++i) {
    const PoolAxis& from = p.axes[i];
    a.axes[i].in = static_cast<int>(from.in), a.axes[i].out = static_cast<int>(from.out);
    a.axes[i].span = static_cast<int>(std::min(from.span, from.in)),
    a.axes[i].step = static_cast<int>(std::min(from.step, from.in + from.out));
  }
  a.N = static_cast<int>(tokens(p)), a.R = static_cast<int>(outputs(p)), a.window = static_cast<int>(window(p));
  a.temperature = p.temperature, a.kind = p.kind, a.adaptive = p.adaptive;
  return rows_of(plan, p.B * (grad ? tokens(p) : outputs(p) * stacked(p)), p.C, a.rows);
}

const char* runs_args(const RunsParams& p, const PoolPlan& plan, bool grad, RunsArgs& a) {
  if (p.S >= int64_t{1} << 31) return "S must be below 2^31";
  a.x = grad ? p.grad : p.x, a.out = grad ? p.x_grad : p.out, a.starts = p.starts;
  a.stride_b = p.stride_b, a.stride_n = p.stride_n, a.starts_stride = p.starts_stride;
  a.length = p.length, a.kept = p.length / p.stride, a.stride = p.stride;
  a.S = static_cast<int>(p.S), a.R = static_cast<int>(rows(p)), a.images = static_cast<int>(p.images);
  return rows_of(plan, p.B * (grad ? p.S : rows(p)), p.C, a.rows);
}

const char* means_args(const MeansParams& p, const PoolPlan& plan, bool grad, MeansArgs& a) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (p.B >= kLimit || p.T >= kLimit || p.N >= kLimit || p.B * p.T >= kLimit) return "B x T and N must be below 2^31";
  a.x = p.x, a.rows_grad = p.rows_grad, a.columns_grad = p.columns_grad;
  a.rows = p.rows, a.columns = p.columns, a.x_grad = p.x_grad;
  a.partial = static_cast<float*>(p.workspace);
  a.stride_b = p.stride_b, a.stride_t = p.stride_t, a.stride_n = p.stride_n, a.C = p.C;
  a.B = static_cast<int>(p.B), a.T = static_cast<int>(p.T), a.N = static_cast<int>(p.N);
  if (grad) return rows_of(plan, p.B * p.T * p.N, p.C, a.grad_rows);
  if (plan.vector < 1 || p.C % plan.vector != 0 || plan.rows_per_block < 1 || int64_t{plan.splits} * plan.rows_per_block < p.N) {
    return "the plan is not one of CUDA";
  }
  a.units = static_cast<int>(p.C / plan.vector), a.slices = plan.splits;
  a.chunks = static_cast<int>(ceil_div<int64_t>(a.units, kMeansLanes));
  if (p.C >= kLimit || p.B * a.slices * a.chunks >= kLimit) return "more than 2^31 - 1 blocks";
  return nullptr;
}

}  // namespace pool

PoolPlan pool_plan_cuda(const PoolParams& p, const DeviceInfo& device) {
  PoolPlan plan;
  const int64_t N = pool::tokens(p), R = pool::outputs(p) * pool::stacked(p);
  plan.vector = vector_of(p.dtype, p.C, {p.x, p.out}, {{p.stride_b, p.B}, {p.stride_n, N}});
  split_rows(plan, p.B * R, p.C, device, false);
  plan.bytes_moved = p.B * (N + R) * p.C * dtype_bytes(p.dtype) + (p.kind == PoolKind::kSoftmax ? p.B * N * 4 : 0);
  return plan;
}

PoolPlan pool_grad_plan_cuda(const PoolParams& p, const DeviceInfo& device) {
  PoolPlan plan;
  const int64_t N = pool::tokens(p), R = pool::outputs(p) * pool::stacked(p), row = p.B * p.C * dtype_bytes(p.dtype);
  const bool reads = p.kind == PoolKind::kMax || p.scores_grad != nullptr;
  plan.vector = vector_of(p.dtype, p.C, {p.grad, p.x_grad, reads ? p.x : nullptr, reads ? p.out : nullptr},
                          {{p.stride_b, reads ? p.B : 1}, {p.stride_n, reads ? N : 1}});
  split_rows(plan, p.B * N, p.C, device, p.scores_grad != nullptr);
  plan.bytes_moved = row * (reads ? 2 * (N + R) : N + R) + (p.kind == PoolKind::kSoftmax ? p.B * N * 8 : 0);
  return plan;
}

PoolPlan runs_plan_cuda(const RunsParams& p, const DeviceInfo& device) {
  PoolPlan plan;
  plan.vector = vector_of(p.dtype, p.C, {p.x, p.out}, {{p.stride_b, p.B}, {p.stride_n, p.S}});
  split_rows(plan, p.B * pool::rows(p), p.C, device, false);
  plan.bytes_moved = p.B * (p.S + pool::rows(p)) * p.C * dtype_bytes(p.dtype);
  return plan;
}

PoolPlan runs_grad_plan_cuda(const RunsParams& p, const DeviceInfo& device) {
  PoolPlan plan;
  plan.vector = vector_of(p.dtype, p.C, {p.grad, p.x_grad}, {});
  split_rows(plan, p.B * p.S, p.C, device, false);
  plan.bytes_moved = p.B * (p.S + pool::rows(p)) * p.C * dtype_bytes(p.dtype);
  return plan;
}

PoolPlan means_plan_cuda(const MeansParams& p, const DeviceInfo& device) {
  PoolPlan plan;
  plan.vector = vector_of(p.dtype, p.C, {p.x, p.rows, p.columns}, {{p.stride_b, p.B}, {p.stride_t, p.T}, {p.stride_n, p.N}});
  const int64_t chunks = ceil_div<int64_t>(p.C / plan.vector, pool::kMeansLanes);
  // Four tokens a thread quarter the exchange between lanes and the slices' rows (16 floats of shuffles a vector), where two blocks an SM are
  // left; else one, and four times the blocks.
  const int64_t wide = ceil_div<int64_t>(p.N, pool::kMeansGroups * pool::kMeansTokens);
  const int tokens = p.B * chunks * wide >= 2 * device.num_sms ? pool::kMeansTokens : 1;
  plan.threads = pool::kThreads;
  plan.rows_per_block = pool::kMeansGroups * tokens;
  plan.splits = static_cast<int>(std::max<int64_t>(1, ceil_div<int64_t>(p.N, plan.rows_per_block)));
  plan.blocks = p.B * chunks * plan.splits;
  const int64_t rows = p.B * p.T * p.C;
  plan.workspace_bytes = plan.splits > 1 ? plan.splits * rows * 4 : 0;
  plan.bytes_moved = p.B * (p.T * p.N + p.T + p.N) * p.C * dtype_bytes(p.dtype) + 2 * plan.workspace_bytes;
  return plan;
}

PoolPlan means_grad_plan_cuda(const MeansParams& p, const DeviceInfo& device) {
  PoolPlan plan;
  plan.vector = vector_of(p.dtype, p.C, {p.rows_grad, p.columns_grad, p.x_grad}, {});
  split_rows(plan, p.B * p.T * p.N, p.C, device, false);
  plan.bytes_moved = p.B * (p.T * p.N + p.T + p.N) * p.C * dtype_bytes(p.dtype);
  return plan;
}

}  // namespace tokensieve

// Plan of scatter_cuda and the arguments of its kernels: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/scatter_args.h"

namespace tokensieve {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Widest of 16, 8, 4, 2, 1 bytes that divides every address of both sides; of an addition 16 bytes or one element.
int vector_bytes(const ScatterParams& p, const ScatterTensor& t, bool add) {
  uint64_t bits = reinterpret_cast<uintptr_t>(t.base) | reinterpret_cast<uintptr_t>(t.value) | reinterpret_cast<uintptr_t>(t.dst);
  bits |= static_cast<uint64_t>(t.segment_bytes);
  const auto stride = [&](int64_t size, int64_t a, int64_t b) {  // an axis of one element has no stride that matters
    if (size > 1) bits |= static_cast<uint64_t>(a) | static_cast<uint64_t>(b);
  };
  stride(p.B, t.base_b, t.value_b);
  if (p.N > 1) bits |= static_cast<uint64_t>(t.base_n);
  if (p.K > 1) bits |= static_cast<uint64_t>(t.value_n);
  stride(t.segments, t.base_m, t.value_m);
  int width = 16;
  while (bits % static_cast<uint64_t>(width) != 0) width /= 2;
  return add && width < 16 ? static_cast<int>(dtype_bytes(t.dtype)) : width;
}

select::ScatterArg scatter_arg(const ScatterParams& p, const ScatterPlan& plan, ScatterTensor t, bool grad) {
  const int64_t row = t.segments * t.segment_bytes;
  if (grad) t.base_b = p.N * row, t.base_n = row, t.base_m = t.segment_bytes;
  const int width = vector_bytes(p, t, grad || p.add);
  if (t.segments > 1 && t.base_m == t.segment_bytes && t.value_m == t.segment_bytes) t.segments = 1, t.segment_bytes = row;
  select::ScatterArg a;
  a.base = {static_cast<const char*>(t.base), t.base_b, t.base_n, t.base_m};
  a.value = {static_cast<const char*>(t.value), t.value_b, t.value_n, t.value_m};
  a.dst = static_cast<char*>(t.dst);
  a.dst_row = row;
  a.segments = static_cast<int>(t.segments);
  a.units = static_cast<int>(t.segment_bytes / width);
  a.vector = width;
  while (a.lanes * 2 <= plan.threads && a.lanes < row / width) a.lanes *= 2;
  a.dtype = t.dtype;
  return a;
}

}  // namespace

namespace select {

const char* scatter_args(const ScatterParams& p, const ScatterPlan& plan, bool grad, ScatterArgs& a) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (p.num_tensors < 0 || p.num_tensors > kMaxScatterTensors) return "at most 8 tensors a launch";
  if (p.N >= kLimit || p.K >= kLimit) return "N and K must be below 2^31";
  if (plan.threads < 32 || plan.threads > 1024 || plan.blocks_per_row < 1) return "the plan is not one of CUDA";
  for (int i = 0; i < p.num_tensors; ++i) {
    const int64_t row = p.tensors[i].segments * p.tensors[i].segment_bytes;
    if (row >= kLimit) return "a token must have less than 2^31 bytes";
    if (row > 0) a.tensors[a.num_tensors++] = scatter_arg(p, plan, p.tensors[i], grad);
  }
  a.index = p.index, a.index_stride = p.index_stride;
  a.weights = p.weights, a.weight_grad = p.weight_grad, a.add_to_weight_grad = p.add_to_weight_grad;
  a.N = p.N, a.K = p.K;
  const int64_t blocks =
      std::clamp<int64_t>(plan.blocks_per_row, std::max<int64_t>(1, ceil_div(p.N, kMaxScatterSlots)), std::max<int64_t>(1, p.N));
  if (p.B * blocks >= kLimit || p.B * p.K >= kLimit) return "more than 2^31 - 1 blocks";
  a.blocks_per_row = static_cast<int>(blocks);
  a.slots_per_block = static_cast<int>(ceil_div(p.N, blocks));
  return nullptr;
}

}  // namespace select

ScatterPlan scatter_plan_cuda(const ScatterParams& p, const DeviceInfo& device) {
  ScatterPlan plan;
  int64_t row = 0;
  for (int i = 0; i < p.num_tensors; ++i) row += p.tensors[i].segments * p.tensors[i].segment_bytes;
  plan.threads = 256;
  // As gather: 32 KB a block hides the look-up that comes first; more than four blocks an SM would only take turns.
  const int64_t wanted = ceil_div(p.N * row, 32 * 1024), most = std::max<int64_t>(1, 4 * device.num_sms / std::max<int64_t>(1, p.B));
  plan.blocks_per_row = static_cast<int>(std::clamp<int64_t>(wanted, 1, most));
  plan.bytes_moved = p.B * (2 * p.N * row + 8 * p.K + (p.add ? p.K * row : 0));
  return plan;
}

}  // namespace tokensieve

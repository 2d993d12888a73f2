// Plan of gather_cuda and scatter_rows_cuda, and the arguments of their kernels: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "select/gather_args.h"

namespace tokensieve {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

namespace select {

int vector_bytes(const GatherParams& p, const GatherTensor& t, bool scatter) {
  uint64_t bits = reinterpret_cast<uintptr_t>(t.src) | reinterpret_cast<uintptr_t>(t.dst) | static_cast<uint64_t>(t.segment_bytes);
  if (!scatter) {  // an axis of one element has no stride that matters
    if (p.B > 1) bits |= static_cast<uint64_t>(t.stride_b);
    if (p.N > 1) bits |= static_cast<uint64_t>(t.stride_n);
    if (t.segments > 1) bits |= static_cast<uint64_t>(t.stride_m);
  }
  int width = 16;
  while (bits % static_cast<uint64_t>(width) != 0) width /= 2;
  return width;
}

static CopyTensor copy_tensor(const GatherParams& p, const GatherPlan& plan, GatherTensor t, bool scatter) {
  const int64_t row = t.segments * t.segment_bytes;
  if (scatter) t.stride_b = p.K * row, t.stride_n = row, t.stride_m = t.segment_bytes;
  const int width = std::min(vector_bytes(p, t, scatter), plan.vector_bytes > 0 ? plan.vector_bytes : 16);
  if (t.segments > 1 && t.stride_m == t.segment_bytes) t.segments = 1, t.segment_bytes = row;
  CopyTensor c;
  c.src = static_cast<const char*>(t.src);
  c.dst = static_cast<char*>(t.dst);
  c.src_b = t.stride_b, c.src_n = t.stride_n, c.src_m = t.stride_m;
  c.dst_row = row;
  c.segments = static_cast<int>(t.segments);
  c.units = static_cast<int>(t.segment_bytes / width);
  c.vector = width;
  while (c.lanes < 32 || (c.lanes < plan.threads && c.lanes < row / width)) c.lanes *= 2;
  while (c.lanes > 1 && c.lanes / 2 >= row / width) c.lanes /= 2;
  while (c.lanes > plan.threads) c.lanes /= 2;
  return c;
}

const char* copy_args(const GatherParams& p, const GatherPlan& plan, bool scatter, CopyArgs& a) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (p.num_tensors < 0 || p.num_tensors > kMaxGatherTensors) return "at most 8 tensors a launch";
  if (p.N >= kLimit || p.K >= kLimit) return "N and K must be below 2^31";
  if (plan.threads < 32 || plan.threads > 1024 || plan.blocks_per_row < 1) return "the plan is not one of CUDA";
  for (int i = 0; i < p.num_tensors; ++i) {
    if (p.tensors[i].segments * p.tensors[i].segment_bytes >= kLimit) return "a token must have less than 2^31 bytes";
    if (p.tensors[i].segments * p.tensors[i].segment_bytes == 0) continue;
    a.tensors[a.num_tensors++] = copy_tensor(p, plan, p.tensors[i], scatter);
  }
  a.index = p.index;
  a.index_stride = p.index_stride;
  a.N = p.N;
  a.K = p.K;
  a.slots = static_cast<int>(scatter ? p.N : p.K);
  // A scatter writes N tokens where the plan counted K.
  int64_t blocks = scatter ? ceil_div(plan.blocks_per_row * p.N, std::max<int64_t>(1, p.K)) : plan.blocks_per_row;
  blocks = std::clamp<int64_t>(blocks, std::max<int64_t>(1, ceil_div(a.slots, kMaxSlotsPerBlock)), std::max(1, a.slots));
  if (p.B * blocks >= kLimit) return "more than 2^31 - 1 blocks";
  a.blocks_per_row = static_cast<int>(blocks);
  a.slots_per_block = static_cast<int>(ceil_div(a.slots, blocks));
  return nullptr;
}

}  // namespace select

GatherPlan gather_plan_cuda(const GatherParams& p, const DeviceInfo& device) {
  GatherPlan plan;
  int64_t row = 0;
  plan.vector_bytes = 1;
  for (int i = 0; i < p.num_tensors; ++i) {
    row += p.tensors[i].segments * p.tensors[i].segment_bytes;
    plan.vector_bytes = std::max(plan.vector_bytes, select::vector_bytes(p, p.tensors[i], false));
  }
  plan.threads = 256;
  // 32 KB a block: four rows of a 4096-wide hidden state, 8 vectors a thread, enough to hide the index load that comes first. At most
  // four blocks an SM: more would only take turns.
  const int64_t wanted = ceil_div(p.K * row, 32 * 1024), most = std::max<int64_t>(1, 4 * device.num_sms / std::max<int64_t>(1, p.B));
  plan.blocks_per_row = static_cast<int>(std::clamp<int64_t>(wanted, 1, most));
  plan.bytes_moved = p.B * p.K * (2 * row + 8);
  return plan;
}

GatherPlan topk_gather_plan_cuda(const GatherParams& p, const TopkPlan& topk_plan, const DeviceInfo& device) {
  GatherPlan plan = gather_plan_cuda(p, device);
  // 64 registers a thread: 1024 threads an SM. Scores held in shared memory fill it alone. A second wave would select all over again.
  const int64_t resident = topk_plan.items_per_thread == 0 ? 1 : std::max(1, 1024 / std::max(1, topk_plan.threads));
  const int64_t most = std::max<int64_t>(1, resident * device.num_sms / std::max<int64_t>(1, p.B));
  plan.threads = topk_plan.threads;
  plan.blocks_per_row = static_cast<int>(std::min<int64_t>(plan.blocks_per_row, most));
  return plan;
}

}  // namespace tokensieve

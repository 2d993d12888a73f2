// match_cuda under the emulator, match_cpu at a chosen instruction level, and their plans.
#include <stdexcept>

#include "merge/match_cuda_layout.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

int64_t width_of(const py::dict& d, const char* name, int64_t otherwise, int64_t& stride) {
  if (!d.contains(name) || d[name].is_none()) return otherwise;
  const py::array list = py::array::ensure(d[name]);
  const int64_t width = list.shape(list.ndim() - 1);
  stride = list.ndim() == 2 ? width : 0;
  return width;
}

// sizes B, H, N, D; metric [B, H, N, D] with `row` elements from token to token; prefix, or sources, targets, keep as int64 (n) or (B, n).
MatchParams params_of(const py::dict& d) {
  MatchParams p;
  const auto sizes = d["sizes"].cast<std::vector<int64_t>>();
  p.B = sizes.at(0), p.H = sizes.at(1), p.N = sizes.at(2), p.D = sizes.at(3);
  p.metric_stride[2] = get<int64_t>(d, "row", p.D);
  p.metric_stride[1] = p.N * p.metric_stride[2], p.metric_stride[0] = p.H * p.metric_stride[1];
  const int64_t prefix = get<int64_t>(d, "prefix", 0);
  p.source_first = prefix + prefix % 2, p.target_first = prefix + 1 - prefix % 2;
  const auto half = [&](int64_t first) { return p.N > first ? (p.N - first + 1) / 2 : 0; };
  p.P = width_of(d, "keep", prefix, p.keep_stride);
  p.S = width_of(d, "sources", half(p.source_first), p.sources_stride);
  p.T = width_of(d, "targets", half(p.target_first), p.targets_stride);
  p.candidates_stride = p.N;
  p.r = get<int64_t>(d, "r", 0);
  p.order = static_cast<MatchOrder>(get<int>(d, "order", 0));
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  return p;
}

// The plan, and whatever of it the test forces.
MatchPlan plan_of(const MatchParams& p, const py::dict& d) {
  DeviceInfo device;
  device.num_sms = get<int>(d, "num_sms", device.num_sms);
  MatchPlan plan = match_plan_cuda(p, device);
  plan.fused = get<bool>(d, "fused", plan.fused);
  plan.splits = get<int64_t>(d, "splits", plan.splits);
  plan.workspace_bytes = match::cuda_layout(p, plan.splits).bytes;
  return plan;
}

template <typename Launch>
py::dict run(const py::dict& d, MatchParams& p, int64_t workspace_bytes, int64_t num_semaphores, const Launch& launch) {
  const DeviceBuffer metric = DeviceBuffer::of(d["metric"], get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer sources = DeviceBuffer::of(array_of(d, "sources")), targets = DeviceBuffer::of(array_of(d, "targets"));
  const DeviceBuffer keep = DeviceBuffer::of(array_of(d, "keep")), bias = DeviceBuffer::of(array_of(d, "bias"));
  const DeviceBuffer candidates = DeviceBuffer::of(array_of(d, "candidates"));
  p.metric = metric.as(), p.sources = sources.as<int64_t>(), p.targets = targets.as<int64_t>(), p.keep = keep.as<int64_t>();
  p.bias = bias.as<float>(), p.candidates = candidates.as<uint8_t>();
  const DeviceBuffer source(p.B * p.r * 8), destination(p.B * p.r * 8), similarity(p.B * p.r * 4), index(p.B * p.rows() * 8);
  const DeviceBuffer inverse(p.B * p.N * 8), workspace(workspace_bytes), semaphores(num_semaphores * 4);
  p.source = source.as<int64_t>(), p.destination = destination.as<int64_t>(), p.similarity = similarity.as<float>();
  p.index = index.as<int64_t>(), p.inverse = inverse.as<int64_t>(), p.workspace = workspace.as(), p.semaphores = semaphores.as<int32_t>();
  for (int64_t i = 0; i < p.B * p.N; ++i) p.inverse[i] = -9;  // not -1, so that an unwritten one is visible
  for (int64_t i = 0; i < p.B * p.rows(); ++i) p.index[i] = -9;
  for (int64_t i = 0; i < p.B * p.r; ++i) p.source[i] = p.destination[i] = -9;
  for (int64_t i = 0; i < num_semaphores; ++i) p.semaphores[i] = 0;
  check(launch());
  for (int64_t i = 0; i < num_semaphores; ++i) {
    if (p.semaphores[i] != 0) throw std::runtime_error("semaphores must be left at zero");
  }
  py::dict result;
  result["source"] = source.numpy("int64", {p.B, p.r});
  result["destination"] = destination.numpy("int64", {p.B, p.r});
  result["similarity"] = similarity.numpy("float32", {p.B, p.r});
  result["index"] = index.numpy("int64", {p.B, p.rows()});
  result["inverse"] = inverse.numpy("int64", {p.B, p.N});
  return result;
}

py::dict run_cuda(const py::dict& d) {
  MatchParams p = params_of(d);
  const MatchPlan plan = plan_of(p, d);
  return run(d, p, plan.workspace_bytes, plan.num_semaphores, [&] { return match_cuda(p, plan, nullptr); });
}

py::dict run_cpu(const py::dict& d) {
  MatchParams p = params_of(d);
  const auto lists = {"sources", "targets"};  // the workspace depends on which lists there are
  for (const char* name : lists) {
    static const int64_t there = 0;
    if (d.contains(name) && !d[name].is_none()) (name[0] == 's' ? p.sources : p.targets) = &there;
  }
  static const uint8_t allowed = 1;
  if (d.contains("candidates") && !d["candidates"].is_none()) p.candidates = &allowed;
  const MatchPlan plan = match_plan_cpu(p);
  const CpuLevel level = static_cast<CpuLevel>(get<int>(d, "level", 0));
  return run(d, p, plan.workspace_bytes, 0, [&] { return match_cpu(p, plan, level, nullptr); });
}

py::dict plan_dict(const py::dict& d) {
  const MatchPlan plan = plan_of(params_of(d), d);
  py::dict out;
  out["splits"] = plan.splits, out["fused"] = plan.fused, out["num_semaphores"] = plan.num_semaphores, out["threads"] = plan.threads;
  out["smem_bytes"] = plan.smem_bytes, out["workspace_bytes"] = plan.workspace_bytes;
  out["flops"] = plan.flops, out["bytes_moved"] = plan.bytes_moved;
  return out;
}

}  // namespace

void bind_match(py::module_& m) {
  m.def("match_cuda", &run_cuda);
  m.def("match_cpu", &run_cpu);
  m.def("match_plan_cuda", &plan_dict);
}

}  // namespace testing
}  // namespace tokensieve

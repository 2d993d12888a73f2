// diverse_cuda under the emulator, and its plan.
#include "similarity/diverse.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

DeviceInfo device_of(const py::dict&) { return DeviceInfo(); }

DiverseParams params_of(const py::dict& d) {
  DiverseParams p;
  p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.C = d["C"].cast<int64_t>(), p.K = d["K"].cast<int64_t>();
  p.x_stride[1] = get<int64_t>(d, "row_stride", p.C);
  p.x_stride[0] = get<int64_t>(d, "batch_stride", p.N * p.x_stride[1]);
  p.candidates_stride = p.N;
  p.metric = get<std::string>(d, "metric", "cosine") == "cosine" ? DiverseMetric::kCosine : DiverseMetric::kEuclidean;
  p.order = get<std::string>(d, "order", "pick") == "pick" ? DiverseOrder::kPick : DiverseOrder::kPosition;
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  return p;
}

py::array run_diverse(const py::dict& d) {
  DiverseParams p = params_of(d);
  const DeviceBuffer x = DeviceBuffer::of(array_of(d, "x"), get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer candidates = DeviceBuffer::of(array_of(d, "candidates")), first = DeviceBuffer::of(array_of(d, "first"));
  p.x = x.as(), p.candidates = candidates.as<uint8_t>(), p.first = first.as<int64_t>();
  DiversePlan plan = diverse_plan_cuda(p, device_of(d));
  plan.threads = get<int>(d, "threads", plan.threads);
  plan.blocks_per_image = get<bool>(d, "lazy", true) ? 1 : 0;
  if (d.contains("store") && !d["store"].cast<bool>()) {
    plan.store_distances = false;
    plan.workspace_bytes = get<int64_t>(d, "workspace_bytes", plan.workspace_bytes);
  }
  const DeviceBuffer workspace(plan.workspace_bytes), index(p.B * p.K * 8);
  p.workspace = workspace.as(), p.index = index.as<int64_t>();
  check(diverse_cuda(p, plan, nullptr));
  return index.numpy("int64", {p.B, p.K});
}

py::dict plan_of(const py::dict& d) {
  const DiversePlan plan = diverse_plan_cuda(params_of(d), device_of(d));
  py::dict out;
  out["store_distances"] = plan.store_distances;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["threads"] = plan.threads;
  out["smem_bytes"] = plan.smem_bytes;
  out["flops"] = plan.flops;
  out["bytes_moved"] = plan.bytes_moved;
  return out;
}

}  // namespace

void bind_diverse(py::module_& m) {
  m.def("diverse_cuda", &run_diverse);
  m.def("diverse_plan_cuda", &plan_of);
}

}  // namespace testing
}  // namespace tokensieve

// select_samples on numpy arrays: under the emulator, and on the CPU at a chosen level.
#include "select/samples.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

struct Samples {
  SamplesParams p;
  DeviceBuffer scores, candidates, points, index, counts, overflow, workspace;

  explicit Samples(const py::dict& d) {
    p.rows.B = d["B"].cast<int64_t>(), p.rows.N = d["N"].cast<int64_t>();
    p.R = d["R"].cast<int64_t>(), p.capacity = get<int64_t>(d, "capacity", p.R);
    p.rows.score_stride = get<int64_t>(d, "score_stride", p.rows.N);
    p.rows.candidates_stride = p.rows.N;
    p.rows.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
    scores = DeviceBuffer::of(array_of(d, "scores"), get<int64_t>(d, "offset_bytes", 0));
    candidates = DeviceBuffer::of(array_of(d, "candidates"));
    points = DeviceBuffer::of(array_of(d, "points"));
    p.rows.scores = scores.as(), p.rows.candidates = candidates.as<uint8_t>(), p.points = points.as<float>();
    index = DeviceBuffer(p.rows.B * p.capacity * 8), counts = DeviceBuffer(p.rows.B * 8), overflow = DeviceBuffer(p.rows.B);
    p.index = index.as<int64_t>(), p.counts = counts.as<int64_t>(), p.overflow = overflow.as<bool>();
  }
  void take_workspace(int64_t bytes) {
    workspace = DeviceBuffer(bytes);
    p.workspace = workspace.as();
  }
  py::tuple result() const {
    const std::vector<int64_t> shape = {p.rows.B};
    return py::make_tuple(index.numpy("int64", {p.rows.B, p.capacity}), counts.numpy("int64", shape), overflow.numpy("bool", shape));
  }
};

SamplesPlan plan_of(const py::dict& d, const SamplesParams& p) {
  DeviceInfo device;
  device.smem_per_block = get<int64_t>(d, "smem_per_block", device.smem_per_block);
  SamplesPlan plan = samples_plan_cuda(p, device);
  plan.threads = get<int>(d, "threads", plan.threads);
  return plan;
}

}  // namespace

void bind_samples(py::module_& m) {
  m.def("samples_cuda", [](const py::dict& d) {
    Samples samples(d);
    const SamplesPlan plan = plan_of(d, samples.p);
    samples.take_workspace(plan.workspace_bytes);
    check(samples_cuda(samples.p, plan, nullptr));
    return samples.result();
  });
  m.def("samples_cpu", [](const py::dict& d) {
    Samples samples(d);
    const SamplesPlan plan = samples_plan_cpu(samples.p);
    samples.take_workspace(plan.workspace_bytes);
    check(samples_cpu(samples.p, plan, static_cast<CpuLevel>(get<int>(d, "level", 0)), nullptr));
    return samples.result();
  });
  m.def("samples_plan_cuda", [](const py::dict& d) {
    SamplesParams p;
    p.rows.B = d["B"].cast<int64_t>(), p.rows.N = d["N"].cast<int64_t>(), p.R = p.capacity = d["R"].cast<int64_t>();
    const SamplesPlan plan = plan_of(d, p);
    py::dict out;
    out["threads"] = plan.threads, out["smem_bytes"] = plan.smem_bytes, out["workspace_bytes"] = plan.workspace_bytes;
    out["bytes_moved"] = plan.bytes_moved;
    return out;
  });
}

}  // namespace testing
}  // namespace tokensieve

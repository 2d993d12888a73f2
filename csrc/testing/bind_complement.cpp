// complement_index on numpy arrays: under the emulator, and on the CPU at a chosen level.
#include "select/complement.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

struct Complement {
  ComplementParams p;
  DeviceBuffer index, out, workspace;

  explicit Complement(const py::dict& d) {
    p.B = d["B"].cast<int64_t>(), p.K = d["K"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.capacity = d["capacity"].cast<int64_t>();
    p.index_stride = get<int64_t>(d, "index_stride", p.K);
    index = DeviceBuffer::of(array_of(d, "index"));
    out = DeviceBuffer(p.B * p.capacity * 8);
    p.index = index.as<int64_t>(), p.out = out.as<int64_t>();
  }
  void take_workspace(int64_t bytes) {
    workspace = DeviceBuffer(bytes);
    p.workspace = workspace.as();
  }
  py::array result() const { return out.numpy("int64", {p.B, p.capacity}); }
};

ComplementPlan plan_of(const py::dict& d, const ComplementParams& p) {
  DeviceInfo device;
  device.smem_per_block = get<int64_t>(d, "smem_per_block", device.smem_per_block);
  ComplementPlan plan = complement_plan_cuda(p, device);
  plan.threads = get<int>(d, "threads", plan.threads);
  return plan;
}

}  // namespace

void bind_complement(py::module_& m) {
  m.def("complement_cuda", [](const py::dict& d) {
    Complement c(d);
    const ComplementPlan plan = plan_of(d, c.p);
    c.take_workspace(plan.workspace_bytes);
    check(complement_cuda(c.p, plan, nullptr));
    return c.result();
  });
  m.def("complement_cpu", [](const py::dict& d) {
    Complement c(d);
    const ComplementPlan plan = complement_plan_cpu(c.p);
    c.take_workspace(plan.workspace_bytes);
    check(complement_cpu(c.p, plan, static_cast<CpuLevel>(get<int>(d, "level", 0)), nullptr));
    return c.result();
  });
  m.def("complement_plan_cuda", [](const py::dict& d) {
    ComplementParams p;
    p.B = d["B"].cast<int64_t>(), p.K = d["K"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.capacity = d["capacity"].cast<int64_t>();
    const ComplementPlan plan = plan_of(d, p);
    py::dict out;
    out["threads"] = plan.threads, out["smem_bytes"] = plan.smem_bytes, out["workspace_bytes"] = plan.workspace_bytes;
    out["bytes_moved"] = plan.bytes_moved;
    return out;
  });
}

}  // namespace testing
}  // namespace tokensieve

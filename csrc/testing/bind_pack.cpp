// pack_index on numpy arrays: under the emulator (`level` absent), and on the CPU at a chosen level.
#include "select/pack.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {

void bind_pack(py::module_& m) {
  m.def("pack", [](const py::dict& d) {
    PackParams p;
    p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.K = d["K"].cast<int64_t>(), p.capacity = d["capacity"].cast<int64_t>();
    const DeviceBuffer index = DeviceBuffer::of(d["index"]), rows(p.capacity * 8), slots(p.B * p.K * 8), cu_seqlens((p.B + 1) * 4),
                       total(8);
    p.index = index.as<int64_t>(), p.rows = rows.as<int64_t>(), p.slots = slots.as<int64_t>();
    p.cu_seqlens = cu_seqlens.as<int32_t>(), p.total = total.as<int64_t>();
    p.index_stride = get<int64_t>(d, "index_stride", p.K);
    const bool cpu = d.contains("level");
    PackPlan plan = cpu ? pack_plan_cpu(p) : pack_plan_cuda(p, DeviceInfo());
    plan.threads = get<int>(d, "threads", plan.threads);
    const DeviceBuffer workspace(plan.workspace_bytes);
    p.workspace = workspace.as();
    check(cpu ? pack_cpu(p, plan, static_cast<CpuLevel>(d["level"].cast<int>()), nullptr) : pack_cuda(p, plan, nullptr));
    return py::make_tuple(rows.numpy("int64", {p.capacity}), slots.numpy("int64", {p.B, p.K}), cu_seqlens.numpy("int32", {p.B + 1}),
                          total.numpy("int64", {1}));
  });
  m.def("pack_plan_cuda", [](int64_t B, int64_t K, int64_t capacity) {
    PackParams p;
    p.B = B, p.K = K, p.capacity = capacity;
    const PackPlan plan = pack_plan_cuda(p, DeviceInfo());
    return py::make_tuple(plan.threads, plan.workspace_bytes, plan.bytes_moved);
  });
}

}  // namespace testing
}  // namespace tokensieve

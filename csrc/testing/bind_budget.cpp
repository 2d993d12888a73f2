// allocate_budget on numpy arrays: under the emulator, and on the CPU at a chosen level.
#include "select/budget.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

struct Budget {
  BudgetParams p;
  DeviceBuffer weights, total, cap, budget, shares;

  explicit Budget(const py::dict& d) {
    p.B = d["B"].cast<int64_t>(), p.P = d["P"].cast<int64_t>();
    p.wide = get<bool>(d, "wide", false);
    weights = DeviceBuffer::of(d["weights"]);
    total = DeviceBuffer::of(array_of(d, "total_rows"));
    cap = DeviceBuffer::of(array_of(d, "cap_parts"));
    budget = DeviceBuffer(p.B * p.P * 8);
    shares = DeviceBuffer(p.B * p.P * (p.wide ? 8 : 4));
    p.weights = weights.as(), p.total_rows = total.as<int64_t>(), p.cap_parts = cap.as<int64_t>();
    p.budget = budget.as<int64_t>(), p.shares = shares.as();
    p.total = get<int64_t>(d, "total", 0), p.cap = get<int64_t>(d, "cap", -1);
    p.ratio = get<double>(d, "ratio", 1.0), p.temperature = get<double>(d, "temperature", 1.0), p.epsilon = get<double>(d, "epsilon", 0.0);
    p.mode = static_cast<BudgetMode>(get<int>(d, "mode", 0));
    p.remainder = static_cast<BudgetRemainder>(get<int>(d, "remainder", 0));
  }
  py::tuple result() const {
    return py::make_tuple(budget.numpy("int64", {p.B, p.P}), shares.numpy(p.wide ? "float64" : "float32", {p.B, p.P}));
  }
};

}  // namespace

void bind_budget(py::module_& m) {
  m.def("budget_cuda", [](const py::dict& d) {
    const Budget budget(d);
    check(budget_cuda(budget.p, budget_plan_cuda(budget.p, DeviceInfo()), nullptr));
    return budget.result();
  });
  m.def("budget_cpu", [](const py::dict& d) {
    const Budget budget(d);
    check(budget_cpu(budget.p, static_cast<CpuLevel>(get<int>(d, "level", 0)), nullptr));
    return budget.result();
  });
  m.def("budget_plan_cuda", [](const py::dict& d) {
    BudgetParams p;
    p.B = d["B"].cast<int64_t>(), p.P = d["P"].cast<int64_t>(), p.wide = get<bool>(d, "wide", false);
    const BudgetPlan plan = budget_plan_cuda(p, DeviceInfo());
    py::dict out;
    out["threads"] = plan.threads, out["smem_bytes"] = plan.smem_bytes, out["bytes_moved"] = plan.bytes_moved;
    return out;
  });
}

}  // namespace testing
}  // namespace tokensieve

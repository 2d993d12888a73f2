// score_quantiles on numpy arrays: under the emulator, and on the CPU at a chosen level.
#include "select/quantiles.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

struct Quantiles {
  QuantilesParams p;
  DeviceBuffer scores, candidates, out, workspace;

  explicit Quantiles(const py::dict& d) {
    p.rows.B = d["B"].cast<int64_t>(), p.rows.N = d["N"].cast<int64_t>();
    p.rows.score_stride = get<int64_t>(d, "score_stride", p.rows.N);
    p.rows.candidates_stride = p.rows.N;
    p.rows.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
    scores = DeviceBuffer::of(array_of(d, "scores"), get<int64_t>(d, "offset_bytes", 0));
    candidates = DeviceBuffer::of(array_of(d, "candidates"));
    p.rows.scores = scores.as(), p.rows.candidates = candidates.as<uint8_t>();
    for (const double q : d["q"].cast<std::vector<double>>()) p.q[p.Q++] = static_cast<float>(q);
    out = DeviceBuffer(p.rows.B * p.Q * 4);
    p.out = out.as<float>();
  }
  py::array result() const { return out.numpy("float32", {p.rows.B, p.Q}); }
};

QuantilesPlan plan_of(const py::dict& d, const QuantilesParams& p) {
  QuantilesPlan plan = quantiles_plan_cuda(p, DeviceInfo());
  plan.rows.items_per_thread = get<int>(d, "items_per_thread", plan.rows.items_per_thread);
  plan.rows.threads = get<int>(d, "threads", plan.rows.threads);
  plan.rows.smem_bytes = get<int64_t>(d, "hold", plan.rows.smem_bytes);
  return plan;
}

}  // namespace

void bind_quantiles(py::module_& m) {
  m.def("quantiles_cuda", [](const py::dict& d) {
    const Quantiles quantiles(d);
    check(quantiles_cuda(quantiles.p, plan_of(d, quantiles.p), nullptr));
    return quantiles.result();
  });
  m.def("quantiles_cpu", [](const py::dict& d) {
    Quantiles quantiles(d);
    const QuantilesPlan plan = quantiles_plan_cpu(quantiles.p);
    quantiles.workspace = DeviceBuffer(plan.workspace_bytes);
    quantiles.p.workspace = quantiles.workspace.as();
    check(quantiles_cpu(quantiles.p, plan, static_cast<CpuLevel>(get<int>(d, "level", 0)), nullptr));
    return quantiles.result();
  });
  m.def("quantiles_plan_cuda", [](const py::dict& d) {
    const TopkPlan plan = plan_of(d, Quantiles(d).p).rows;
    py::dict out;
    out["threads"] = plan.threads, out["items_per_thread"] = plan.items_per_thread, out["smem_bytes"] = plan.smem_bytes;
    out["bytes_moved"] = plan.bytes_moved;
    return out;
  });
}

}  // namespace testing
}  // namespace tokensieve

// The counts of select_mass and select_threshold on numpy arrays: under the emulator, and on the CPU at a chosen level.
#include "select/count.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

struct Count {
  CountParams p;
  DeviceBuffer scores, candidates, always, levels, counts, take, overflow, workspace;

  explicit Count(const py::dict& d) {
    p.rows.B = d["B"].cast<int64_t>(), p.rows.N = d["N"].cast<int64_t>();
    p.rows.score_stride = get<int64_t>(d, "score_stride", p.rows.N);
    p.rows.candidates_stride = p.rows.always_keep_stride = p.rows.N;
    p.rows.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
    scores = DeviceBuffer::of(array_of(d, "scores"), get<int64_t>(d, "offset_bytes", 0));
    candidates = DeviceBuffer::of(array_of(d, "candidates"));
    always = DeviceBuffer::of(array_of(d, "always_keep"));
    levels = DeviceBuffer::of(array_of(d, "levels"));
    counts = DeviceBuffer(p.rows.B * 8), take = DeviceBuffer(p.rows.B * 8), overflow = DeviceBuffer(p.rows.B);
    p.rows.scores = scores.as(), p.rows.candidates = candidates.as<uint8_t>(), p.rows.always_keep = always.as<uint8_t>();
    p.levels = levels.as<float>(), p.level = get<double>(d, "level", 1.0);
    p.counts = counts.as<int64_t>(), p.take = take.as<int64_t>(), p.overflow = overflow.as<bool>();
    p.min_k = get<int64_t>(d, "min_k", 0), p.max_k = get<int64_t>(d, "max_k", p.rows.N), p.extra = get<int64_t>(d, "extra", 0);
    p.capacity = get<int64_t>(d, "capacity", p.rows.N);
    p.rule = static_cast<CountRule>(get<int>(d, "rule", 0));
  }
  py::tuple result() const {
    const std::vector<int64_t> shape = {p.rows.B};
    return py::make_tuple(counts.numpy("int64", shape), take.numpy("int64", shape), overflow.numpy("bool", shape));
  }
};

CountPlan plan_of(const py::dict& d, const CountParams& p) {
  DeviceInfo device;
  device.smem_per_block = get<int64_t>(d, "smem_per_block", device.smem_per_block);
  CountPlan plan = count_plan_cuda(p, device);
  plan.rows.items_per_thread = get<int>(d, "items_per_thread", plan.rows.items_per_thread);
  plan.rows.threads = get<int>(d, "threads", plan.rows.threads);
  plan.rows.smem_bytes = get<int64_t>(d, "hold", plan.rows.smem_bytes);
  return plan;
}

}  // namespace

void bind_count(py::module_& m) {
  m.def("count_cuda", [](const py::dict& d) {
    const Count count(d);
    check(count_cuda(count.p, plan_of(d, count.p), nullptr));
    return count.result();
  });
  m.def("count_cpu", [](const py::dict& d) {
    Count count(d);
    const CountPlan plan = count_plan_cpu(count.p);
    count.workspace = DeviceBuffer(plan.workspace_bytes);
    count.p.workspace = count.workspace.as();
    check(count_cpu(count.p, plan, static_cast<CpuLevel>(get<int>(d, "cpu_level", 0)), nullptr));
    return count.result();
  });
  m.def("count_plan_cuda", [](const py::dict& d) {
    const TopkPlan plan = plan_of(d, Count(d).p).rows;
    py::dict out;
    out["threads"] = plan.threads, out["items_per_thread"] = plan.items_per_thread, out["smem_bytes"] = plan.smem_bytes;
    return out;
  });
}

}  // namespace testing
}  // namespace tokensieve

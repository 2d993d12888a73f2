// Pooling and its gradients on numpy arrays: under the emulator (`level` absent), and on the CPU at a chosen level.
#include <algorithm>

#include "merge/pool_args.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

bool emulated(const py::dict& d) { return !d.contains("level"); }
CpuLevel level_of(const py::dict& d) { return static_cast<CpuLevel>(d["level"].cast<int>()); }

// Input `name` of a call, `offset_bytes` into its buffer.
DeviceBuffer input(const py::dict& d, const char* name) { return DeviceBuffer::of(array_of(d, name), get<int64_t>(d, "offset_bytes", 0)); }

// Output of `count` elements, also off alignment, full of 0xFF.
DeviceBuffer output(const py::dict& d, int64_t count, int64_t element) {
  const int64_t bytes = count * element;
  py::array_t<uint8_t> filled(bytes);
  std::fill_n(filled.mutable_data(), bytes, uint8_t{0xFF});
  return DeviceBuffer::of(filled, get<int64_t>(d, "offset_bytes", 0));
}
py::array bytes_of(const DeviceBuffer& buffer) { return buffer.numpy("uint8", {buffer.bytes()}); }

void force(const py::dict& d, PoolPlan& plan) {
  plan.vector = get<int>(d, "vector", plan.vector);
  plan.splits = get<int>(d, "splits", plan.splits);
  plan.rows_per_block = get<int>(d, "rows_per_block", plan.rows_per_block);
  plan.workspace_bytes = std::max(plan.workspace_bytes, get<int64_t>(d, "workspace_bytes", 0));
}

PoolParams pool_params(const py::dict& d) {
  PoolParams p;
  p.B = d["B"].cast<int64_t>(), p.C = d["C"].cast<int64_t>();
  p.dtype = dtype_of(d["dtype"].cast<std::string>());
  p.kind = static_cast<PoolKind>(d["kind"].cast<int>());
  p.adaptive = get<bool>(d, "adaptive", false), p.temperature = get<float>(d, "temperature", 1.0f);
  const auto axes = d["axes"].cast<std::vector<std::vector<int64_t>>>();
  for (size_t i = 0; i < 3; ++i) p.axes[i] = {axes[i][0], axes[i][1], axes[i][2], axes[i][3]};
  p.stride_n = get<int64_t>(d, "stride_n", p.C), p.stride_b = get<int64_t>(d, "stride_b", pool::tokens(p) * p.stride_n);
  return p;
}

py::array run_pool(const py::dict& d) {
  PoolParams p = pool_params(d);
  const DeviceBuffer x = input(d, "x"), scores = DeviceBuffer::of(array_of(d, "scores"));
  const DeviceBuffer out = output(d, p.B * pool::outputs(p) * pool::stacked(p) * p.C, dtype_bytes(p.dtype));
  p.x = x.as(), p.out = out.as(), p.scores = scores.as<float>();
  PoolPlan plan = emulated(d) ? pool_plan_cuda(p, DeviceInfo()) : pool_plan_cpu(p);
  force(d, plan);
  const DeviceBuffer workspace(plan.workspace_bytes);
  p.workspace = workspace.as();
  check(emulated(d) ? pool_cuda(p, plan, nullptr) : pool_cpu(p, plan, level_of(d), nullptr));
  return bytes_of(out);
}

py::tuple run_pool_grad(const py::dict& d) {
  PoolParams p = pool_params(d);
  const DeviceBuffer x = input(d, "x"), forward = input(d, "out"), grad = input(d, "grad"),
                     scores = DeviceBuffer::of(array_of(d, "scores"));
  const int64_t count = p.B * pool::tokens(p);
  const DeviceBuffer x_grad = output(d, count * p.C, dtype_bytes(p.dtype)), scores_grad(count * 4);
  p.x = x.as(), p.out = forward.as(), p.grad = grad.as(), p.scores = scores.as<float>();
  if (get<bool>(d, "x_wanted", true)) p.x_grad = x_grad.as();
  if (get<bool>(d, "scores_wanted", false)) p.scores_grad = scores_grad.as<float>();
  PoolPlan plan = emulated(d) ? pool_grad_plan_cuda(p, DeviceInfo()) : pool_grad_plan_cpu(p);
  force(d, plan);
  const DeviceBuffer workspace(plan.workspace_bytes);
  p.workspace = workspace.as();
  check(emulated(d) ? pool_grad_cuda(p, plan, nullptr) : pool_grad_cpu(p, plan, level_of(d), nullptr));
  return py::make_tuple(bytes_of(x_grad), scores_grad.numpy("float32", {p.B, pool::tokens(p)}));
}

// `grad`: the gradient, of x [B, R, C].
py::array run_runs(const py::dict& d) {
  const bool grad = get<bool>(d, "grad", false);
  RunsParams p;
  p.B = d["B"].cast<int64_t>(), p.S = d["S"].cast<int64_t>(), p.C = d["C"].cast<int64_t>();
  p.images = d["images"].cast<int64_t>(), p.length = d["length"].cast<int64_t>(), p.stride = d["stride"].cast<int64_t>();
  p.dtype = dtype_of(d["dtype"].cast<std::string>());
  p.stride_n = get<int64_t>(d, "stride_n", p.C), p.stride_b = get<int64_t>(d, "stride_b", p.S * p.stride_n);
  const DeviceBuffer x = input(d, "x"), starts = DeviceBuffer::of(d["starts"]);
  const DeviceBuffer out = output(d, p.B * (grad ? p.S : pool::rows(p)) * p.C, dtype_bytes(p.dtype));
  p.starts = starts.as<int64_t>(), p.starts_stride = get<int64_t>(d, "starts_stride", p.images);
  if (grad) {
    p.grad = x.as(), p.x_grad = out.as();
  } else {
    p.x = x.as(), p.out = out.as();
  }
  PoolPlan plan = !emulated(d) ? runs_plan_cpu(p) : grad ? runs_grad_plan_cuda(p, DeviceInfo()) : runs_plan_cuda(p, DeviceInfo());
  force(d, plan);
  if (emulated(d)) {
    check(grad ? runs_grad_cuda(p, plan, nullptr) : runs_cuda(p, plan, nullptr));
  } else {
    check(grad ? runs_grad_cpu(p, plan, level_of(d), nullptr) : runs_cpu(p, plan, level_of(d), nullptr));
  }
  return bytes_of(out);
}

MeansParams means_params(const py::dict& d) {
  MeansParams p;
  p.B = d["B"].cast<int64_t>(), p.T = d["T"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.C = d["C"].cast<int64_t>();
  p.dtype = dtype_of(d["dtype"].cast<std::string>());
  p.stride_n = get<int64_t>(d, "stride_n", p.C), p.stride_t = get<int64_t>(d, "stride_t", p.N * p.stride_n);
  p.stride_b = get<int64_t>(d, "stride_b", p.T * p.stride_t);
  return p;
}

py::tuple run_means(const py::dict& d) {
  MeansParams p = means_params(d);
  const DeviceBuffer x = input(d, "x"), rows = output(d, p.B * p.T * p.C, dtype_bytes(p.dtype));
  const DeviceBuffer columns = output(d, p.B * p.N * p.C, dtype_bytes(p.dtype));
  p.x = x.as(), p.rows = rows.as(), p.columns = columns.as();
  PoolPlan plan = emulated(d) ? means_plan_cuda(p, DeviceInfo()) : means_plan_cpu(p);
  force(d, plan);
  const DeviceBuffer workspace(plan.workspace_bytes);
  p.workspace = workspace.as();
  check(emulated(d) ? means_cuda(p, plan, nullptr) : means_cpu(p, plan, level_of(d), nullptr));
  return py::make_tuple(bytes_of(rows), bytes_of(columns));
}

py::array run_means_grad(const py::dict& d) {
  MeansParams p = means_params(d);
  const DeviceBuffer rows = input(d, "rows_grad"), columns = input(d, "columns_grad");
  const DeviceBuffer out = output(d, p.B * p.T * p.N * p.C, dtype_bytes(p.dtype));
  p.rows_grad = rows.as(), p.columns_grad = columns.as(), p.x_grad = out.as();
  PoolPlan plan = emulated(d) ? means_grad_plan_cuda(p, DeviceInfo()) : means_plan_cpu(p);
  force(d, plan);
  check(emulated(d) ? means_grad_cuda(p, plan, nullptr) : means_grad_cpu(p, plan, level_of(d), nullptr));
  return bytes_of(out);
}

py::dict fields(const PoolPlan& plan) {
  py::dict out;
  out["vector"] = plan.vector, out["splits"] = plan.splits, out["blocks"] = plan.blocks, out["rows_per_block"] = plan.rows_per_block;
  out["workspace_bytes"] = plan.workspace_bytes, out["bytes_moved"] = plan.bytes_moved;
  return out;
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("pool", &run_pool);
  m.def("pool_grad", &run_pool_grad);
  m.def("pool_runs", &run_runs);
  m.def("pool_means", &run_means);
  m.def("pool_means_grad", &run_means_grad);
  m.def("pool_plan_cuda", [](const py::dict& d, bool grad) {
    const PoolParams p = pool_params(d);
    return fields(grad ? pool_grad_plan_cuda(p, DeviceInfo()) : pool_plan_cuda(p, DeviceInfo()));
  });
  m.def("pool_means_plan_cuda", [](const py::dict& d) { return fields(means_plan_cuda(means_params(d), DeviceInfo())); });
}

}  // namespace testing
}  // namespace tokensieve

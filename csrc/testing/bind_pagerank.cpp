// pagerank_cuda under the emulator, and its plan. `p` is a dict of the fields of PagerankParams (tests/kernels/test_pagerank_cuda.py).
#include <stdexcept>

#include "score/pagerank_args.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

PagerankParams shape_of(const py::dict& p) {
  PagerankParams r;
  const auto sizes = p["sizes"].cast<std::vector<int64_t>>();
  r.B = sizes.at(0), r.H = sizes.at(1), r.Hkv = sizes.at(2), r.N = sizes.at(3), r.D = sizes.at(4);
  // Contiguous [B, heads, N, D], or tokens before heads.
  const bool tokens_first = get<bool>(p, "tokens_first", false);
  const auto strides = [&](int64_t heads, int64_t (&out)[3]) {
    out[0] = heads * r.N * r.D;
    out[1] = tokens_first ? r.D : r.N * r.D;
    out[2] = tokens_first ? heads * r.D : r.D;
  };
  strides(r.H, r.query_stride);
  strides(r.Hkv, r.key_stride);
  r.mask_stride = r.N;
  r.scale = get<float>(p, "scale", 1.0f);
  r.causal = get<bool>(p, "causal", false);
  r.iterations = get<int64_t>(p, "iterations", 5);
  r.dtype = dtype_of(get<std::string>(p, "dtype", "float32"));
  return r;
}

PagerankPlan plan_of(const py::dict& p, const PagerankParams& r) {
  DeviceInfo device;
  device.smem_per_block = get<int64_t>(p, "smem_per_block", device.smem_per_block);
  device.wgmma = get<bool>(p, "device_wgmma", device.wgmma);
  PagerankPlan plan = pagerank_plan_cuda(r, device);
  if (p.contains("col_splits")) {
    ScorePlan sweeps;
    sweeps.num_chunks = (r.N + plan.tile_keys - 1) / plan.tile_keys;
    sweeps.row_splits = plan.row_splits = get<int64_t>(p, "row_splits", 1);
    sweeps.col_splits = plan.col_splits = get<int64_t>(p, "col_splits", 1);
    colsum::plan_two_pass_sizes(pagerank::score_params(r), sweeps);
    plan.workspace_bytes = sweeps.workspace_bytes + 4 * r.B * r.H * r.N;
    plan.num_semaphores = sweeps.num_semaphores;
  }
  return plan;
}

py::dict dict_of(const PagerankPlan& plan) {
  py::dict d;
  d["tile_rows"] = plan.tile_rows;
  d["tile_keys"] = plan.tile_keys;
  d["row_splits"] = plan.row_splits;
  d["col_splits"] = plan.col_splits;
  d["wgmma"] = plan.wgmma;
  d["workspace_bytes"] = plan.workspace_bytes;
  d["num_semaphores"] = plan.num_semaphores;
  d["threads"] = plan.threads;
  d["smem_bytes"] = plan.smem_bytes;
  d["bytes_moved"] = plan.bytes_moved;
  d["flops"] = plan.flops;
  return d;
}

py::array run_pagerank_cuda(const py::dict& p) {
  PagerankParams r = shape_of(p);
  const DeviceBuffer query = DeviceBuffer::of(p["query"]), key = DeviceBuffer::of(p["key"]);
  const DeviceBuffer mask = DeviceBuffer::of(array_of(p, "mask")), start = DeviceBuffer::of(array_of(p, "start"));
  r.query = query.as(), r.key = key.as(), r.start = start.as<float>();
  r.mask = mask.as<uint8_t>();
  const PagerankPlan plan = plan_of(p, r);
  const DeviceBuffer rank(r.B * r.H * r.N * 4), workspace(plan.workspace_bytes), semaphores(plan.num_semaphores * 4);
  for (int64_t i = 0; i < plan.num_semaphores; ++i) semaphores.as<int32_t>()[i] = 0;
  r.rank = rank.as<float>(), r.workspace = workspace.as(), r.semaphores = semaphores.as<int32_t>();
  check(pagerank_cuda(r, plan, nullptr));
  for (int64_t i = 0; i < plan.num_semaphores; ++i) {
    if (semaphores.as<int32_t>()[i] != 0) throw std::runtime_error("semaphores must be left at zero");
  }
  return rank.numpy("float32", {r.B, r.H, r.N});
}

py::dict pagerank_plan(const py::dict& p) { return dict_of(plan_of(p, shape_of(p))); }

}  // namespace

void bind_pagerank(py::module_& m) {
  m.def("pagerank_cuda", &run_pagerank_cuda);
  m.def("pagerank_plan_cuda", &pagerank_plan);
}

}  // namespace testing
}  // namespace tokensieve

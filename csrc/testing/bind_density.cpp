// density_cuda and nearest_cuda under the emulator.
#include "similarity/density_args.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

template <typename Params>
Params tokens_of(const py::dict& d) {
  Params p;
  p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.C = d["C"].cast<int64_t>();
  p.x_stride[1] = get<int64_t>(d, "row_stride", p.C);
  p.x_stride[0] = get<int64_t>(d, "batch_stride", p.N * p.x_stride[1]);
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  return p;
}

py::tuple run_density(const py::dict& d) {
  DensityParams p = tokens_of<DensityParams>(d);
  p.k = d["k"].cast<int64_t>();
  p.mask_stride = p.N;
  const DeviceBuffer x = DeviceBuffer::of(array_of(d, "x"), get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer mask = DeviceBuffer::of(array_of(d, "mask")), noise = DeviceBuffer::of(array_of(d, "noise"));
  p.x = x.as(), p.mask = mask.as<uint8_t>(), p.noise = noise.as<float>();
  DensityPlan plan = density_plan_cuda(p, DeviceInfo());
  if (d.contains("strip_rows")) {
    plan.store_distances = false;
    plan.strip_rows = d["strip_rows"].cast<int64_t>();
    plan.workspace_bytes = density::layout(p, plan).bytes;
  }
  const DeviceBuffer workspace(plan.workspace_bytes), density(p.B * p.N * 4), distance(p.B * p.N * 4);
  p.workspace = workspace.as(), p.density = density.as<float>(), p.distance = distance.as<float>();
  check(density_cuda(p, plan, nullptr));
  return py::make_tuple(density.numpy("float32", {p.B, p.N}), distance.numpy("float32", {p.B, p.N}));
}

py::array run_nearest(const py::dict& d) {
  NearestParams p = tokens_of<NearestParams>(d);
  p.K = d["K"].cast<int64_t>();
  const DeviceBuffer x = DeviceBuffer::of(array_of(d, "x"), get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer centers = DeviceBuffer::of(array_of(d, "centers"));
  p.x = x.as(), p.centers = centers.as<int64_t>();
  const NearestPlan plan = nearest_plan_cuda(p, DeviceInfo());
  const DeviceBuffer workspace(plan.workspace_bytes), labels(p.B * p.N * 8);
  p.workspace = workspace.as(), p.labels = labels.as<int64_t>();
  check(nearest_cuda(p, plan, nullptr));
  return labels.numpy("int64", {p.B, p.N});
}

}  // namespace

void bind_density(py::module_& m) {
  m.def("density_cuda", &run_density);
  m.def("nearest_cuda", &run_nearest);
}

}  // namespace testing
}  // namespace tokensieve

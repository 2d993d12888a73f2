// cosine_cuda under the emulator, and its plan.
#include <stdexcept>

#include "similarity/cosine_args.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

CosineParams params_of(const py::dict& d) {
  CosineParams p;
  const auto sizes = d["sizes"].cast<std::vector<int64_t>>();
  p.B = sizes.at(0), p.M = sizes.at(1), p.N = sizes.at(2), p.C = sizes.at(3);
  p.a_stride[1] = get<int64_t>(d, "a_row", p.C), p.b_stride[1] = get<int64_t>(d, "b_row", p.C);
  p.a_stride[0] = p.M * p.a_stride[1], p.b_stride[0] = p.N * p.b_stride[1];
  p.candidates_stride = p.N;
  p.T = get<int64_t>(d, "T", 1);
  p.exclude_self = get<bool>(d, "exclude_self", false), p.largest = get<bool>(d, "largest", true);
  p.reduction = static_cast<CosineReduction>(get<int>(d, "reduction", 0));
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  return p;
}

DeviceInfo device_of(const py::dict& d) {
  DeviceInfo device;
  device.num_sms = get<int>(d, "num_sms", device.num_sms);
  return device;
}

py::dict run_cosine(const py::dict& d) {
  CosineParams p = params_of(d);
  const int64_t offset = get<int64_t>(d, "offset_bytes", 0);
  const DeviceBuffer a = DeviceBuffer::of(d["a"], offset), b = DeviceBuffer::of(d["b"], offset);
  const DeviceBuffer candidates = DeviceBuffer::of(array_of(d, "candidates"));
  p.a = a.as(), p.b = b.as(), p.candidates = candidates.as<uint8_t>();
  CosinePlan plan = cosine_plan_cuda(p, device_of(d));
  if (d.contains("splits")) {  // any number works, also more than there are column tiles or rows of b
    plan.splits = d["splits"].cast<int64_t>();
    plan.workspace_bytes = cosine::layout(p, plan.splits).bytes;
    const bool lists = cosine::keep_of(p) > 0 && plan.splits > 1;
    plan.num_semaphores = cosine::sums_rows(p) ? plan.num_semaphores : lists ? p.B * cosine::ceil_div(p.M, cosine::kSide) : 0;
  }
  const bool match = p.reduction == CosineReduction::kMatch;
  const int64_t width = match ? p.T : p.reduction == CosineReduction::kNone ? p.N : 1;
  const DeviceBuffer value(p.B * p.M * width * 4), index(match ? p.B * p.M * width * 8 : 0), workspace(plan.workspace_bytes);
  const DeviceBuffer semaphores(plan.num_semaphores * 4);
  for (int64_t i = 0; i < plan.num_semaphores; ++i) semaphores.as<int32_t>()[i] = 0;
  p.value = value.as<float>(), p.index = index.as<int64_t>(), p.workspace = workspace.as(), p.semaphores = semaphores.as<int32_t>();
  check(cosine_cuda(p, plan, nullptr));
  for (int64_t i = 0; i < plan.num_semaphores; ++i) {
    if (semaphores.as<int32_t>()[i] != 0) throw std::runtime_error("semaphores must be left at zero");
  }
  py::dict result;
  result["value"] = value.numpy("float32", {p.B, p.M, width});
  if (match) result["index"] = index.numpy("int64", {p.B, p.M, width});
  return result;
}

py::dict plan_of(const py::dict& d) {
  const CosinePlan plan = cosine_plan_cuda(params_of(d), device_of(d));
  py::dict out;
  out["tile"] = py::make_tuple(plan.tile_rows, plan.tile_columns);
  out["splits"] = plan.splits, out["num_semaphores"] = plan.num_semaphores, out["threads"] = plan.threads;
  out["smem_bytes"] = plan.smem_bytes, out["workspace_bytes"] = plan.workspace_bytes;
  out["flops"] = plan.flops, out["bytes_moved"] = plan.bytes_moved;
  return out;
}

}  // namespace

void bind_cosine(py::module_& m) {
  m.def("cosine_cuda", &run_cosine);
  m.def("cosine_plan_cuda", &plan_of);
}

}  // namespace testing
}  // namespace tokensieve

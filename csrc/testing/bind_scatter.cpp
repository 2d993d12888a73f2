// scatter_tokens and its gradient on numpy arrays: under the emulator (`level` absent), and on the CPU at a chosen level.
#include <algorithm>

#include "select/scatter.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

// Buffers of one call. Every tensor is a dict: base and value (bytes as uint8), base_strides and value_strides (b, n, m), segments,
// segment_bytes, dtype, offset_bytes (of base, value and output).
struct Scatter {
  ScatterParams p;
  ScatterPlan plan;
  std::vector<DeviceBuffer> inputs, outputs;
  DeviceBuffer index, weights, weight_grad;

  Scatter(const py::dict& d, bool grad) {
    p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.K = d["K"].cast<int64_t>();
    p.add = get<bool>(d, "add", false);
    for (const py::handle& item : d["tensors"].cast<py::list>()) tensor(item.cast<py::dict>(), grad, get<bool>(d, "values_wanted", true));
    index = DeviceBuffer::of(d["index"]);
    weights = DeviceBuffer::of(array_of(d, "weights"));
    p.index = index.as<int64_t>(), p.weights = weights.as<float>();
    p.index_stride = get<int64_t>(d, "index_stride", p.K);
    if (grad && get<bool>(d, "weights_wanted", true)) {
      weight_grad = DeviceBuffer(p.B * p.K * 4);
      p.weight_grad = weight_grad.as<float>();
    }
    plan = scatter_plan_cuda(p, DeviceInfo());
    plan.blocks_per_row = get<int>(d, "blocks_per_row", plan.blocks_per_row);
    plan.threads = get<int>(d, "threads", plan.threads);
  }

  void tensor(const py::dict& t, bool grad, bool output) {
    const int64_t offset = get<int64_t>(t, "offset_bytes", 0);
    ScatterTensor x;
    x.segments = get<int64_t>(t, "segments", 1);
    x.segment_bytes = t["segment_bytes"].cast<int64_t>();
    x.dtype = dtype_of(get<std::string>(t, "dtype", "float32"));
    const auto base = get<std::vector<int64_t>>(t, "base_strides", {0, 0, 0}),
               value = get<std::vector<int64_t>>(t, "value_strides", {0, 0, 0});
    x.base_b = base[0], x.base_n = base[1], x.base_m = base[2];
    x.value_b = value[0], x.value_n = value[1], x.value_m = value[2];
    inputs.push_back(DeviceBuffer::of(t["base"], offset));
    x.base = inputs.back().as();
    inputs.push_back(DeviceBuffer::of(t["value"], offset));
    x.value = inputs.back().as();
    if (output) {
      outputs.push_back(DeviceBuffer::of(py::array_t<uint8_t>(p.B * (grad ? p.K : p.N) * x.segments * x.segment_bytes), offset));
      std::fill_n(outputs.back().as<uint8_t>(), outputs.back().bytes(), uint8_t{0xFF});
      x.dst = outputs.back().as();
    }
    p.tensors[p.num_tensors++] = x;
  }

  py::list result() const {
    py::list out;
    for (const DeviceBuffer& buffer : outputs) out.append(buffer.numpy("uint8", {buffer.bytes()}));
    return out;
  }
};

py::list run(const py::dict& d) {
  const Scatter s(d, false);
  check(d.contains("level") ? scatter_cpu(s.p, static_cast<CpuLevel>(d["level"].cast<int>()), nullptr)
                            : scatter_cuda(s.p, s.plan, nullptr));
  return s.result();
}

py::tuple run_grad(const py::dict& d) {
  const Scatter s(d, true);
  check(d.contains("level") ? scatter_grad_cpu(s.p, static_cast<CpuLevel>(d["level"].cast<int>()), nullptr)
                            : scatter_grad_cuda(s.p, nullptr));
  return py::make_tuple(s.result(), s.weight_grad.numpy("float32", {s.p.weight_grad != nullptr ? s.p.B : 0, s.p.K}));
}

}  // namespace

void bind_scatter(py::module_& m) {
  m.def("scatter", &run);
  m.def("scatter_grad", &run_grad);
  m.def("scatter_plan_cuda", [](int64_t B, int64_t N, int64_t K, int64_t bytes, bool add) {
    ScatterParams p;
    p.B = B, p.N = N, p.K = K, p.add = add, p.num_tensors = 1;
    p.tensors[0].segment_bytes = bytes;
    const ScatterPlan plan = scatter_plan_cuda(p, DeviceInfo());
    return py::make_tuple(plan.threads, plan.blocks_per_row, plan.bytes_moved);
  });
}

}  // namespace testing
}  // namespace tokensieve

// Merging and its gradient on numpy arrays: under the emulator (`level` absent), and on the CPU at a chosen level.
#include <algorithm>

#include "merge/merge.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

MergeType type_of(const std::string& name) {
  if (name == "int32") return MergeType::kInt32;
  if (name == "int64") return MergeType::kInt64;
  const DType dtype = dtype_of(name);
  return dtype == DType::kFloat32 ? MergeType::kFloat32 : dtype == DType::kFloat16 ? MergeType::kFloat16 : MergeType::kBFloat16;
}

// Buffers of one call. Every tensor is a dict: data (and grad, out) as bytes, stride_b, stride_n, stride_m, segments, segment_bytes, dtype,
// offset_bytes of all of them.
struct Merge {
  MergeParams p;
  MergePlan plan;
  std::vector<DeviceBuffer> inputs, outputs;
  DeviceBuffer inverse, own, from, weights, size, total, log_total, total_grad, weight_grad, workspace;
  bool emulated;

  Merge(const py::dict& d, bool grad) : emulated(!d.contains("level")) {
    p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.R = d["R"].cast<int64_t>();
    p.K = get<int64_t>(d, "K", 0), p.rows = get<int64_t>(d, "rows", 0);
    p.mode = static_cast<MergeMode>(d["mode"].cast<int>());
    p.epsilon = get<float>(d, "epsilon", 0.0f);
    p.complement = get<bool>(d, "complement", false);
    inverse = DeviceBuffer::of(d["inverse"]), own = DeviceBuffer::of(array_of(d, "own")), from = DeviceBuffer::of(array_of(d, "from"));
    weights = DeviceBuffer::of(array_of(d, "weights")), size = DeviceBuffer::of(array_of(d, "size"));
    p.inverse = inverse.as<int64_t>(), p.own = own.as<int64_t>(), p.from = from.as<int64_t>();
    p.weights = weights.as<float>(), p.size = size.as<float>();
    p.inverse_stride = get<int64_t>(d, "inverse_stride", p.complement ? p.K : p.N);
    p.own_stride = p.R, p.from_stride = p.N;
    for (const py::handle& item : d["tensors"].cast<py::list>()) tensor(item.cast<py::dict>(), grad, get<bool>(d, "values_wanted", true));
    if (grad) {
      total_grad = DeviceBuffer::of(array_of(d, "total_grad"));
      p.total_grad = total_grad.as<float>();
      if (get<bool>(d, "weights_wanted", false)) weight_grad = DeviceBuffer(p.B * p.N * 4), p.weight_grad = weight_grad.as<float>();
    } else {
      total = DeviceBuffer(p.B * p.R * 4), log_total = DeviceBuffer(p.B * p.R * 4);
      p.total = total.as<float>(), p.log_total = log_total.as<float>();
    }
    plan = !emulated ? merge_plan_cpu(p) : grad ? merge_grad_plan_cuda(p, DeviceInfo()) : merge_plan_cuda(p, DeviceInfo());
    if (emulated) force(d);
    workspace = DeviceBuffer(plan.workspace_bytes);
    p.workspace = workspace.as();
  }

  void force(const py::dict& d) {
    plan.blocks_per_row = get<int>(d, "blocks_per_row", plan.blocks_per_row);
    plan.column_blocks = get<int>(d, "column_blocks", plan.column_blocks);
    plan.workspace_bytes = std::max(plan.workspace_bytes, get<int64_t>(d, "workspace_bytes", 0));
  }

  void tensor(const py::dict& t, bool grad, bool output) {
    const int64_t offset = get<int64_t>(t, "offset_bytes", 0);
    MergeTensor x;
    x.segments = get<int64_t>(t, "segments", 1);
    x.segment_bytes = t["segment_bytes"].cast<int64_t>();
    x.type = type_of(get<std::string>(t, "dtype", "float32"));
    x.stride_b = t["stride_b"].cast<int64_t>(), x.stride_n = t["stride_n"].cast<int64_t>(), x.stride_m = t["stride_m"].cast<int64_t>();
    for (const auto& [name, pointer] : {std::pair{"data", &x.src}, std::pair{"grad", &x.grad}, std::pair{"out", &x.out}}) {
      inputs.push_back(DeviceBuffer::of(array_of(t, name), offset));
      *pointer = inputs.back().as();
    }
    if (output) {
      outputs.push_back(DeviceBuffer::of(py::array_t<uint8_t>(p.B * (grad ? p.N : p.R) * x.segments * x.segment_bytes), offset));
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

py::tuple run(const py::dict& d) {
  const Merge m(d, false);
  check(m.emulated ? merge_cuda(m.p, m.plan, nullptr) : merge_cpu(m.p, m.plan, static_cast<CpuLevel>(d["level"].cast<int>()), nullptr));
  return py::make_tuple(m.result(), m.total.numpy("float32", {m.p.B, m.p.R}), m.log_total.numpy("float32", {m.p.B, m.p.R}));
}

py::tuple run_grad(const py::dict& d) {
  const Merge m(d, true);
  check(m.emulated ? merge_grad_cuda(m.p, m.plan, nullptr)
                   : merge_grad_cpu(m.p, m.plan, static_cast<CpuLevel>(d["level"].cast<int>()), nullptr));
  return py::make_tuple(m.result(), m.weight_grad.numpy("float32", {m.p.weight_grad != nullptr ? m.p.B : 0, m.p.N}));
}

}  // namespace

void bind_merge(py::module_& m) {
  m.def("merge", &run);
  m.def("merge_grad", &run_grad);
  m.def("merge_plan_cuda", [](int64_t B, int64_t N, int64_t R, int64_t bytes, int mode, bool grad) {
    MergeParams p;
    p.B = B, p.N = N, p.R = R, p.mode = static_cast<MergeMode>(mode), p.num_tensors = 1;
    p.tensors[0].segment_bytes = p.tensors[0].stride_n = p.tensors[0].stride_b = bytes;
    const MergePlan plan = grad ? merge_grad_plan_cuda(p, DeviceInfo()) : merge_plan_cuda(p, DeviceInfo());
    return py::make_tuple(plan.blocks_per_row, plan.column_blocks, plan.workspace_bytes, plan.bytes_moved);
  });
}

}  // namespace testing
}  // namespace tokensieve

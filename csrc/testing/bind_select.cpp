// topk_cuda, gather_cuda, scatter_rows_cuda and topk_gather_cuda under the emulator, and their plans.
#include <algorithm>

#include "select/gather.h"
#include "select/topk.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

DeviceInfo device_of(const py::dict& p) {
  DeviceInfo device;
  device.num_sms = get<int>(p, "num_sms", device.num_sms);
  device.smem_per_block = get<int64_t>(p, "smem_per_block", device.smem_per_block);
  return device;
}

// Buffers of one selection. Rows of storage may be wider than N (strides), and start off alignment (offset_bytes).
struct Topk {
  TopkParams p;
  TopkPlan plan;
  DeviceBuffer scores, candidates, always, k_rows, index, workspace;

  explicit Topk(const py::dict& d) {
    p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.K = d["K"].cast<int64_t>();
    p.score_stride = get<int64_t>(d, "score_stride", p.N);
    p.candidates_stride = p.always_keep_stride = p.N;
    p.offset = get<int64_t>(d, "offset", 0), p.prefix = get<int64_t>(d, "prefix", 0), p.suffix = get<int64_t>(d, "suffix", 0);
    p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
    p.order = get<std::string>(d, "order", "position") == "score" ? TopkOrder::kScore : TopkOrder::kPosition;
    scores = DeviceBuffer::of(array_of(d, "scores"), get<int64_t>(d, "offset_bytes", 0));
    candidates = DeviceBuffer::of(array_of(d, "candidates"));
    always = DeviceBuffer::of(array_of(d, "always_keep"));
    k_rows = DeviceBuffer::of(array_of(d, "k_rows"));
    p.scores = scores.as(), p.candidates = candidates.as<uint8_t>(), p.always_keep = always.as<uint8_t>();
    p.k_rows = k_rows.as<int64_t>();
    plan = topk_plan_cuda(p, device_of(d));
    plan.items_per_thread = get<int>(d, "items_per_thread", plan.items_per_thread);
    plan.threads = get<int>(d, "threads", plan.threads);
    plan.smem_bytes = get<int64_t>(d, "smem_bytes", plan.smem_bytes);
    index = DeviceBuffer(p.B * topk_output_length(p) * 8);
    workspace = DeviceBuffer(plan.workspace_bytes);
    p.index = index.as<int64_t>(), p.workspace = workspace.as();
  }
  py::array result() const { return index.numpy("int64", {p.B, topk_output_length(p)}); }
};

py::dict dict_of(const TopkPlan& plan) {
  py::dict d;
  d["workspace_bytes"] = plan.workspace_bytes;
  d["threads"] = plan.threads;
  d["items_per_thread"] = plan.items_per_thread;
  d["smem_bytes"] = plan.smem_bytes;
  d["bytes_moved"] = plan.bytes_moved;
  return d;
}

py::dict dict_of(const GatherPlan& plan) {
  py::dict d;
  d["threads"] = plan.threads;
  d["blocks_per_row"] = plan.blocks_per_row;
  d["vector_bytes"] = plan.vector_bytes;
  d["bytes_moved"] = plan.bytes_moved;
  return d;
}

// Buffers of one gather. Every tensor is a dict: data (bytes as uint8), stride_b, stride_n, stride_m, segments, segment_bytes,
// offset_bytes.
struct Gather {
  GatherParams p;
  GatherPlan plan;
  std::vector<DeviceBuffer> sources, outputs;
  DeviceBuffer index;

  Gather(const py::dict& d, int64_t B, int64_t N, int64_t K, int64_t rows) {
    p.B = B, p.N = N, p.K = K;
    for (const py::handle& item : d["tensors"].cast<py::list>()) {
      const auto t = item.cast<py::dict>();
      const int64_t offset = get<int64_t>(t, "offset_bytes", 0);
      GatherTensor g;
      g.segments = get<int64_t>(t, "segments", 1);
      g.segment_bytes = t["segment_bytes"].cast<int64_t>();
      g.stride_b = get<int64_t>(t, "stride_b", 0), g.stride_n = get<int64_t>(t, "stride_n", 0), g.stride_m = get<int64_t>(t, "stride_m", 0);
      sources.push_back(DeviceBuffer::of(t["data"], offset));
      outputs.push_back(DeviceBuffer::of(py::array_t<uint8_t>(B * rows * g.segments * g.segment_bytes), offset));
      std::fill_n(outputs.back().as<uint8_t>(), outputs.back().bytes(), uint8_t{0xFF});
      g.src = sources.back().as(), g.dst = outputs.back().as();
      p.tensors[p.num_tensors++] = g;
    }
    plan = gather_plan_cuda(p, device_of(d));
    plan.blocks_per_row = get<int>(d, "blocks_per_row", plan.blocks_per_row);
    plan.vector_bytes = get<int>(d, "vector_bytes", plan.vector_bytes);
    plan.threads = get<int>(d, "threads", plan.threads);
  }
  void take_index(const py::dict& d) {
    index = DeviceBuffer::of(d["index"]);
    p.index = index.as<int64_t>();
    p.index_stride = get<int64_t>(d, "index_stride", p.K);
  }
  py::list result() const {
    py::list out;
    for (const DeviceBuffer& buffer : outputs) out.append(buffer.numpy("uint8", {buffer.bytes()}));
    return out;
  }
};

py::array run_topk_cuda(const py::dict& d) {
  const Topk topk(d);
  check(topk_cuda(topk.p, topk.plan, nullptr));
  return topk.result();
}

py::list run_gather(const py::dict& d, bool scatter) {
  const int64_t N = d["N"].cast<int64_t>(), K = d["K"].cast<int64_t>();
  Gather gather(d, d["B"].cast<int64_t>(), N, K, scatter ? N : K);
  gather.take_index(d);
  check(scatter ? scatter_rows_cuda(gather.p, gather.plan, nullptr) : gather_cuda(gather.p, gather.plan, nullptr));
  return gather.result();
}

py::tuple run_topk_gather_cuda(const py::dict& d) {
  const Topk topk(d);
  const int64_t K = topk_output_length(topk.p);
  Gather gather(d["gather"].cast<py::dict>(), topk.p.B, d["gather"]["N"].cast<int64_t>(), K, K);
  gather.p.index = topk.p.index;
  gather.p.index_stride = K;
  if (!d["gather"].contains("blocks_per_row")) gather.plan = topk_gather_plan_cuda(gather.p, topk.plan, device_of(d));
  check(topk_gather_cuda(topk.p, topk.plan, gather.p, gather.plan, nullptr));
  return py::make_tuple(topk.result(), gather.result());
}

}  // namespace

void bind_select(py::module_& m) {
  m.def("topk_cuda", &run_topk_cuda);
  m.def("topk_plan_cuda", [](const py::dict& d) { return dict_of(Topk(d).plan); });
  m.def("gather_cuda", [](const py::dict& d) { return run_gather(d, false); });
  m.def("scatter_rows_cuda", [](const py::dict& d) { return run_gather(d, true); });
  m.def("gather_plan_cuda", [](const py::dict& d) {
    const int64_t N = d["N"].cast<int64_t>(), K = d["K"].cast<int64_t>();
    GatherParams p = Gather(d, 0, N, K, K).p;  // plans look at no data
    p.B = d["B"].cast<int64_t>();
    return dict_of(gather_plan_cuda(p, device_of(d)));
  });
  m.def("topk_gather_cuda", &run_topk_gather_cuda);
  m.def("topk_gather_plan_cuda", [](const py::dict& d) {  // of a dict like topk_gather_cuda's
    const Topk topk(d);
    const int64_t K = topk_output_length(topk.p);
    const Gather gather(d["gather"].cast<py::dict>(), 0, d["gather"]["N"].cast<int64_t>(), K, K);
    GatherParams p = gather.p;
    p.B = topk.p.B;
    return dict_of(topk_gather_plan_cuda(p, topk.plan, device_of(d)));
  });
}

}  // namespace testing
}  // namespace tokensieve

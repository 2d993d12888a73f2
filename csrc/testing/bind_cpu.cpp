// score_cpu, topk_cpu, gather_cpu and scatter_rows_cpu at a chosen instruction level, on exact-size buffers filled with 0xFF. The dicts are
// those of bind_score.cpp and bind_select.cpp, plus level (0 baseline, 1 AVX2, 2 AVX-512) and split (run every grain by itself, last
// first).
#include "score/score_cpu_layout.h"
#include "select/gather.h"
#include "select/topk.h"
#include "similarity/cosine.h"
#include "similarity/density_cpu_layout.h"
#include "similarity/diverse_cpu_layout.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

std::vector<int> cpu_levels() {
  std::vector<int> levels = {0};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) levels.push_back(1);
  if (levels.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    levels.push_back(2);
  }
#endif
  return levels;
}

CpuLevel level_of(const py::dict& d) { return static_cast<CpuLevel>(get<int>(d, "level", 0)); }

// Tasks must not depend on each other's order or on how many share a call.
void last_first(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  for (int64_t at = begin + (end - begin - 1) / grain * grain; at >= begin; at -= grain) {
    body(context, at, at + grain < end ? at + grain : end);
  }
}

ParallelForFn threads_of(const py::dict& d) { return get<bool>(d, "split", false) ? last_first : nullptr; }

template <size_t kCount>
void strides_of(const py::dict& d, const char* name, int64_t (&out)[kCount]) {
  const auto values = get<std::vector<int64_t>>(d, name, {});
  for (size_t i = 0; i < values.size() && i < kCount; ++i) out[i] = values[i];
}

py::dict run_score(const py::dict& d) {
  ScoreParams p;
  const auto sizes = d["sizes"].cast<std::vector<int64_t>>();
  p.B = sizes.at(0), p.H = sizes.at(1), p.Hkv = sizes.at(2), p.L = sizes.at(3), p.N = sizes.at(4), p.D = sizes.at(5);
  strides_of(d, "query_strides", p.query_stride);
  strides_of(d, "key_strides", p.key_stride);
  strides_of(d, "bias_strides", p.bias_stride);
  p.range_begin = get<int64_t>(d, "range_begin", 0);
  p.range_end = get<int64_t>(d, "range_end", p.N);
  p.scale = get<float>(d, "scale", 1.0f);
  p.causal = get<bool>(d, "causal", false);
  p.normalize = static_cast<Normalize>(get<int>(d, "normalize", 0));
  p.query_reduction = static_cast<Reduction>(get<int>(d, "query_reduction", 1));
  p.head_reduction = static_cast<Reduction>(get<int>(d, "head_reduction", 1));
  p.activation = static_cast<Activation>(get<int>(d, "activation", 0));
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  p.bias_dtype = dtype_of(get<std::string>(d, "bias_dtype", "float32"));
  const int64_t offset = get<int64_t>(d, "offset_bytes", 0);
  const DeviceBuffer query = DeviceBuffer::of(d["query"], offset), key = DeviceBuffer::of(d["key"], offset);
  const DeviceBuffer bias = DeviceBuffer::of(array_of(d, "bias")), lse = DeviceBuffer::of(array_of(d, "lse"));
  const DeviceBuffer weights = DeviceBuffer::of(array_of(d, "row_weights")), positions = DeviceBuffer::of(array_of(d, "query_positions"));
  p.query = query.as(), p.key = key.as(), p.bias = bias.as(), p.lse_in = lse.as<float>();
  p.row_weights = weights.as<float>(), p.query_positions = positions.as<int64_t>();
  const DeviceBuffer head_weights = DeviceBuffer::of(array_of(d, "head_weights")), accumulate = DeviceBuffer::of(array_of(d, "accumulate"));
  p.head_weights = head_weights.as<float>(), p.accumulate = accumulate.as<float>();
  ScorePlan plan = score_plan_cpu(p);
  const auto algo = get<std::string>(d, "algo", "");
  if (algo == "cpu_chunks") plan.algo = ScoreAlgo::kCpuChunks;
  if (algo == "cpu_strip") plan.algo = ScoreAlgo::kCpuStrip;
  plan.workspace_bytes = 4 * score_cpu_floats(p, plan.algo);
  const int64_t heads = p.head_reduction == Reduction::kNone ? p.H : 1, rows = p.query_reduction == Reduction::kNone ? p.L : 1;
  const int64_t R = p.range_end - p.range_begin;
  const DeviceBuffer scores(p.B * heads * rows * R * 4), lse_out(p.B * p.H * p.L * 4), workspace(plan.workspace_bytes);
  p.scores = scores.as<float>(), p.lse_out = lse_out.as<float>(), p.workspace = workspace.as();
  check(score_cpu(p, plan, level_of(d), threads_of(d)));
  py::dict result;
  result["scores"] = scores.numpy("float32", {p.B, heads, rows, R});
  result["lse"] = lse_out.numpy("float32", {p.B, p.H, p.L});
  result["semaphores"] = py::array_t<int32_t>(0);
  result["algo"] = plan.algo == ScoreAlgo::kCpuStrip ? "cpu_strip" : "cpu_chunks";
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

py::array run_topk(const py::dict& d) {
  TopkParams p;
  p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.K = d["K"].cast<int64_t>();
  p.score_stride = get<int64_t>(d, "score_stride", p.N);
  p.candidates_stride = p.always_keep_stride = p.N;
  p.offset = get<int64_t>(d, "offset", 0), p.prefix = get<int64_t>(d, "prefix", 0), p.suffix = get<int64_t>(d, "suffix", 0);
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  p.order = get<std::string>(d, "order", "position") == "score" ? TopkOrder::kScore : TopkOrder::kPosition;
  const DeviceBuffer scores = DeviceBuffer::of(d["scores"], get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer candidates = DeviceBuffer::of(array_of(d, "candidates")), always = DeviceBuffer::of(array_of(d, "always_keep"));
  const DeviceBuffer k_rows = DeviceBuffer::of(array_of(d, "k_rows"));
  p.scores = scores.as(), p.candidates = candidates.as<uint8_t>(), p.always_keep = always.as<uint8_t>(), p.k_rows = k_rows.as<int64_t>();
  const TopkPlan plan = topk_plan_cpu(p);
  const DeviceBuffer index(p.B * topk_output_length(p) * 8), workspace(plan.workspace_bytes);
  p.index = index.as<int64_t>(), p.workspace = workspace.as();
  check(topk_cpu(p, plan, level_of(d), threads_of(d)));
  return index.numpy("int64", {p.B, topk_output_length(p)});
}

py::list run_gather(const py::dict& d, bool scatter) {
  GatherParams p;
  p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.K = d["K"].cast<int64_t>();
  const DeviceBuffer index = DeviceBuffer::of(d["index"]);
  p.index = index.as<int64_t>();
  p.index_stride = get<int64_t>(d, "index_stride", p.K);
  std::vector<DeviceBuffer> sources, outputs;
  for (const py::handle& item : d["tensors"].cast<py::list>()) {
    const auto t = item.cast<py::dict>();
    GatherTensor& g = p.tensors[p.num_tensors++];
    g.segments = get<int64_t>(t, "segments", 1);
    g.segment_bytes = t["segment_bytes"].cast<int64_t>();
    g.stride_b = get<int64_t>(t, "stride_b", 0), g.stride_n = get<int64_t>(t, "stride_n", 0), g.stride_m = get<int64_t>(t, "stride_m", 0);
    sources.push_back(DeviceBuffer::of(t["data"], get<int64_t>(t, "offset_bytes", 0)));
    outputs.emplace_back(p.B * (scatter ? p.N : p.K) * g.segments * g.segment_bytes);
    g.src = sources.back().as(), g.dst = outputs.back().as();
  }
  check(scatter ? scatter_rows_cpu(p, level_of(d), threads_of(d)) : gather_cpu(p, level_of(d), threads_of(d)));
  py::list result;
  for (const DeviceBuffer& buffer : outputs) result.append(buffer.numpy("uint8", {buffer.bytes()}));
  return result;
}

py::dict run_cosine(const py::dict& d) {
  CosineParams p;
  const auto sizes = d["sizes"].cast<std::vector<int64_t>>();
  p.B = sizes.at(0), p.M = sizes.at(1), p.N = sizes.at(2), p.C = sizes.at(3);
  p.a_stride[1] = p.b_stride[1] = p.C, p.a_stride[0] = p.M * p.C, p.b_stride[0] = p.N * p.C;
  p.candidates_stride = p.N;
  p.T = get<int64_t>(d, "T", 1);
  p.exclude_self = get<bool>(d, "exclude_self", false), p.largest = get<bool>(d, "largest", true);
  p.reduction = static_cast<CosineReduction>(get<int>(d, "reduction", 0));
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  const int64_t offset = get<int64_t>(d, "offset_bytes", 0);
  const DeviceBuffer a = DeviceBuffer::of(d["a"], offset), b = DeviceBuffer::of(d["b"], offset);
  const DeviceBuffer candidates = DeviceBuffer::of(array_of(d, "candidates"));
  p.a = a.as(), p.b = b.as(), p.candidates = candidates.as<uint8_t>();
  const CosinePlan plan = cosine_plan_cpu(p);
  const int64_t width = p.reduction == CosineReduction::kMatch ? p.T : p.reduction == CosineReduction::kNone ? p.N : 1;
  const DeviceBuffer value(p.B * p.M * width * 4), workspace(plan.workspace_bytes);
  const DeviceBuffer index(p.reduction == CosineReduction::kMatch ? p.B * p.M * p.T * 8 : 0);
  p.value = value.as<float>(), p.index = index.as<int64_t>(), p.workspace = workspace.as();
  check(cosine_cpu(p, plan, level_of(d), threads_of(d)));
  py::dict result;
  result["value"] = value.numpy("float32", {p.B, p.M, width});
  if (p.reduction == CosineReduction::kMatch) result["index"] = index.numpy("int64", {p.B, p.M, p.T});
  result["splits"] = plan.splits, result["flops"] = plan.flops, result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

py::dict run_diverse(const py::dict& d) {
  DiverseParams p;
  const auto sizes = d["sizes"].cast<std::vector<int64_t>>();
  p.B = sizes.at(0), p.N = sizes.at(1), p.C = sizes.at(2), p.K = sizes.at(3);
  p.x_stride[0] = p.N * p.C, p.x_stride[1] = p.C;
  p.candidates_stride = p.N;
  p.metric = static_cast<DiverseMetric>(get<int>(d, "metric", 0)), p.order = static_cast<DiverseOrder>(get<int>(d, "order", 1));
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  const DeviceBuffer x = DeviceBuffer::of(d["x"], get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer candidates = DeviceBuffer::of(array_of(d, "candidates")), first = DeviceBuffer::of(array_of(d, "first"));
  p.x = x.as(), p.candidates = candidates.as<uint8_t>(), p.first = first.as<int64_t>();
  DiversePlan plan = diverse_plan_cpu(p);
  if (d.contains("store") && !d["store"].is_none()) {
    plan.store_distances = d["store"].cast<bool>();
    plan.workspace_bytes = 4 * diverse_layout(p, plan.store_distances).floats;
  }
  const DeviceBuffer index(p.B * p.K * 8), workspace(plan.workspace_bytes);
  p.index = index.as<int64_t>(), p.workspace = workspace.as();
  check(diverse_cpu(p, plan, level_of(d), threads_of(d)));
  py::dict result;
  result["index"] = index.numpy("int64", {p.B, p.K});
  result["store"] = plan.store_distances, result["flops"] = plan.flops, result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

// The dicts of bind_density.cpp; strip_rows: without the matrix, whatever the number.
template <typename Params>
Params tokens_of(const py::dict& d) {
  Params p;
  p.B = d["B"].cast<int64_t>(), p.N = d["N"].cast<int64_t>(), p.C = d["C"].cast<int64_t>();
  p.x_stride[0] = p.N * p.C, p.x_stride[1] = p.C;
  p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
  return p;
}

py::tuple run_density(const py::dict& d) {
  DensityParams p = tokens_of<DensityParams>(d);
  p.k = d["k"].cast<int64_t>();
  p.mask_stride = p.N;
  const DeviceBuffer x = DeviceBuffer::of(d["x"], get<int64_t>(d, "offset_bytes", 0));
  const DeviceBuffer mask = DeviceBuffer::of(array_of(d, "mask")), noise = DeviceBuffer::of(array_of(d, "noise"));
  p.x = x.as(), p.mask = mask.as<uint8_t>(), p.noise = noise.as<float>();
  DensityPlan plan = density_plan_cpu(p);
  if (d.contains("strip_rows")) {
    plan.store_distances = false;
    plan.workspace_bytes = density_layout(p, false).floats * 4;
  }
  const DeviceBuffer workspace(plan.workspace_bytes), density(p.B * p.N * 4), distance(p.B * p.N * 4);
  p.workspace = workspace.as(), p.density = density.as<float>(), p.distance = distance.as<float>();
  check(density_cpu(p, plan, level_of(d), threads_of(d)));
  return py::make_tuple(density.numpy("float32", {p.B, p.N}), distance.numpy("float32", {p.B, p.N}));
}

py::array run_nearest(const py::dict& d) {
  NearestParams p = tokens_of<NearestParams>(d);
  p.K = d["K"].cast<int64_t>();
  const DeviceBuffer x = DeviceBuffer::of(d["x"], get<int64_t>(d, "offset_bytes", 0)), centers = DeviceBuffer::of(d["centers"]);
  p.x = x.as(), p.centers = centers.as<int64_t>();
  const NearestPlan plan = nearest_plan_cpu(p);
  const DeviceBuffer workspace(plan.workspace_bytes), labels(p.B * p.N * 8);
  p.workspace = workspace.as(), p.labels = labels.as<int64_t>();
  check(nearest_cpu(p, plan, level_of(d), threads_of(d)));
  return labels.numpy("int64", {p.B, p.N});
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("cpu_levels", &cpu_levels);
  m.def("score_cpu", &run_score);
  m.def("topk_cpu", &run_topk);
  m.def("gather_cpu", [](const py::dict& d) { return run_gather(d, false); });
  m.def("cosine_cpu", &run_cosine);
  m.def("density_cpu", &run_density);
  m.def("diverse_cpu", &run_diverse);
  m.def("nearest_cpu", &run_nearest);
  m.def("scatter_rows_cpu", [](const py::dict& d) { return run_gather(d, true); });
}

}  // namespace testing
}  // namespace tokensieve

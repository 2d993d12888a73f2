// score_cuda under the emulator, and its plan. Tensors arrive as storage + strides, so views need no copies; `p` is a dict of the fields of
// ScoreParams (tests/kernels/score_cases.py builds it).
#include "score/colsum_args.h"
#include "score/score_args.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {
namespace {

template <size_t kCount>
void strides_of(const py::dict& p, const char* name, int64_t (&out)[kCount]) {
  const auto values = get<std::vector<int64_t>>(p, name, {});
  for (size_t i = 0; i < values.size() && i < kCount; ++i) out[i] = values[i];
}

// Everything but pointers.
ScoreParams shape_of(const py::dict& p) {
  ScoreParams s;
  const auto sizes = p["sizes"].cast<std::vector<int64_t>>();
  s.B = sizes.at(0), s.H = sizes.at(1), s.Hkv = sizes.at(2), s.L = sizes.at(3), s.N = sizes.at(4), s.D = sizes.at(5);
  strides_of(p, "query_strides", s.query_stride);
  strides_of(p, "key_strides", s.key_stride);
  strides_of(p, "bias_strides", s.bias_stride);
  s.range_begin = get<int64_t>(p, "range_begin", 0);
  s.range_end = get<int64_t>(p, "range_end", s.N);
  s.scale = get<float>(p, "scale", 1.0f);
  s.causal = get<bool>(p, "causal", false);
  s.normalize = static_cast<Normalize>(get<int>(p, "normalize", 0));
  s.query_reduction = static_cast<Reduction>(get<int>(p, "query_reduction", 1));
  s.head_reduction = static_cast<Reduction>(get<int>(p, "head_reduction", 1));
  s.activation = static_cast<Activation>(get<int>(p, "activation", 0));
  s.dtype = dtype_of(get<std::string>(p, "dtype", "float32"));
  s.bias_dtype = dtype_of(get<std::string>(p, "bias_dtype", "float32"));
  static const float given = 0;
  if (!array_of(p, "lse").is_none()) s.lse_in = &given;  // plans look at presence only
  return s;
}

DeviceInfo device_of(const py::dict& p) {
  DeviceInfo device;
  device.compute_capability = get<int>(p, "compute_capability", device.compute_capability);
  device.num_sms = get<int>(p, "num_sms", device.num_sms);
  device.smem_per_block = get<int64_t>(p, "smem_per_block", device.smem_per_block);
  device.wgmma = get<bool>(p, "device_wgmma", device.wgmma);
  return device;
}

ScorePlan two_pass_plan_of(const py::dict& p, const ScoreParams& s) {
  ScorePlan plan;
  plan.algo = ScoreAlgo::kTwoPass;
  const int64_t rows = colsum::stationary_rows(colsum::steps_of(s.dtype, s.D));
  plan.num_chunks = (s.range_end - s.range_begin + rows - 1) / rows;
  plan.row_splits = get<int64_t>(p, "row_splits", 1);
  plan.col_splits = get<int64_t>(p, "col_splits", 1);
  plan.wgmma = get<bool>(p, "wgmma", false);
  colsum::plan_two_pass_sizes(s, plan);
  return plan;
}

ScorePlan strip_plan_of(const py::dict& p, const ScoreParams& s) {
  ScorePlan plan;
  plan.algo = ScoreAlgo::kStrip;
  const int64_t scan = s.normalize == Normalize::kRange ? s.range_end - s.range_begin : s.N;
  plan.threads = static_cast<int>(32 * ((scan + colsum::kStripKeys - 1) / colsum::kStripKeys));
  plan.rows_per_pass = get<int64_t>(p, "rows_per_pass", s.L);
  plan.col_splits = get<int64_t>(p, "col_splits", (s.L + plan.rows_per_pass - 1) / plan.rows_per_pass);
  colsum::plan_strip_sizes(s, plan);
  return plan;
}

// The plan, with what the test forces: algo, chunk_keys, rows_per_pass, threads.
ScorePlan plan_of(const py::dict& p, const ScoreParams& s) {
  ScorePlan plan = score_plan_cuda(s, device_of(p));
  const auto algo = get<std::string>(p, "algo", "");
  if (algo == "cluster") plan.algo = ScoreAlgo::kCluster;
  if (algo == "split") plan.algo = ScoreAlgo::kSplit;
  if (algo == "strip") return strip_plan_of(p, s);
  if (algo == "two_pass") return two_pass_plan_of(p, s);
  plan.rows_per_pass = get<int64_t>(p, "rows_per_pass", plan.rows_per_pass);
  plan.chunk_keys = get<int64_t>(p, "chunk_keys", plan.chunk_keys);
  const bool range_only = s.normalize == Normalize::kRange || s.lse_in != nullptr;
  const int64_t scan = range_only ? s.range_end - s.range_begin : s.N;
  if (p.contains("chunk_keys")) plan.num_chunks = scan <= 0 ? 1 : (scan + plan.chunk_keys - 1) / plan.chunk_keys;
  if (!algo.empty() || p.contains("chunk_keys") || p.contains("rows_per_pass")) score::score_plan_sizes(s, plan);
  plan.threads = get<int>(p, "threads", plan.threads);
  return plan;
}

py::dict dict_of(const ScorePlan& plan) {
  py::dict d;
  const char* const names[] = {"cpu_chunks", "cluster", "split", "two_pass", "strip", "cpu_strip"};
  d["algo"] = names[static_cast<int>(plan.algo)];
  d["row_splits"] = plan.row_splits;
  d["col_splits"] = plan.col_splits;
  d["wgmma"] = plan.wgmma;
  d["chunk_keys"] = plan.chunk_keys;
  d["num_chunks"] = plan.num_chunks;
  d["rows_per_pass"] = plan.rows_per_pass;
  d["workspace_bytes"] = plan.workspace_bytes;
  d["num_semaphores"] = plan.num_semaphores;
  d["threads"] = plan.threads;
  d["smem_bytes"] = plan.smem_bytes;
  d["bytes_moved"] = plan.bytes_moved;
  d["flops"] = plan.flops;
  return d;
}

// Returns scores, lse, the semaphores as the launch left them, and the plan.
py::dict run_score_cuda(const py::dict& p) {
  ScoreParams s = shape_of(p);
  const int64_t offset = get<int64_t>(p, "offset_bytes", 0);
  const DeviceBuffer query = DeviceBuffer::of(p["query"], offset), key = DeviceBuffer::of(p["key"], offset);
  const DeviceBuffer bias = DeviceBuffer::of(array_of(p, "bias")), lse = DeviceBuffer::of(array_of(p, "lse"));
  const DeviceBuffer weights = DeviceBuffer::of(array_of(p, "row_weights")), positions = DeviceBuffer::of(array_of(p, "query_positions"));
  s.query = query.as(), s.key = key.as(), s.bias = bias.as(), s.lse_in = lse.as<float>();
  s.row_weights = weights.as<float>(), s.query_positions = positions.as<int64_t>();
  const DeviceBuffer head_weights = DeviceBuffer::of(array_of(p, "head_weights")), accumulate = DeviceBuffer::of(array_of(p, "accumulate"));
  s.head_weights = head_weights.as<float>(), s.accumulate = accumulate.as<float>();
  const ScorePlan plan = plan_of(p, s);
  const int64_t heads = s.head_reduction == Reduction::kNone ? s.H : 1, rows = s.query_reduction == Reduction::kNone ? s.L : 1;
  const int64_t R = s.range_end - s.range_begin;
  const DeviceBuffer scores(s.B * heads * rows * R * 4), lse_out(s.B * s.H * s.L * 4), workspace(plan.workspace_bytes);
  const DeviceBuffer semaphores(plan.num_semaphores * 4);
  for (int64_t i = 0; i < plan.num_semaphores; ++i) semaphores.as<int32_t>()[i] = 0;
  s.scores = scores.as<float>(), s.lse_out = lse_out.as<float>(), s.workspace = workspace.as(), s.semaphores = semaphores.as<int32_t>();
  check(score_cuda(s, plan, nullptr));
  py::dict result;
  result["scores"] = scores.numpy("float32", {s.B, heads, rows, R});
  result["lse"] = lse_out.numpy("float32", {s.B, s.H, s.L});
  result["semaphores"] = semaphores.numpy("int32", {plan.num_semaphores});
  result["plan"] = dict_of(plan);
  return result;
}

py::dict score_plan(const py::dict& p) {
  const ScoreParams s = shape_of(p);
  return dict_of(plan_of(p, s));
}

}  // namespace

void bind_score(py::module_& m) {
  m.def("score_cuda", &run_score_cuda);
  m.def("score_plan_cuda", &score_plan);
}

}  // namespace testing
}  // namespace tokensieve

// The gradient of attention_scores on numpy arrays: under the emulator (`level` absent), and on the CPU at a chosen level.
#include "score/score_grad.h"
#include "testing/bind.h"
#include "testing/bind_fields.h"

namespace tokensieve {
namespace testing {

void bind_score_grad(py::module_& m) {
  m.def("score_grad", [](const py::dict& d) {
    ScoreGradParams g;
    ScoreParams& p = g.forward;
    const auto sizes = d["sizes"].cast<std::vector<int64_t>>();
    p.B = sizes.at(0), p.H = sizes.at(1), p.Hkv = sizes.at(2), p.L = sizes.at(3), p.N = sizes.at(4), p.D = sizes.at(5);
    p.query_stride[0] = p.H * p.L * p.D, p.query_stride[1] = p.L * p.D, p.query_stride[2] = p.D;
    p.key_stride[0] = p.Hkv * p.N * p.D, p.key_stride[1] = p.N * p.D, p.key_stride[2] = p.D;
    const auto bias_strides = get<std::vector<int64_t>>(d, "bias_strides", {0, 0, 0, 0});
    for (size_t i = 0; i < 4; ++i) p.bias_stride[i] = bias_strides[i];
    p.range_begin = get<int64_t>(d, "range_begin", 0), p.range_end = get<int64_t>(d, "range_end", p.N);
    p.scale = get<float>(d, "scale", 1.0f);
    p.causal = get<bool>(d, "causal", false);
    p.normalize = static_cast<Normalize>(get<int>(d, "normalize", 0));
    p.activation = static_cast<Activation>(get<int>(d, "activation", 0));
    p.query_reduction = static_cast<Reduction>(get<int>(d, "query_reduction", 1));
    p.head_reduction = static_cast<Reduction>(get<int>(d, "head_reduction", 1));
    p.dtype = dtype_of(get<std::string>(d, "dtype", "float32"));
    p.bias_dtype = dtype_of(get<std::string>(d, "bias_dtype", "float32"));
    g.lse_given = get<bool>(d, "lse_given", false);
    const DeviceBuffer query = DeviceBuffer::of(d["query"]), key = DeviceBuffer::of(d["key"]), bias = DeviceBuffer::of(array_of(d, "bias"));
    const DeviceBuffer lse = DeviceBuffer::of(d["lse"]), rows = DeviceBuffer::of(array_of(d, "row_weights"));
    const DeviceBuffer heads = DeviceBuffer::of(array_of(d, "head_weights")), positions = DeviceBuffer::of(array_of(d, "query_positions"));
    const DeviceBuffer grad = DeviceBuffer::of(d["grad"]), grad_lse = DeviceBuffer::of(array_of(d, "grad_lse"));
    p.query = query.as(), p.key = key.as(), p.bias = bias.as(), p.lse_in = lse.as<float>(), p.row_weights = rows.as<float>();
    p.head_weights = heads.as<float>(), p.query_positions = positions.as<int64_t>();
    g.grad = grad.as<float>(), g.grad_lse = grad_lse.as<float>();
    const int64_t element = dtype_bytes(p.dtype);
    const DeviceBuffer query_grad(p.B * p.H * p.L * p.D * element), key_grad(p.B * p.Hkv * p.N * p.D * element);
    g.query_grad = query_grad.as(), g.key_grad = key_grad.as();
    const bool cpu = d.contains("level");
    const ScoreGradPlan plan = cpu ? score_grad_plan_cpu(g) : score_grad_plan_cuda(g, DeviceInfo());
    const DeviceBuffer workspace(plan.workspace_bytes);
    g.workspace = workspace.as();
    check(cpu ? score_grad_cpu(g, plan, static_cast<CpuLevel>(d["level"].cast<int>()), nullptr) : score_grad_cuda(g, plan, nullptr));
    const char* kind = element == 4 ? "float32" : "uint16";
    return py::make_tuple(query_grad.numpy(kind, {p.B, p.H, p.L, p.D}), key_grad.numpy(kind, {p.B, p.Hkv, p.N, p.D}), plan.num_chunks,
                          plan.workspace_bytes);
  });
}

}  // namespace testing
}  // namespace tokensieve

// Pooling, and its gradients, once for both back ends.
#pragma once

#include <tuple>
#include <vector>

#include "bind/gather_ops.h"
#include "merge/pool_args.h"

namespace tokensieve::bind {

// Sizes of pool_grid in the order of its schema: tokens, outputs, span and step of each axis.
struct PoolSizes {
  int64_t tokens[3], outputs[3], span[3], step[3];
};

inline PoolParams pool_params(const char* op, const PoolSizes& s, const OptionalTensor& scores, double temperature, bool adaptive,
                              int64_t kind, const Tensor& like) {
  PoolParams p;
  if (kind < 0 || kind > 4) fail(op, "kind must be in [0, 4], got ", kind);
  p.kind = static_cast<PoolKind>(kind), p.adaptive = adaptive, p.temperature = static_cast<float>(temperature);
  if (p.kind == PoolKind::kSoftmax && !(p.temperature > 0.0f)) fail(op, "temperature must be above 0, got ", temperature);
  if (scores.has_value() != (p.kind == PoolKind::kSoftmax)) fail(op, "scores must be given for softmax weights, and only then");
  for (int i = 0; i < 3; ++i) {
    PoolAxis& a = p.axes[i];
    a.in = s.tokens[i], a.out = s.outputs[i], a.span = s.span[i], a.step = s.step[i];
    if (a.in < 1 || a.out < 1) fail(op, "grid and size must be at least 1, got ", a.in, " tokens and ", a.out, " outputs of an axis");
    if (a.in >= (int64_t{1} << 24) || a.out >= (int64_t{1} << 24)) fail(op, "grid and size must be below 2^24");
    if (p.kind == PoolKind::kBilinear) {
      if (!adaptive || a.span != a.in) fail(op, "size must be given for kind 'bilinear', and within must not");
      continue;
    }
    const bool inside = a.span >= 1 && a.step >= 1 && a.span <= a.in &&
                        (adaptive ? a.in % a.span == 0 && a.out == a.in / a.span * a.step : a.out <= (a.in - a.span) / a.step + 1);
    if (!inside) fail(op, "window must lie inside grid");
    if (p.kind == PoolKind::kStack && (adaptive || a.step < a.span)) fail(op, "windows of stacked tokens must not overlap");
  }
  p.dtype = kernel_dtype(op, "x", like);
  p.B = like.size(0);
  return p;
}

inline void pool_input(const char* op, PoolParams& p, const Tensor& x) {
  check_rank(op, "x", x, 3, "(B, N, C)");
  check_last_contiguous(op, "x", x);
  if (x.size(1) != pool::tokens(p)) fail(op, "grid must have the N=", x.size(1), " tokens of x, got ", pool::tokens(p));
  p.x = x.const_data_ptr(), p.stride_b = x.stride(0), p.stride_n = x.stride(1);
  p.C = x.size(2);
}

template <typename Backend>
Tensor pool_grid(const Tensor& x, int64_t n0, int64_t n1, int64_t n2, int64_t o0, int64_t o1, int64_t o2, int64_t w0, int64_t w1,
                 int64_t w2, int64_t s0, int64_t s1, int64_t s2, const OptionalTensor& scores, double temperature, bool adaptive,
                 int64_t kind) {
  const char* op = "pool_grid";
  check_rank(op, "x", x, 3, "(B, N, C)");
  typename Backend::Guard guard(x);
  PoolParams p = pool_params(op, {{n0, n1, n2}, {o0, o1, o2}, {w0, w1, w2}, {s0, s1, s2}}, scores, temperature, adaptive, kind, x);
  pool_input(op, p, x);
  p.scores = static_cast<const float*>(checked_dense(op, "scores", scores, x, ScalarType::Float, {p.B, pool::tokens(p)}));
  Tensor out = allocate_like(x, {p.B, pool::outputs(p), p.C * pool::stacked(p)}, raw_dtype(x));
  Backend::allocated(out);
  p.out = out.mutable_data_ptr();
  raise(op, Backend::pool(p, x));
  return out;
}

// x and out: of max and softmax only. Unwanted gradients are empty.
template <typename Backend>
std::tuple<Tensor, Tensor> pool_grid_backward(const Tensor& grad, const OptionalTensor& x, const OptionalTensor& out, int64_t n0,
                                              int64_t n1, int64_t n2, int64_t o0, int64_t o1, int64_t o2, int64_t w0, int64_t w1,
                                              int64_t w2, int64_t s0, int64_t s1, int64_t s2, const OptionalTensor& scores,
                                              double temperature, bool adaptive, int64_t kind, bool x_wanted, bool scores_wanted) {
  const char* op = "pool_grid_backward";
  check_rank(op, "grad", grad, 3, "(B, M, C)");
  typename Backend::Guard guard(grad);
  PoolParams p = pool_params(op, {{n0, n1, n2}, {o0, o1, o2}, {w0, w1, w2}, {s0, s1, s2}}, scores, temperature, adaptive, kind, grad);
  const int64_t stacked = pool::stacked(p), N = pool::tokens(p), R = pool::outputs(p);
  p.C = grad.size(2) / stacked;
  if (!grad.is_contiguous() || grad.size(1) != R || p.C * stacked != grad.size(2)) fail(op, "grad must be contiguous and like the output");
  if (p.kind == PoolKind::kMax || p.kind == PoolKind::kSoftmax) {
    if (!x || !out || x->size(0) != p.B || x->scalar_type() != grad.scalar_type()) fail(op, "x and out must be given for this kind");
    check_same_device(op, "x", *x, grad);
    pool_input(op, p, *x);
    if (p.C != grad.size(2)) fail(op, "grad must be like the output, got shape ", shape_of(grad));
    p.out = const_cast<void*>(checked_dense(op, "out", out, grad, grad.scalar_type(), {p.B, R, p.C}));
  }
  p.scores = static_cast<const float*>(checked_dense(op, "scores", scores, grad, ScalarType::Float, {p.B, N}));
  p.grad = grad.const_data_ptr();
  Tensor x_grad = allocate_like(grad, {p.B, x_wanted ? N : 0, p.C}, raw_dtype(grad));
  Tensor scores_grad = allocate_like(grad, {p.B, scores_wanted ? N : 0}, aoti_torch_dtype_float32());
  Backend::allocated(x_grad);
  if (x_wanted) p.x_grad = x_grad.mutable_data_ptr();
  if (scores_wanted) p.scores_grad = static_cast<float*>(scores_grad.mutable_data_ptr());
  if (scores_wanted && p.kind != PoolKind::kSoftmax) fail(op, "scores must be given for softmax weights, and only then");
  if (x_wanted || scores_wanted) raise(op, Backend::pool_grad(p, grad));
  return {x_grad, scores_grad};
}

inline RunsParams runs_params(const char* op, const Tensor& x, const Tensor& starts, int64_t S, int64_t length, int64_t stride) {
  RunsParams p;
  check_rank(op, "x", x, 3, "(B, S, C)");
  check_rank(op, "starts", starts, 2, "(B, I)");
  check_last_contiguous(op, "starts", starts);
  check_same_device(op, "starts", starts, x);
  if (starts.scalar_type() != ScalarType::Long) fail(op, "starts must be int64");
  p.B = x.size(0), p.S = S, p.C = x.size(2), p.images = starts.size(1), p.length = length, p.stride = stride;
  if (starts.size(0) != p.B) fail(op, "starts must be (B=", p.B, ", I), got shape ", shape_of(starts));
  if (length < 1) fail(op, "length must be at least 1, got ", length);
  if (stride < 1) fail(op, "stride must be at least 1, got ", stride);
  if (length > p.S && p.images > 0) fail(op, "starts must leave room for ", p.images, " runs of ", length, " among ", p.S, " tokens");
  if (p.images > 0 && p.images > p.S / length)
    fail(op, "starts must leave room for ", p.images, " runs of ", length, " among ", p.S, " tokens");
  p.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  p.starts_stride = starts.stride(0);
  p.dtype = kernel_dtype(op, "x", x);
  return p;
}

template <typename Backend>
Tensor pool_runs(const Tensor& x, const Tensor& starts, int64_t length, int64_t stride) {
  const char* op = "pool_runs";
  check_rank(op, "x", x, 3, "(B, S, C)");
  typename Backend::Guard guard(x);
  RunsParams p = runs_params(op, x, starts, x.size(1), length, stride);
  check_last_contiguous(op, "x", x);
  p.x = x.const_data_ptr(), p.stride_b = x.stride(0), p.stride_n = x.stride(1);
  Tensor out = allocate_like(x, {p.B, pool::rows(p), p.C}, raw_dtype(x));
  Backend::allocated(out);
  p.out = out.mutable_data_ptr();
  raise(op, Backend::runs(p, x));
  return out;
}

template <typename Backend>
Tensor pool_runs_backward(const Tensor& grad, const Tensor& starts, int64_t S, int64_t length, int64_t stride) {
  const char* op = "pool_runs_backward";
  check_rank(op, "grad", grad, 3, "(B, M, C)");
  typename Backend::Guard guard(grad);
  RunsParams p = runs_params(op, grad, starts, S, length, stride);
  if (!grad.is_contiguous() || grad.size(1) != pool::rows(p)) fail(op, "grad must be contiguous and like the output");
  p.grad = grad.const_data_ptr();
  Tensor out = allocate_like(grad, {p.B, S, p.C}, raw_dtype(grad));
  Backend::allocated(out);
  p.x_grad = out.mutable_data_ptr();
  raise(op, Backend::runs_grad(p, grad));
  return out;
}

template <typename Backend>
std::tuple<Tensor, Tensor> row_column_means(const Tensor& x) {
  const char* op = "row_column_means";
  check_rank(op, "x", x, 4, "(B, T, N, C)");
  check_last_contiguous(op, "x", x);
  typename Backend::Guard guard(x);
  MeansParams p;
  p.dtype = kernel_dtype(op, "x", x);
  p.B = x.size(0), p.T = x.size(1), p.N = x.size(2), p.C = x.size(3);
  if (p.T < 1 || p.N < 1) fail(op, "x must have T >= 1 frames of N >= 1 tokens, got shape ", shape_of(x));
  p.x = x.const_data_ptr();
  p.stride_b = x.stride(0), p.stride_t = x.stride(1), p.stride_n = x.stride(2);
  Tensor rows = allocate_like(x, {p.B, p.T, p.C}, raw_dtype(x)), columns = allocate_like(x, {p.B, p.N, p.C}, raw_dtype(x));
  p.rows = rows.mutable_data_ptr(), p.columns = columns.mutable_data_ptr();
  raise(op, Backend::means(p, x));
  return {rows, columns};
}

template <typename Backend>
Tensor row_column_means_backward(const Tensor& rows_grad, const Tensor& columns_grad) {
  const char* op = "row_column_means_backward";
  check_rank(op, "rows_grad", rows_grad, 3, "(B, T, C)");
  check_rank(op, "columns_grad", columns_grad, 3, "(B, N, C)");
  typename Backend::Guard guard(rows_grad);
  MeansParams p;
  p.dtype = kernel_dtype(op, "rows_grad", rows_grad);
  p.B = rows_grad.size(0), p.T = rows_grad.size(1), p.N = columns_grad.size(1), p.C = rows_grad.size(2);
  p.rows_grad = checked_dense(op, "rows_grad", rows_grad, rows_grad, rows_grad.scalar_type(), {p.B, p.T, p.C});
  p.columns_grad = checked_dense(op, "columns_grad", columns_grad, rows_grad, rows_grad.scalar_type(), {p.B, p.N, p.C});
  Tensor out = allocate_like(rows_grad, {p.B, p.T, p.N, p.C}, raw_dtype(rows_grad));
  Backend::allocated(out);
  p.x_grad = out.mutable_data_ptr();
  raise(op, Backend::means_grad(p, rows_grad));
  return out;
}

}  // namespace tokensieve::bind

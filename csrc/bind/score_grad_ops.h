// Gradient of attention_scores, once for both back ends.
#pragma once

#include <tuple>

#include "bind/score_ops.h"
#include "score/score_grad.h"

namespace tokensieve::bind {

template <typename Backend>
std::tuple<Tensor, Tensor> attention_scores_backward(const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& row_lse,
                                                     const Tensor& query, const Tensor& key, const std::optional<double>& scale,
                                                     bool causal, const OptionalTensor& bias, const OptionalTensor& lse,
                                                     const OptionalTensor& row_weights, const OptionalTensor& query_positions,
                                                     int64_t range_begin, int64_t range_end, int64_t normalize, int64_t query_reduction,
                                                     int64_t head_reduction, int64_t activation, const OptionalTensor& head_weights) {
  const char* op = "attention_scores_backward";
  typename Backend::Guard guard(query);
  ScoreGradParams g;
  g.forward = score_params(
      op, query, key,
      {scale, causal, bias, row_lse, row_weights, query_positions, range_begin, range_end, normalize, query_reduction, head_reduction});
  ScoreParams& p = g.forward;
  if (activation < 0 || activation > 2) fail(op, "activation must be a code in [0, 2], got ", activation);
  p.activation = static_cast<Activation>(activation);
  p.head_weights = static_cast<const float*>(checked_dense(op, "head_weights", head_weights, query, ScalarType::Float, {p.B, p.H}));
  g.lse_given = lse.has_value();
  int64_t sizes[4], rank = 0;
  sizes[rank++] = p.B;
  if (p.head_reduction == Reduction::kNone) sizes[rank++] = p.H;
  if (p.query_reduction == Reduction::kNone) sizes[rank++] = p.L;
  sizes[rank++] = p.range_end - p.range_begin;
  g.grad = static_cast<const float*>(checked_dense(op, "grad", grad, query, ScalarType::Float, sizes, rank));
  g.grad_lse = static_cast<const float*>(checked_dense(op, "grad_lse", grad_lse, query, ScalarType::Float, {p.B, p.H, p.L}));
  Tensor query_grad = allocate_like(query, {p.B, p.H, p.L, p.D}, raw_dtype(query));
  Tensor key_grad = allocate_like(key, {p.B, p.Hkv, p.N, p.D}, raw_dtype(key));
  Backend::allocated(key_grad);
  g.query_grad = query_grad.mutable_data_ptr();
  g.key_grad = key_grad.mutable_data_ptr();
  raise(op, Backend::score_grad(g, query));
  return {query_grad, key_grad};
}

}  // namespace tokensieve::bind

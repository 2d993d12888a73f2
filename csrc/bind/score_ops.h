// attention_scores, once for both back ends: check, allocate, fill parameters, call the launcher. No arithmetic.
#pragma once

#include <cmath>
#include <tuple>

#include "bind/arguments.h"
#include "score/score.h"

namespace tokensieve::bind {

// The eleven arguments that attention_scores and prune_tokens share.
struct ScoreOptions {
  const std::optional<double>& scale;
  bool causal;
  const OptionalTensor &bias, &lse, &row_weights, &query_positions;
  int64_t range_begin, range_end, normalize, query_reduction, head_reduction;
};

inline void fill_bias(const char* op, ScoreParams& p, const OptionalTensor& bias, const Tensor& like) {
  if (!bias) return;
  check_rank(op, "bias", *bias, 4, "broadcastable to (B, H, L, N)");
  check_same_device(op, "bias", *bias, like);
  const int64_t full[4] = {p.B, p.H, p.L, p.N};
  for (int i = 0; i < 4; ++i) {
    if (bias->size(i) != 1 && bias->size(i) != full[i]) fail(op, "bias must be broadcastable to (B, H, L, N), got shape ", shape_of(*bias));
    p.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
  }
  if (p.bias_stride[3] > 1) check_last_contiguous(op, "bias", *bias);
  p.bias = bias->const_data_ptr();
  p.bias_dtype = kernel_dtype(op, "bias", *bias, /*allow_bool=*/true);
}

inline ScoreParams score_params(const char* op, const Tensor& query, const Tensor& key, const ScoreOptions& o) {
  check_rank(op, "query", query, 4, "(B, H, L, D)");
  check_rank(op, "key", key, 4, "(B, Hkv, N, D)");
  check_same_device(op, "key", key, query);
  ScoreParams p;
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1), p.N = key.size(2);
  p.dtype = kernel_dtype(op, "query", query);
  if (kernel_dtype(op, "key", key) != p.dtype) fail(op, "key must have the dtype of query");
  if (key.size(0) != p.B || key.size(3) != p.D) fail(op, "key must be (B=", p.B, ", Hkv, N, D=", p.D, "), got shape ", shape_of(key));
  if (p.H > 0 && (p.Hkv == 0 || p.H % p.Hkv != 0)) fail(op, "query heads must be a multiple of key heads, got H=", p.H, ", Hkv=", p.Hkv);
  if (o.range_begin < 0 || o.range_end < o.range_begin || o.range_end > p.N) {
    fail(op, "key_range must satisfy 0 <= start <= end <= N=", p.N, ", got (", o.range_begin, ", ", o.range_end, ")");
  }
  check_last_contiguous(op, "query", query);
  check_last_contiguous(op, "key", key);
  for (int i = 0; i < 3; ++i) p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  fill_bias(op, p, o.bias, query);
  p.lse_in = static_cast<const float*>(checked_dense(op, "lse", o.lse, query, ScalarType::Float, {p.B, p.H, p.L}));
  p.row_weights = static_cast<const float*>(checked_dense(op, "row_weights", o.row_weights, query, ScalarType::Float, {p.B, p.L}));
  p.query_positions =
      static_cast<const int64_t*>(checked_dense(op, "query_positions", o.query_positions, query, ScalarType::Long, {p.B, p.L}));
  p.range_begin = o.range_begin, p.range_end = o.range_end;
  if (!o.scale && p.D == 0) fail(op, "scale must be given when D = 0");
  p.scale = static_cast<float>(o.scale ? *o.scale : 1.0 / std::sqrt(static_cast<double>(p.D)));
  p.causal = o.causal || p.query_positions != nullptr;
  p.normalize = static_cast<Normalize>(o.normalize);
  p.query_reduction = static_cast<Reduction>(o.query_reduction);
  p.head_reduction = static_cast<Reduction>(o.head_reduction);
  if (o.normalize < 0 || o.normalize > 1 || o.query_reduction < 0 || o.query_reduction > 4 || o.head_reduction < 0 ||
      o.head_reduction > 3) {
    fail(op, "normalize, query_reduction and head_reduction must be codes in [0, 1], [0, 4] and [0, 3]");
  }
  if (p.row_weights && (p.query_reduction == Reduction::kNone || p.query_reduction == Reduction::kMax)) {
    fail(op, "row_weights needs query_reduction 'mean', 'sum' or 'visible_mean'");
  }
  return p;
}

// Allocates the scores, whose shape drops every reduced axis; `accumulate` must have that shape.
inline Tensor allocate_scores(const char* op, const Tensor& query, ScoreParams& p, const OptionalTensor& accumulate = std::nullopt) {
  int64_t sizes[4], rank = 0;
  sizes[rank++] = p.B;
  if (p.head_reduction == Reduction::kNone) sizes[rank++] = p.H;
  if (p.query_reduction == Reduction::kNone) sizes[rank++] = p.L;
  sizes[rank++] = p.range_end - p.range_begin;
  p.accumulate = static_cast<const float*>(checked_dense(op, "accumulate", accumulate, query, ScalarType::Float, sizes, rank));
  Tensor scores = allocate_like(query, sizes, rank, aoti_torch_dtype_float32());
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  return scores;
}

template <typename Backend>
std::tuple<Tensor, Tensor> attention_scores(const Tensor& query, const Tensor& key, const std::optional<double>& scale, bool causal,
                                            const OptionalTensor& bias, const OptionalTensor& lse, const OptionalTensor& row_weights,
                                            const OptionalTensor& query_positions, int64_t range_begin, int64_t range_end,
                                            int64_t normalize, int64_t query_reduction, int64_t head_reduction, int64_t activation,
                                            const OptionalTensor& head_weights, const OptionalTensor& accumulate) {
  const char* op = "attention_scores";
  typename Backend::Guard guard(query);
  ScoreParams p = score_params(
      op, query, key,
      {scale, causal, bias, lse, row_weights, query_positions, range_begin, range_end, normalize, query_reduction, head_reduction});
  if (activation < 0 || activation > 2) fail(op, "activation must be a code in [0, 2], got ", activation);
  p.activation = static_cast<Activation>(activation);
  if (p.activation != Activation::kSoftmax && lse) fail(op, "lse needs activation 'softmax'");
  p.head_weights = static_cast<const float*>(checked_dense(op, "head_weights", head_weights, query, ScalarType::Float, {p.B, p.H}));
  if (p.head_weights && p.head_reduction != Reduction::kMean && p.head_reduction != Reduction::kSum) {
    fail(op, "head_weights needs head_reduction 'mean' or 'sum'");
  }
  Tensor row_lse = allocate_like(query, {p.B, p.H, p.L}, aoti_torch_dtype_float32());
  p.lse_out = static_cast<float*>(row_lse.mutable_data_ptr());
  Tensor scores = allocate_scores(op, query, p, accumulate);
  raise(op, Backend::score(p, query));
  return {scores, row_lse};
}

// Row normalisers alone: the score kernels with no key to score.
template <typename Backend>
Tensor attention_lse(const Tensor& query, const Tensor& key, const std::optional<double>& scale, bool causal, const OptionalTensor& bias,
                     const OptionalTensor& query_positions) {
  const char* op = "attention_lse";
  typename Backend::Guard guard(query);
  const OptionalTensor none;
  ScoreParams p = score_params(op, query, key, {scale, causal, bias, none, none, query_positions, 0, 0, 0, 2, 2});
  Tensor lse = allocate_like(query, {p.B, p.H, p.L}, aoti_torch_dtype_float32());
  p.lse_out = static_cast<float*>(lse.mutable_data_ptr());
  raise(op, Backend::score(p, query));
  return lse;
}

}  // namespace tokensieve::bind

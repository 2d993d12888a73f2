// The ops, once for both back ends: check, allocate, fill parameters, call the back end's launcher. No arithmetic.
// A Backend has: a Guard, allocated(tensor), and the launchers score, topk, gather, scatter and prune (score + topk + gather).
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "bind/checks.h"
#include "bind/tensors.h"
#include "score/score.h"
#include "select/gather.h"
#include "select/topk.h"

namespace tokensieve::bind {

using OptionalTensor = std::optional<Tensor>;

// The eleven arguments that attention_scores and prune_tokens share.
struct ScoreOptions {
  const std::optional<double>& scale;
  bool causal;
  const OptionalTensor &bias, &lse, &row_weights, &query_positions;
  int64_t range_begin, range_end, normalize, query_reduction, head_reduction;
};

inline void raise(const char* op, const Status& status) {
  if (!status.ok()) fail(op, status.message);
}

inline const void* checked_dense(const char* op, const char* name, const OptionalTensor& t, const Tensor& like, ScalarType dtype,
                                 std::initializer_list<int64_t> sizes) {
  if (!t) return nullptr;
  check_same_device(op, name, *t, like);
  bool same = t->scalar_type() == dtype && t->dim() == static_cast<int64_t>(sizes.size()) && t->is_contiguous();
  for (int64_t i = 0; same && i < t->dim(); ++i) same = t->size(i) == sizes.begin()[i];
  if (!same) fail(op, name, " has the wrong dtype or shape, or is not contiguous, got shape ", shape_of(*t));
  return t->const_data_ptr();
}

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
  if (p.row_weights && p.query_reduction != Reduction::kMean && p.query_reduction != Reduction::kSum) {
    fail(op, "row_weights needs query_reduction 'mean' or 'sum'");
  }
  return p;
}

// Allocates the scores, whose shape drops every reduced axis.
inline Tensor allocate_scores(const Tensor& query, ScoreParams& p) {
  int64_t sizes[4], rank = 0;
  sizes[rank++] = p.B;
  if (p.head_reduction == Reduction::kNone) sizes[rank++] = p.H;
  if (p.query_reduction == Reduction::kNone) sizes[rank++] = p.L;
  sizes[rank++] = p.range_end - p.range_begin;
  Tensor scores = allocate_like(query, sizes, rank, aoti_torch_dtype_float32());
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  return scores;
}

template <typename Backend>
std::tuple<Tensor, Tensor> attention_scores(const Tensor& query, const Tensor& key, const std::optional<double>& scale, bool causal,
                                            const OptionalTensor& bias, const OptionalTensor& lse, const OptionalTensor& row_weights,
                                            const OptionalTensor& query_positions, int64_t range_begin, int64_t range_end,
                                            int64_t normalize, int64_t query_reduction, int64_t head_reduction) {
  const char* op = "attention_scores";
  typename Backend::Guard guard(query);
  ScoreParams p = score_params(
      op, query, key,
      {scale, causal, bias, lse, row_weights, query_positions, range_begin, range_end, normalize, query_reduction, head_reduction});
  Tensor row_lse = allocate_like(query, {p.B, p.H, p.L}, aoti_torch_dtype_float32());
  p.lse_out = static_cast<float*>(row_lse.mutable_data_ptr());
  Tensor scores = allocate_scores(query, p);
  raise(op, Backend::score(p, query));
  return {scores, row_lse};
}

inline const uint8_t* mask_rows(const char* op, const char* name, const OptionalTensor& mask, const Tensor& scores, int64_t& stride) {
  if (!mask) return nullptr;
  check_same_device(op, name, *mask, scores);
  if (mask->scalar_type() != ScalarType::Bool || mask->dim() != 2 || mask->size(0) != scores.size(0) || mask->size(1) != scores.size(1)) {
    fail(op, name, " must be bool of the shape of scores ", shape_of(scores), ", got shape ", shape_of(*mask));
  }
  check_last_contiguous(op, name, *mask);
  stride = mask->stride(0);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

template <typename Backend>
Tensor select_topk(const Tensor& scores, int64_t k, const OptionalTensor& k_rows, const OptionalTensor& candidates,
                   const OptionalTensor& always_keep, int64_t order) {
  const char* op = "select_topk";
  typename Backend::Guard guard(scores);
  check_rank(op, "scores", scores, 2, "(B, N)");
  check_last_contiguous(op, "scores", scores);
  TopkParams p;
  p.B = scores.size(0), p.N = scores.size(1), p.K = k;
  if (k < 0 || k > p.N) fail(op, "k must be in [0, N=", p.N, "], got ", k);
  p.dtype = kernel_dtype(op, "scores", scores);
  p.scores = scores.const_data_ptr();
  p.score_stride = scores.stride(0);
  p.candidates = mask_rows(op, "candidates", candidates, scores, p.candidates_stride);
  p.always_keep = mask_rows(op, "always_keep", always_keep, scores, p.always_keep_stride);
  p.k_rows = static_cast<const int64_t*>(checked_dense(op, "k", k_rows, scores, ScalarType::Long, {p.B}));
  p.order = static_cast<TopkOrder>(order);
  Tensor index = allocate_like(scores, {p.B, k}, aoti_torch_dtype_int64());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  raise(op, Backend::topk(p, scores));
  return index;
}

inline GatherParams index_params(const char* op, const Tensor& index, int64_t B, int64_t N) {
  check_rank(op, "index", index, 2, "(B, K)");
  if (index.scalar_type() != ScalarType::Long) fail(op, "index must be int64");
  if (index.size(0) != B) fail(op, "index must be (B=", B, ", K), got shape ", shape_of(index));
  check_last_contiguous(op, "index", index);
  GatherParams p;
  p.B = B, p.N = N, p.K = index.size(1);
  p.index = static_cast<const int64_t*>(index.const_data_ptr());
  p.index_stride = index.stride(0);
  return p;
}

inline void check_token_tensors(const char* op, const std::vector<Tensor>& tensors, int64_t B, int64_t N, const Tensor& like) {
  for (const Tensor& t : tensors) {
    if (t.dim() < 2 || t.size(0) != B || t.size(1) != N) {
      fail(op, "tensors must be (B=", B, ", N=", N, ", ...), got shape ", shape_of(t));
    }
    check_same_device(op, "tensors", t, like);
  }
}

// Runs `launch(params)` over the tensors, kMaxGatherTensors at a time.
template <typename Launch>
void for_each_batch_of_tensors(GatherParams p, const std::vector<GatherTensor>& views, Launch&& launch) {
  for (size_t begin = 0; begin < views.size(); begin += kMaxGatherTensors) {
    p.num_tensors = static_cast<int>(views.size() - begin < kMaxGatherTensors ? views.size() - begin : kMaxGatherTensors);
    for (int i = 0; i < p.num_tensors; ++i) p.tensors[i] = views[begin + static_cast<size_t>(i)];
    launch(p);
  }
}

// Output of [B, rows, trailing of t], of t's dtype.
template <typename Backend>
Tensor allocate_rows(const Tensor& t, int64_t rows) {
  std::vector<int64_t> sizes(static_cast<size_t>(t.dim()));
  for (int64_t i = 0; i < t.dim(); ++i) sizes[static_cast<size_t>(i)] = i == 1 ? rows : t.size(i);
  Tensor out = allocate_like(t, sizes.data(), t.dim(), raw_dtype(t));
  Backend::allocated(out);
  return out;
}

inline std::vector<GatherTensor> gather_views(const char* op, const std::vector<Tensor>& tensors, const std::vector<Tensor>& out) {
  std::vector<GatherTensor> views;
  views.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.push_back(byte_rows(op, tensors[i]));
    views.back().src = tensors[i].const_data_ptr();
    views.back().dst = out[i].mutable_data_ptr();
  }
  return views;
}

template <typename Backend>
void run_gather(const char* op, const std::vector<Tensor>& tensors, const Tensor& index, const std::vector<Tensor>& out) {
  GatherParams p = index_params(op, index, tensors[0].size(0), tensors[0].size(1));
  for_each_batch_of_tensors(p, gather_views(op, tensors, out),
                            [&](const GatherParams& batch) { raise(op, Backend::gather(batch, index)); });
}

inline void check_gather(const char* op, const std::vector<Tensor>& tensors, const Tensor& index) {
  if (tensors.empty()) fail(op, "tensors must hold at least one tensor, got none");
  if (tensors[0].dim() < 2) fail(op, "tensors must be (B, N, ...), got shape ", shape_of(tensors[0]));
  check_token_tensors(op, tensors, tensors[0].size(0), tensors[0].size(1), index);
}

template <typename Backend>
std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& index) {
  const char* op = "gather_tokens";
  check_gather(op, tensors, index);
  check_rank(op, "index", index, 2, "(B, K)");
  typename Backend::Guard guard(index);
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(allocate_rows<Backend>(t, index.size(1)));
  run_gather<Backend>(op, tensors, index, out);
  return out;
}

template <typename Backend>
void gather_tokens_out(const std::vector<Tensor>& tensors, const Tensor& index, const std::vector<Tensor>& out) {
  const char* op = "gather_tokens_out";
  check_gather(op, tensors, index);
  check_rank(op, "index", index, 2, "(B, K)");
  if (out.size() != tensors.size()) fail(op, "out must hold ", tensors.size(), " tensors, got ", out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    bool same = out[i].dim() == tensors[i].dim() && raw_dtype(out[i]) == raw_dtype(tensors[i]) && out[i].is_contiguous();
    for (int64_t d = 0; same && d < out[i].dim(); ++d) same = out[i].size(d) == (d == 1 ? index.size(1) : tensors[i].size(d));
    if (!same) fail(op, "out must be contiguous, of the dtype of tensors and of shape (B, K, ...), got shape ", shape_of(out[i]));
    check_same_device(op, "out", out[i], index);
  }
  typename Backend::Guard guard(index);
  run_gather<Backend>(op, tensors, index, out);
}

template <typename Backend>
std::vector<Tensor> gather_tokens_backward(const std::vector<Tensor>& grads, const Tensor& index, int64_t N) {
  const char* op = "gather_tokens_backward";
  check_rank(op, "index", index, 2, "(B, K)");
  if (grads.empty()) fail(op, "grads must hold at least one tensor, got none");
  check_token_tensors(op, grads, index.size(0), index.size(1), index);
  typename Backend::Guard guard(index);
  std::vector<Tensor> out;
  std::vector<GatherTensor> views;
  for (const Tensor& g : grads) {
    if (!g.is_contiguous()) fail(op, "grads must be contiguous");
    out.push_back(allocate_rows<Backend>(g, N));
    views.push_back(byte_rows(op, g));
    views.back().src = g.const_data_ptr();
    views.back().dst = out.back().mutable_data_ptr();
  }
  GatherParams p = index_params(op, index, index.size(0), N);
  for_each_batch_of_tensors(p, views, [&](const GatherParams& batch) { raise(op, Backend::scatter(batch, index)); });
  return out;
}

template <typename Backend>
std::tuple<std::vector<Tensor>, Tensor, Tensor> prune_tokens(const Tensor& query, const Tensor& key, const std::vector<Tensor>& tensors,
                                                             int64_t k, const std::optional<double>& scale, bool causal,
                                                             const OptionalTensor& bias, const OptionalTensor& lse,
                                                             const OptionalTensor& row_weights, const OptionalTensor& query_positions,
                                                             int64_t range_begin, int64_t range_end, int64_t normalize,
                                                             int64_t query_reduction, int64_t head_reduction, bool keep_outside) {
  const char* op = "prune_tokens";
  const int64_t R = range_end - range_begin;
  if (query_reduction == 0 || head_reduction == 0) fail(op, "query_reduction and head_reduction must reduce (mean, sum or max)");
  if (k < 0 || k > R) fail(op, "k must be in [0, R=", R, "], got ", k);
  check_rank(op, "key", key, 4, "(B, Hkv, N, D)");
  if (tensors.empty()) fail(op, "tensors must hold at least one tensor, got none");
  check_token_tensors(op, tensors, key.size(0), key.size(2), query);
  typename Backend::Guard guard(query);
  ScoreParams score = score_params(
      op, query, key,
      {scale, causal, bias, lse, row_weights, query_positions, range_begin, range_end, normalize, query_reduction, head_reduction});
  const Tensor scores = allocate_scores(query, score);
  TopkParams topk;
  topk.B = key.size(0), topk.N = R, topk.K = k;
  topk.scores = scores.const_data_ptr();
  topk.score_stride = R;
  topk.offset = range_begin;
  if (keep_outside) topk.prefix = range_begin, topk.suffix = key.size(2) - range_end;
  const int64_t K = topk_output_length(topk);
  Tensor index = allocate_like(query, {topk.B, K}, aoti_torch_dtype_int64());
  topk.index = static_cast<int64_t*>(index.mutable_data_ptr());

  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(allocate_rows<Backend>(t, K));
  GatherParams gather = index_params(op, index, topk.B, key.size(2));
  const std::vector<GatherTensor> views = gather_views(op, tensors, out);
  gather.num_tensors = static_cast<int>(views.size() < kMaxGatherTensors ? views.size() : kMaxGatherTensors);
  for (int i = 0; i < gather.num_tensors; ++i) gather.tensors[i] = views[static_cast<size_t>(i)];
  raise(op, Backend::prune(score, topk, gather, query));
  if (views.size() > kMaxGatherTensors) {  // the first launch selected; the rest only copies
    const std::vector<GatherTensor> rest(views.begin() + kMaxGatherTensors, views.end());
    for_each_batch_of_tensors(gather, rest, [&](const GatherParams& batch) { raise(op, Backend::gather(batch, index)); });
  }
  return {out, index, scores};
}

}  // namespace tokensieve::bind

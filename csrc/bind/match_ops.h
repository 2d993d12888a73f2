// bipartite_match, once for both back ends: check, allocate, fill parameters, call the launcher. No arithmetic.
#pragma once

#include <tuple>

#include "bind/arguments.h"
#include "merge/match.h"

namespace tokensieve::bind {

// A list of tokens: (n,) for the whole batch or (B, n), int64.
inline const int64_t* token_list(const char* op, const char* name, const Tensor& list, const Tensor& metric, int64_t B, int64_t& count,
                                 int64_t& stride) {
  check_same_device(op, name, list, metric);
  const int64_t rank = list.dim();
  if (list.scalar_type() != ScalarType::Long || (rank != 1 && (rank != 2 || list.size(0) != B))) {
    fail(op, name, " must be int64 (n,) or (B=", B, ", n), got shape ", shape_of(list));
  }
  check_last_contiguous(op, name, list);
  count = list.size(rank - 1);
  stride = rank == 2 ? list.stride(0) : 0;
  return static_cast<const int64_t*>(list.const_data_ptr());
}

inline void match_lists(const char* op, MatchParams& p, int64_t prefix, const OptionalTensor& sources, const OptionalTensor& targets,
                        const OptionalTensor& keep, const Tensor& metric) {
  if (sources.has_value() != targets.has_value()) fail(op, "sources and targets come together or not at all");
  if (prefix < 0 || prefix > p.N) fail(op, "keep must be in [0, N=", p.N, "], got ", prefix);
  p.P = prefix;
  if (keep) p.keep = token_list(op, "keep", *keep, metric, p.B, p.P, p.keep_stride);
  if (sources) {
    p.sources = token_list(op, "sources", *sources, metric, p.B, p.S, p.sources_stride);
    p.targets = token_list(op, "targets", *targets, metric, p.B, p.T, p.targets_stride);
    return;
  }
  if (keep) fail(op, "keep must be an int where sources and targets are not given");
  p.source_first = prefix + prefix % 2;  // even positions behind the prefix, and odd ones
  p.target_first = prefix + 1 - prefix % 2;
  p.S = p.N > p.source_first ? (p.N - p.source_first + 1) / 2 : 0;
  p.T = p.N > p.target_first ? (p.N - p.target_first + 1) / 2 : 0;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_match(const Tensor& metric, int64_t r, int64_t prefix,
                                                                   const OptionalTensor& sources, const OptionalTensor& targets,
                                                                   const OptionalTensor& keep, const OptionalTensor& bias,
                                                                   const OptionalTensor& candidates, int64_t order) {
  const char* op = "bipartite_match";
  typename Backend::Guard guard(metric);
  const int64_t rank = metric.dim();
  if (rank != 3 && rank != 4) fail(op, "metric must be (B, N, C) or (B, H, N, D), got shape ", shape_of(metric));
  check_last_contiguous(op, "metric", metric);
  MatchParams p;
  p.dtype = kernel_dtype(op, "metric", metric);
  p.B = metric.size(0), p.H = rank == 4 ? metric.size(1) : 1, p.N = metric.size(rank - 2), p.D = metric.size(rank - 1);
  if (p.H == 0) fail(op, "metric must have at least one head, got shape ", shape_of(metric));
  p.metric_stride[0] = metric.stride(0);
  p.metric_stride[1] = rank == 4 ? metric.stride(1) : 0;
  p.metric_stride[2] = metric.stride(rank - 2);
  p.metric = metric.const_data_ptr();
  match_lists(op, p, prefix, sources, targets, keep, metric);
  const int64_t most = sources || p.S < p.T ? p.S : p.T;
  if (r < 0 || r > most) fail(op, "r must be in [0, ", most, "], got ", r);
  p.r = r;
  p.bias = static_cast<const float*>(checked_dense(op, "bias", bias, metric, ScalarType::Float, {p.B, p.S}));
  if (candidates) {
    check_same_device(op, "candidates", *candidates, metric);
    if (candidates->scalar_type() != ScalarType::Bool || candidates->dim() != 2 || candidates->size(0) != p.B ||
        candidates->size(1) != p.N) {
      fail(op, "candidates must be bool (B, N) = (", p.B, ", ", p.N, "), got shape ", shape_of(*candidates));
    }
    check_last_contiguous(op, "candidates", *candidates);
    p.candidates = static_cast<const uint8_t*>(candidates->const_data_ptr());
    p.candidates_stride = candidates->stride(0);
  }
  p.order = static_cast<MatchOrder>(order);
  Tensor source = allocate_like(metric, {p.B, r}, aoti_torch_dtype_int64());
  Tensor destination = allocate_like(metric, {p.B, r}, aoti_torch_dtype_int64());
  Tensor similarity = allocate_like(metric, {p.B, r}, aoti_torch_dtype_float32());
  Tensor index = allocate_like(metric, {p.B, p.rows()}, aoti_torch_dtype_int64());
  Tensor inverse = allocate_like(metric, {p.B, p.N}, aoti_torch_dtype_int64());
  p.source = static_cast<int64_t*>(source.mutable_data_ptr());
  p.destination = static_cast<int64_t*>(destination.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.inverse = static_cast<int64_t*>(inverse.mutable_data_ptr());
  raise(op, Backend::match(p, metric));
  return {source, destination, similarity, index, inverse};
}

}  // namespace tokensieve::bind

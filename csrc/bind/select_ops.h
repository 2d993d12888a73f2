// The selections, once for both back ends.
#pragma once

#include <tuple>

#include "bind/arguments.h"
#include "select/count.h"
#include "select/topk.h"

namespace tokensieve::bind {

inline TopkParams selection_rows(const char* op, const Tensor& scores, const OptionalTensor& candidates, const OptionalTensor& always_keep,
                                 int64_t order) {
  check_rank(op, "scores", scores, 2, "(B, N)");
  check_last_contiguous(op, "scores", scores);
  TopkParams p;
  p.B = scores.size(0), p.N = scores.size(1);
  p.dtype = kernel_dtype(op, "scores", scores);
  p.scores = scores.const_data_ptr();
  p.score_stride = scores.stride(0);
  p.candidates = mask_rows(op, "candidates", candidates, scores, p.candidates_stride);
  p.always_keep = mask_rows(op, "always_keep", always_keep, scores, p.always_keep_stride);
  p.order = static_cast<TopkOrder>(order);
  return p;
}

template <typename Backend>
Tensor select_topk(const Tensor& scores, int64_t k, const OptionalTensor& k_rows, const OptionalTensor& candidates,
                   const OptionalTensor& always_keep, int64_t order) {
  const char* op = "select_topk";
  typename Backend::Guard guard(scores);
  TopkParams p = selection_rows(op, scores, candidates, always_keep, order);
  p.K = k;
  if (k < 0 || k > p.N) fail(op, "k must be in [0, N=", p.N, "], got ", k);
  p.k_rows = static_cast<const int64_t*>(checked_dense(op, "k", k_rows, scores, ScalarType::Long, {p.B}));
  Tensor index = allocate_like(scores, {p.B, k}, aoti_torch_dtype_int64());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  raise(op, Backend::topk(p, scores));
  return index;
}

// A rule says how many tokens of a row stay, then the top-k of that many: (index, counts, overflow).
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> select_counted(const char* op, const char* level_name, CountRule rule, const Tensor& scores,
                                                  double level, const OptionalTensor& levels, int64_t capacity, int64_t min_k,
                                                  const std::optional<int64_t>& max_k, const OptionalTensor& candidates,
                                                  const OptionalTensor& always_keep, int64_t order, int64_t extra) {
  typename Backend::Guard guard(scores);
  CountParams p;
  p.rows = selection_rows(op, scores, candidates, always_keep, order);
  const int64_t B = p.rows.B, N = p.rows.N;
  p.max_k = max_k ? *max_k : N;
  if (capacity < 0 || capacity > N) fail(op, "capacity must be in [0, N=", N, "], got ", capacity);
  if (min_k < 0 || min_k > p.max_k || p.max_k > N) {
    fail(op, "min_k and max_k must satisfy 0 <= min_k <= max_k <= N=", N, ", got ", min_k, " and ", p.max_k);
  }
  if (extra < 0) fail(op, "extra must be 0 or more, got ", extra);
  p.rule = rule, p.level = level, p.min_k = min_k, p.extra = extra, p.capacity = capacity;
  p.levels = static_cast<const float*>(checked_dense(op, level_name, levels, scores, ScalarType::Float, {B}));
  Tensor counts = allocate_like(scores, {B}, aoti_torch_dtype_int64()), take = allocate_like(scores, {B}, aoti_torch_dtype_int64());
  Tensor overflow = allocate_like(scores, {B}, aoti_torch_dtype_bool());
  p.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  p.take = static_cast<int64_t*>(take.mutable_data_ptr());
  p.overflow = static_cast<bool*>(overflow.mutable_data_ptr());
  raise(op, Backend::count(p, scores));

  TopkParams topk = p.rows;
  Tensor index = allocate_like(scores, {B, capacity}, aoti_torch_dtype_int64());
  topk.K = capacity, topk.k_rows = p.take;
  topk.index = static_cast<int64_t*>(index.mutable_data_ptr());
  raise(op, Backend::topk(topk, scores));
  return {index, counts, overflow};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> select_mass(const Tensor& scores, double mass, const OptionalTensor& mass_rows, bool below,
                                               int64_t capacity, int64_t min_k, const std::optional<int64_t>& max_k,
                                               const OptionalTensor& candidates, const OptionalTensor& always_keep, int64_t order,
                                               int64_t extra) {
  const char* op = "select_mass";
  if (!mass_rows && !(mass > 0.0 && mass <= 1.0)) fail(op, "mass must be in (0, 1], got ", mass);
  return select_counted<Backend>(op, "mass", below ? CountRule::kBelow : CountRule::kReach, scores, mass, mass_rows, capacity, min_k, max_k,
                                 candidates, always_keep, order, extra);
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> select_threshold(const Tensor& scores, double tau, const OptionalTensor& tau_rows, bool strict,
                                                    int64_t capacity, int64_t min_k, const std::optional<int64_t>& max_k,
                                                    const OptionalTensor& candidates, const OptionalTensor& always_keep, int64_t order) {
  return select_counted<Backend>("select_threshold", "tau", strict ? CountRule::kAbove : CountRule::kFrom, scores, tau, tau_rows, capacity,
                                 min_k, max_k, candidates, always_keep, order, 0);
}

}  // namespace tokensieve::bind

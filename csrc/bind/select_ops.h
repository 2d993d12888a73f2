// The selections, once for both back ends.
#pragma once

#include "bind/arguments.h"
#include "select/topk.h"

namespace tokensieve::bind {

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

}  // namespace tokensieve::bind

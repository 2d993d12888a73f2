// prune_tokens, once for both back ends: score, select and gather with one set of checks.
#pragma once

#include <tuple>
#include <vector>

#include "bind/gather_ops.h"
#include "bind/score_ops.h"
#include "select/topk.h"

namespace tokensieve::bind {

template <typename Backend>
std::tuple<std::vector<Tensor>, Tensor, Tensor> prune_tokens(const Tensor& query, const Tensor& key, const std::vector<Tensor>& tensors,
                                                             int64_t k, const std::optional<double>& scale, bool causal,
                                                             const OptionalTensor& bias, const OptionalTensor& lse,
                                                             const OptionalTensor& row_weights, const OptionalTensor& query_positions,
                                                             int64_t range_begin, int64_t range_end, int64_t normalize,
                                                             int64_t query_reduction, int64_t head_reduction, bool keep_outside) {
  const char* op = "prune_tokens";
  const int64_t R = range_end - range_begin;
  if (query_reduction == 0 || head_reduction == 0) fail(op, "query_reduction and head_reduction must reduce");
  if (k < 0 || k > R) fail(op, "k must be in [0, R=", R, "], got ", k);
  check_rank(op, "key", key, 4, "(B, Hkv, N, D)");
  if (tensors.empty()) fail(op, "tensors must hold at least one tensor, got none");
  check_token_tensors(op, tensors, key.size(0), key.size(2), query);
  typename Backend::Guard guard(query);
  ScoreParams score = score_params(
      op, query, key,
      {scale, causal, bias, lse, row_weights, query_positions, range_begin, range_end, normalize, query_reduction, head_reduction});
  const Tensor scores = allocate_scores(op, query, score);
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

// attention_pagerank, once for both back ends.
#pragma once

#include "bind/score_ops.h"
#include "score/pagerank.h"

namespace tokensieve::bind {

template <typename Backend>
Tensor attention_pagerank(const Tensor& query, const Tensor& key, const std::optional<double>& scale, double temperature, bool causal,
                          const OptionalTensor& mask, const OptionalTensor& start, int64_t iterations) {
  const char* op = "attention_pagerank";
  typename Backend::Guard guard(query);
  const OptionalTensor none;
  const ScoreParams s = score_params(op, query, key, {scale, causal, none, none, none, none, 0, 0, 0, 2, 0});
  if (s.L != s.N) fail(op, "query and key must be the same tokens, got L=", s.L, ", N=", s.N);
  if (!(temperature > 0)) fail(op, "temperature must be above 0, got ", temperature);
  if (iterations < 0) fail(op, "iterations must be at least 0, got ", iterations);
  PagerankParams p;
  p.query = s.query, p.key = s.key, p.dtype = s.dtype;
  p.B = s.B, p.H = s.H, p.Hkv = s.Hkv, p.N = s.N, p.D = s.D;
  for (int i = 0; i < 3; ++i) p.query_stride[i] = s.query_stride[i], p.key_stride[i] = s.key_stride[i];
  p.mask = static_cast<const uint8_t*>(checked_dense(op, "mask", mask, query, ScalarType::Bool, {p.B, p.N}));
  p.mask_stride = p.N;
  p.start = static_cast<const float*>(checked_dense(op, "start", start, query, ScalarType::Float, {p.B, p.N}));
  p.scale = static_cast<float>((scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.D))) / temperature);
  p.causal = causal;
  p.iterations = iterations;
  Tensor rank = allocate_like(query, {p.B, p.H, p.N}, aoti_torch_dtype_float32());
  p.rank = static_cast<float*>(rank.mutable_data_ptr());
  raise(op, Backend::pagerank(p, query));
  return rank;
}

}  // namespace tokensieve::bind

// scatter_tokens and its gradient, once for both back ends.
#pragma once

#include <tuple>
#include <vector>

#include "bind/gather_ops.h"
#include "select/scatter.h"

namespace tokensieve::bind {

// Both sides of a pair as M segments of W bytes: the finer cut of the two, where the coarser side is whole.
inline ScatterTensor scatter_pair(const char* op, const Tensor& base, const Tensor& value) {
  const GatherTensor a = byte_rows(op, base), b = byte_rows(op, value);
  ScatterTensor t;
  t.base_b = a.stride_b, t.base_n = a.stride_n, t.base_m = a.stride_m;
  t.value_b = b.stride_b, t.value_n = b.stride_n, t.value_m = b.stride_m;
  t.segments = a.segments, t.segment_bytes = a.segment_bytes;
  if (a.segment_bytes == b.segment_bytes) return t;
  if (a.segments != 1 && b.segments != 1) {
    fail(op, "values must have the strided axis of tensors where both have one, got shape ", shape_of(value), "; call .contiguous()");
  }
  if (a.segments == 1) {
    t.segments = b.segments, t.segment_bytes = t.base_m = b.segment_bytes;
  } else {
    t.value_m = a.segment_bytes;
  }
  return t;
}

inline ScatterParams scatter_params(const char* op, const Tensor& index, const OptionalTensor& weights, int64_t B, int64_t N) {
  const GatherParams g = index_params(op, index, B, N);
  ScatterParams p;
  p.B = g.B, p.N = g.N, p.K = g.K;
  p.index = g.index, p.index_stride = g.index_stride;
  p.weights = static_cast<const float*>(checked_dense(op, "weights", weights, index, ScalarType::Float, {p.B, p.K}));
  return p;
}

inline void check_values(const char* op, const std::vector<Tensor>& tensors, const Tensor& index, const std::vector<Tensor>& values) {
  check_gather(op, tensors, index);
  check_rank(op, "index", index, 2, "(B, K)");
  if (values.size() != tensors.size()) fail(op, "values must hold ", tensors.size(), " tensors, got ", values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor &t = tensors[i], &v = values[i];
    bool same = v.dim() == t.dim() && raw_dtype(v) == raw_dtype(t);
    for (int64_t d = 0; same && d < v.dim(); ++d) same = v.size(d) == (d == 1 ? index.size(1) : t.size(d));
    if (!same) fail(op, "values must be of the dtype of tensors and of shape (B, K, ...), got shape ", shape_of(v));
    check_same_device(op, "values", v, index);
  }
}

// Runs `launch(params)` over the pairs, kMaxScatterTensors at a time.
template <typename Launch>
void for_each_batch_of_pairs(ScatterParams p, const std::vector<ScatterTensor>& pairs, Launch&& launch) {
  for (size_t begin = 0; begin < pairs.size(); begin += kMaxScatterTensors) {
    p.num_tensors = static_cast<int>(pairs.size() - begin < kMaxScatterTensors ? pairs.size() - begin : kMaxScatterTensors);
    for (int i = 0; i < p.num_tensors; ++i) p.tensors[i] = pairs[begin + static_cast<size_t>(i)];
    p.add_to_weight_grad = begin > 0;
    launch(p);
  }
}

template <typename Backend>
std::vector<Tensor> scatter_tokens(const std::vector<Tensor>& tensors, const Tensor& index, const std::vector<Tensor>& values, bool add,
                                   const OptionalTensor& weights) {
  const char* op = "scatter_tokens";
  check_values(op, tensors, index, values);
  if (weights && !add) fail(op, "weights needs mode 'add'");
  typename Backend::Guard guard(index);
  const int64_t B = tensors[0].size(0), N = tensors[0].size(1);
  ScatterParams p = scatter_params(op, index, weights, B, N);
  p.add = add;
  std::vector<Tensor> out;
  std::vector<ScatterTensor> pairs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    out.push_back(allocate_rows<Backend>(tensors[i], N));
    ScatterTensor t = scatter_pair(op, tensors[i], values[i]);
    if (add) t.dtype = kernel_dtype(op, "tensors", tensors[i]);
    t.base = tensors[i].const_data_ptr();
    t.value = values[i].const_data_ptr();
    t.dst = out.back().mutable_data_ptr();
    pairs.push_back(t);
  }
  for_each_batch_of_pairs(p, pairs, [&](const ScatterParams& batch) { raise(op, Backend::scatter_tokens(batch, index)); });
  return out;
}

// Of the weighted addition: the gradients of the values (an empty list if unwanted), and of the weights (an empty tensor if unwanted).
template <typename Backend>
std::tuple<std::vector<Tensor>, Tensor> scatter_tokens_backward(const std::vector<Tensor>& grads, const Tensor& index,
                                                                const std::vector<Tensor>& values, const Tensor& weights,
                                                                bool values_wanted, bool weights_wanted) {
  const char* op = "scatter_tokens_backward";
  check_values(op, grads, index, values);
  typename Backend::Guard guard(index);
  ScatterParams p = scatter_params(op, index, weights, grads[0].size(0), grads[0].size(1));
  std::vector<Tensor> out;
  std::vector<ScatterTensor> pairs;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].is_contiguous()) fail(op, "grads must be contiguous");
    ScatterTensor t = scatter_pair(op, grads[i], values[i]);
    t.dtype = kernel_dtype(op, "grads", grads[i]);
    t.base = grads[i].const_data_ptr();
    t.value = values[i].const_data_ptr();
    if (values_wanted) {
      out.push_back(allocate_rows<Backend>(grads[i], p.K));
      t.dst = out.back().mutable_data_ptr();
    }
    pairs.push_back(t);
  }
  Tensor weight_grad = allocate_like(index, {p.B, weights_wanted ? p.K : 0}, aoti_torch_dtype_float32());
  if (weights_wanted) p.weight_grad = static_cast<float*>(weight_grad.mutable_data_ptr());
  for_each_batch_of_pairs(p, pairs, [&](const ScatterParams& batch) { raise(op, Backend::scatter_grad(batch, index)); });
  return {out, weight_grad};
}

}  // namespace tokensieve::bind

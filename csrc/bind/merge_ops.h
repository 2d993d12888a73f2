// Merging token rows, and its gradients, once for both back ends.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "bind/gather_ops.h"
#include "merge/merge.h"

namespace tokensieve::bind {

inline MergeType merge_type(const char* op, const Tensor& t, bool integers) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return MergeType::kFloat32;
    case ScalarType::Half:
      return MergeType::kFloat16;
    case ScalarType::BFloat16:
      return MergeType::kBFloat16;
    case ScalarType::Int:
      if (integers) return MergeType::kInt32;
      break;
    case ScalarType::Long:
      if (integers) return MergeType::kInt64;
      break;
    default:
      break;
  }
  fail(op, "tensors must be float32, float16 or bfloat16", integers ? " or int32 or int64" : " in this mode");
}

inline MergeMode merge_mode(const char* op, int64_t mode) {
  if (mode < 0 || mode > 4) fail(op, "mode must be in [0, 4], got ", mode);
  return static_cast<MergeMode>(mode);
}

// Rows of ids: int64, (B, columns).
inline const int64_t* id_rows(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t B, int64_t columns,
                              int64_t& stride) {
  check_rank(op, name, t, 2, columns < 0 ? "(B, K)" : "(B, N)");
  check_same_device(op, name, t, like);
  if (t.scalar_type() != ScalarType::Long) fail(op, name, " must be int64");
  if (t.size(0) != B || (columns >= 0 && t.size(1) != columns)) {
    fail(op, name, " must be (", B, ", ", columns, "), got shape ", shape_of(t));
  }
  check_last_contiguous(op, name, t);
  stride = t.stride(0);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline const float* token_floats(const char* op, const char* name, const OptionalTensor& t, const Tensor& like, int64_t B, int64_t N) {
  return static_cast<const float*>(checked_dense(op, name, t, like, ScalarType::Float, {B, N}));
}

inline MergeTensor merge_view(const char* op, const Tensor& t, bool integers) {
  const GatherTensor bytes = byte_rows(op, t);
  MergeTensor m;
  m.src = t.const_data_ptr();
  m.stride_b = bytes.stride_b, m.stride_n = bytes.stride_n, m.stride_m = bytes.stride_m;
  m.segments = bytes.segments, m.segment_bytes = bytes.segment_bytes;
  m.type = merge_type(op, t, integers);
  return m;
}

// Runs `launch(params)` over the tensors, kMaxMergeTensors at a time; once without tensors too, for the totals.
template <typename Launch>
void for_each_batch_of_merges(MergeParams p, const std::vector<MergeTensor>& views, Launch&& launch) {
  size_t begin = 0;
  do {
    p.num_tensors = static_cast<int>(std::min<size_t>(views.size() - begin, kMaxMergeTensors));
    for (int i = 0; i < p.num_tensors; ++i) p.tensors[i] = views[begin + static_cast<size_t>(i)];
    launch(p);
    p.total = p.log_total = nullptr;  // the first launch wrote them
    begin += kMaxMergeTensors;
  } while (begin < views.size());
}

inline void check_tokens(const char* op, const std::vector<Tensor>& tensors, const Tensor& like) {
  if (tensors.empty()) fail(op, "tensors must hold at least one tensor, got none");
  if (tensors[0].dim() < 2) fail(op, "tensors must be (B, N, ...), got shape ", shape_of(tensors[0]));
  check_token_tensors(op, tensors, tensors[0].size(0), tensors[0].size(1), like);
}

// Parameters of a plan's merge: index (B, R), inverse (B, N), size (B, N).
inline MergeParams plan_params(const char* op, const Tensor& index, const Tensor& inverse, const OptionalTensor& size, int64_t mode,
                               int64_t B, int64_t N) {
  MergeParams p;
  check_rank(op, "index", index, 2, "(B, M)");
  p.B = B, p.N = N, p.R = index.size(1);
  p.mode = merge_mode(op, mode);
  p.inverse = id_rows(op, "inverse", inverse, index, B, N, p.inverse_stride);
  p.own = id_rows(op, "index", index, index, B, p.R, p.own_stride);
  p.size = token_floats(op, "size", size, index, B, N);
  if (p.mode == MergeMode::kWeighted) p.weights = p.size;
  return p;
}

template <typename Backend>
std::tuple<std::vector<Tensor>, Tensor, Tensor> merge_tokens(const std::vector<Tensor>& tensors, const Tensor& index, const Tensor& inverse,
                                                             const OptionalTensor& size, int64_t mode) {
  const char* op = "merge_tokens";
  check_tokens(op, tensors, index);
  typename Backend::Guard guard(index);
  MergeParams p = plan_params(op, index, inverse, size, mode, tensors[0].size(0), tensors[0].size(1));
  const bool integers = p.mode == MergeMode::kSum || p.mode == MergeMode::kAmax;
  std::vector<Tensor> out;
  std::vector<MergeTensor> views;
  for (const Tensor& t : tensors) {
    views.push_back(merge_view(op, t, integers));
    out.push_back(allocate_rows<Backend>(t, p.R));
    views.back().dst = out.back().mutable_data_ptr();
  }
  Tensor total = allocate_like(index, {p.B, p.R}, aoti_torch_dtype_float32());
  Tensor log_total = allocate_like(index, {p.B, p.R}, aoti_torch_dtype_float32());
  p.total = static_cast<float*>(total.mutable_data_ptr());
  p.log_total = static_cast<float*>(log_total.mutable_data_ptr());
  for_each_batch_of_merges(p, views, [&](MergeParams& batch) { raise(op, Backend::merge(batch, index)); });
  return {out, total, log_total};
}

inline void check_grads(const char* op, const std::vector<Tensor>& grads, const std::vector<Tensor>& tensors, int64_t R) {
  if (grads.size() != tensors.size()) fail(op, "grads must hold ", tensors.size(), " tensors, got ", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &g = grads[i], &t = tensors[i];
    bool same = g.dim() == t.dim() && raw_dtype(g) == raw_dtype(t) && g.is_contiguous();
    for (int64_t d = 0; same && d < g.dim(); ++d) same = g.size(d) == (d == 1 ? R : t.size(d));
    if (!same) fail(op, "grads must be contiguous, of the dtype of tensors and of shape (B, rows, ...), got shape ", shape_of(g));
    check_same_device(op, "grads", g, t);
  }
}

template <typename Backend>
std::vector<Tensor> merge_tokens_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& tensors,
                                          const std::vector<Tensor>& outs, const Tensor& index, const Tensor& inverse,
                                          const OptionalTensor& size, int64_t mode) {
  const char* op = "merge_tokens_backward";
  check_tokens(op, tensors, index);
  typename Backend::Guard guard(index);
  MergeParams p = plan_params(op, index, inverse, size, mode, tensors[0].size(0), tensors[0].size(1));
  check_grads(op, grads, tensors, p.R);
  if (p.mode == MergeMode::kAmax) check_grads(op, outs, tensors, p.R);
  std::vector<Tensor> out;
  std::vector<MergeTensor> views;
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.push_back(merge_view(op, tensors[i], false));
    out.push_back(allocate_rows<Backend>(tensors[i], p.N));
    views.back().dst = out.back().mutable_data_ptr();
    views.back().grad = grads[i].const_data_ptr();
    if (p.mode == MergeMode::kAmax) views.back().out = outs[i].const_data_ptr();
  }
  for_each_batch_of_merges(p, views, [&](MergeParams& batch) { raise(op, Backend::merge_grad(batch, index)); });
  return out;
}

template <typename Backend>
std::vector<Tensor> unmerge_tokens(const std::vector<Tensor>& tensors, const Tensor& inverse) {
  const char* op = "unmerge_tokens";
  check_tokens(op, tensors, inverse);
  check_rank(op, "inverse", inverse, 2, "(B, N)");
  typename Backend::Guard guard(inverse);
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(allocate_rows<Backend>(t, inverse.size(1)));
  run_gather<Backend>(op, tensors, inverse, out);
  return out;
}

// The sum of every output row's tokens: the gradient of unmerge_tokens.
template <typename Backend>
std::vector<Tensor> unmerge_tokens_backward(const std::vector<Tensor>& grads, const Tensor& inverse, int64_t rows) {
  const char* op = "unmerge_tokens_backward";
  check_tokens(op, grads, inverse);
  typename Backend::Guard guard(inverse);
  MergeParams p;
  p.B = grads[0].size(0), p.N = grads[0].size(1), p.R = rows;
  p.inverse = id_rows(op, "inverse", inverse, inverse, p.B, p.N, p.inverse_stride);
  std::vector<Tensor> out;
  std::vector<MergeTensor> views;
  for (const Tensor& g : grads) {
    views.push_back(merge_view(op, g, false));
    out.push_back(allocate_rows<Backend>(g, rows));
    views.back().dst = out.back().mutable_data_ptr();
  }
  for_each_batch_of_merges(p, views, [&](MergeParams& batch) { raise(op, Backend::merge(batch, inverse)); });
  return out;
}

// x reduced by label, or (complement) over all tokens that are not in a list, as one row.
template <typename Backend>
std::tuple<Tensor, Tensor> reduce_tokens(const char* op, MergeParams& p, const Tensor& x, const OptionalTensor& weights) {
  p.size = p.weights = token_floats(op, "weights", weights, x, p.B, p.N);
  MergeTensor view = merge_view(op, x, p.weights == nullptr && p.mode != MergeMode::kMean);
  Tensor out = allocate_rows<Backend>(x, p.R);
  Tensor total = allocate_like(x, {p.B, p.R}, aoti_torch_dtype_float32());
  view.dst = out.mutable_data_ptr();
  p.total = static_cast<float*>(total.mutable_data_ptr());
  p.tensors[0] = view, p.num_tensors = 1;
  raise(op, Backend::merge(p, x));
  return {out, total};
}

inline void check_reduced(const char* op, const Tensor& x, int64_t rows, int64_t mode, const OptionalTensor& weights) {
  if (x.dim() < 2) fail(op, "x must be (B, N, ...), got shape ", shape_of(x));
  if (rows < 0) fail(op, "rows must be at least 0, got ", rows);
  const MergeMode m = merge_mode(op, mode);
  if (m == MergeMode::kWeighted || m == MergeMode::kMlerp) fail(op, "mode must be sum, mean or amax");
  if (m == MergeMode::kAmax && weights) fail(op, "weights must be None in mode 'amax'");
}

template <typename Backend>
std::tuple<Tensor, Tensor> merge_by_label(const Tensor& x, const Tensor& labels, int64_t rows, const OptionalTensor& weights, int64_t mode,
                                          double epsilon) {
  const char* op = "merge_by_label";
  check_reduced(op, x, rows, mode, weights);
  typename Backend::Guard guard(x);
  MergeParams p;
  p.B = x.size(0), p.N = x.size(1), p.R = rows;
  p.mode = merge_mode(op, mode);
  if (p.mode == MergeMode::kMean) p.epsilon = static_cast<float>(epsilon);
  p.inverse = id_rows(op, "labels", labels, x, p.B, p.N, p.inverse_stride);
  return reduce_tokens<Backend>(op, p, x, weights);
}

template <typename Backend>
std::tuple<Tensor, Tensor> fuse_dropped(const Tensor& x, const Tensor& weights, const Tensor& index, bool normalize) {
  const char* op = "fuse_dropped";
  if (x.dim() < 2) fail(op, "x must be (B, N, ...), got shape ", shape_of(x));
  typename Backend::Guard guard(x);
  MergeParams p;
  p.B = x.size(0), p.N = x.size(1), p.R = 1, p.complement = true;
  p.mode = normalize ? MergeMode::kMean : MergeMode::kSum;
  p.inverse = id_rows(op, "index", index, x, p.B, -1, p.inverse_stride);
  p.K = index.size(1);
  return reduce_tokens<Backend>(op, p, x, weights);
}

// The gradient of the two above; `labels` is the index of fuse_dropped where `complement`. Unwanted gradients are empty.
template <typename Backend>
std::tuple<Tensor, Tensor> merge_by_label_backward(const Tensor& grad, const OptionalTensor& total_grad, const Tensor& x, const Tensor& out,
                                                   const Tensor& labels, bool complement, const OptionalTensor& weights, int64_t mode,
                                                   double epsilon, bool x_wanted, bool weights_wanted) {
  const char* op = "merge_by_label_backward";
  check_reduced(op, x, 0, mode, weights);
  typename Backend::Guard guard(x);
  MergeParams p;
  p.B = x.size(0), p.N = x.size(1), p.R = grad.size(1), p.complement = complement;
  p.mode = merge_mode(op, mode), p.epsilon = static_cast<float>(epsilon);
  check_grads(op, {grad, out}, {x, x}, p.R);
  p.inverse = id_rows(op, "labels", labels, x, p.B, complement ? -1 : p.N, p.inverse_stride);
  if (complement) p.K = labels.size(1);
  p.weights = token_floats(op, "weights", weights, x, p.B, p.N);
  p.total_grad = static_cast<const float*>(checked_dense(op, "total_grad", total_grad, x, ScalarType::Float, {p.B, p.R}));
  MergeTensor view = merge_view(op, x, false);
  view.grad = grad.const_data_ptr(), view.out = out.const_data_ptr();
  Tensor x_grad = allocate_rows<Backend>(x, x_wanted ? p.N : 0);
  Tensor weight_grad = allocate_like(x, {p.B, weights_wanted ? p.N : 0}, aoti_torch_dtype_float32());
  if (x_wanted) view.dst = x_grad.mutable_data_ptr();
  if (weights_wanted) p.weight_grad = static_cast<float*>(weight_grad.mutable_data_ptr());
  p.tensors[0] = view, p.num_tensors = 1;
  if (x_wanted || weights_wanted) raise(op, Backend::merge_grad(p, x));
  return {x_grad, weight_grad};
}

inline MergeParams pair_params(const char* op, const Tensor& x, const Tensor& source, const Tensor& row, int64_t rows) {
  if (x.dim() < 2) fail(op, "x must be (B, N, ...), got shape ", shape_of(x));
  if (rows < 0) fail(op, "rows must be at least 0, got ", rows);
  MergeParams p;
  p.B = x.size(0), p.rows = x.size(1), p.R = rows;
  p.from = id_rows(op, "source", source, x, p.B, -1, p.from_stride);
  p.N = source.size(1);
  p.inverse = id_rows(op, "row", row, x, p.B, p.N, p.inverse_stride);
  return p;
}

// out[row[e]] += weights[e] * x[source[e]], entries in order. Its gradient in x is itself, with source and row exchanged.
template <typename Backend>
Tensor sum_pairs(const Tensor& x, const Tensor& source, const Tensor& row, int64_t rows, const OptionalTensor& weights) {
  const char* op = "sum_pairs";
  typename Backend::Guard guard(x);
  MergeParams p = pair_params(op, x, source, row, rows);
  p.weights = token_floats(op, "weights", weights, x, p.B, p.N);
  MergeTensor view = merge_view(op, x, false);
  Tensor out = allocate_rows<Backend>(x, p.R);
  view.dst = out.mutable_data_ptr();
  p.tensors[0] = view, p.num_tensors = 1;
  raise(op, Backend::merge(p, x));
  return out;
}

// Of every pair, the sum over the channels of grad[row] * x[source]: the gradient of sum_pairs in its weights.
template <typename Backend>
Tensor pair_dots(const Tensor& grad, const Tensor& x, const Tensor& source, const Tensor& row) {
  const char* op = "pair_dots";
  typename Backend::Guard guard(x);
  if (grad.dim() < 2) fail(op, "grad must be (B, rows, ...), got shape ", shape_of(grad));
  MergeParams p = pair_params(op, x, source, row, grad.size(1));
  check_grads(op, {grad}, {x}, p.R);
  MergeTensor view = merge_view(op, x, false);
  view.grad = grad.const_data_ptr();
  Tensor out = allocate_like(x, {p.B, p.N}, aoti_torch_dtype_float32());
  p.weight_grad = static_cast<float*>(out.mutable_data_ptr());
  p.tensors[0] = view, p.num_tensors = 1;
  raise(op, Backend::merge_grad(p, x));
  return out;
}

}  // namespace tokensieve::bind

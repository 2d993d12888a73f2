// The copies of token rows, once for both back ends.
#pragma once

#include <vector>

#include "bind/arguments.h"
#include "select/gather.h"

namespace tokensieve::bind {

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

// Whether `bytes` at `begin` meet a token of rows [B, N, M, W] of which each batch row is taken for one stretch: out may stand between two.
inline bool meets(const char* begin, int64_t bytes, const GatherTensor& rows, int64_t B, int64_t N) {
  if (bytes == 0 || N == 0 || rows.segment_bytes == 0 || rows.segments == 0) return false;
  const int64_t extent = (N - 1) * rows.stride_n + (rows.segments - 1) * rows.stride_m + rows.segment_bytes;
  const char* first = static_cast<const char*>(rows.src);
  for (int64_t b = 0; b < B; ++b) {
    const char* row = first + b * rows.stride_b;
    if (row < begin + bytes && begin < row + extent) return true;
  }
  return false;
}

// A launch reads its inputs while it writes, so what it writes must be nothing that it, or a launch behind it, reads or writes.
inline void check_apart(const char* op, const std::vector<GatherTensor>& views, const GatherParams& p) {
  GatherTensor index;
  index.src = p.index, index.stride_b = p.index_stride * 8, index.stride_n = index.segment_bytes = 8;
  for (size_t i = 0; i < views.size(); ++i) {
    const char* begin = static_cast<const char*>(views[i].dst);
    const int64_t bytes = p.B * p.K * views[i].segments * views[i].segment_bytes;
    for (size_t j = 0; j < views.size(); ++j) {
      const char* other = static_cast<const char*>(views[j].dst);
      const int64_t other_bytes = p.B * p.K * views[j].segments * views[j].segment_bytes;
      if (meets(begin, bytes, views[j], p.B, p.N)) fail(op, "out[", i, "] must share no memory with tensors[", j, "], got one that does");
      if (j < i && begin < other + other_bytes && other < begin + bytes) {
        fail(op, "out[", i, "] must share no memory with out[", j, "], got one that does");
      }
    }
    if (meets(begin, bytes, index, p.B, p.K)) fail(op, "out[", i, "] must share no memory with index, got one that does");
  }
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
  const GatherParams p = index_params(op, index, tensors[0].size(0), tensors[0].size(1));
  const std::vector<GatherTensor> views = gather_views(op, tensors, out);
  check_apart(op, views, p);
  typename Backend::Guard guard(index);
  for_each_batch_of_tensors(p, views, [&](const GatherParams& batch) { raise(op, Backend::gather(batch, index)); });
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

}  // namespace tokensieve::bind

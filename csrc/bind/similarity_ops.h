// The similarity family, once for both back ends: check, allocate, fill parameters, call the launcher. No arithmetic.
#pragma once

#include <algorithm>
#include <tuple>

#include "bind/arguments.h"
#include "similarity/cosine.h"
#include "similarity/density.h"
#include "similarity/diverse.h"

namespace tokensieve::bind {

// A (B, N) bool mask over the tokens of `x` (B, N, C).
inline const uint8_t* token_mask(const char* op, const char* name, const OptionalTensor& mask, const Tensor& x, int64_t& stride) {
  if (!mask) return nullptr;
  check_same_device(op, name, *mask, x);
  if (mask->scalar_type() != ScalarType::Bool || mask->dim() != 2 || mask->size(0) != x.size(0) || mask->size(1) != x.size(1)) {
    fail(op, name, " must be bool (B, N) = (", x.size(0), ", ", x.size(1), "), got shape ", shape_of(*mask));
  }
  check_last_contiguous(op, name, *mask);
  stride = mask->stride(0);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

inline CosineParams cosine_params(const char* op, const Tensor& a, const Tensor& b, const OptionalTensor& candidates, bool exclude_self) {
  check_rank(op, "a", a, 3, "(B, M, C)");
  check_rank(op, "b", b, 3, "(B, N, C)");
  check_same_device(op, "b", b, a);
  CosineParams p;
  p.B = a.size(0), p.M = a.size(1), p.C = a.size(2), p.N = b.size(1);
  p.dtype = kernel_dtype(op, "a", a);
  if (kernel_dtype(op, "b", b) != p.dtype) fail(op, "b must have the dtype of a");
  if (b.size(0) != p.B || b.size(2) != p.C) fail(op, "b must be (B=", p.B, ", N, C=", p.C, "), got shape ", shape_of(b));
  if (exclude_self && p.M != p.N) fail(op, "exclude_self needs a and b of the same tokens, got M=", p.M, ", N=", p.N);
  check_last_contiguous(op, "a", a);
  check_last_contiguous(op, "b", b);
  for (int i = 0; i < 2; ++i) p.a_stride[i] = a.stride(i), p.b_stride[i] = b.stride(i);
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.candidates = token_mask(op, "candidates", candidates, b, p.candidates_stride);
  p.exclude_self = exclude_self;
  return p;
}

template <typename Backend>
std::tuple<Tensor, Tensor> cosine_match(const Tensor& a, const Tensor& b, int64_t k, bool largest, const OptionalTensor& candidates,
                                        bool exclude_self) {
  const char* op = "cosine_match";
  typename Backend::Guard guard(a);
  CosineParams p = cosine_params(op, a, b, candidates, exclude_self);
  if (k < 1 || k > kMaxNeighbours) fail(op, "k must be in [1, ", kMaxNeighbours, "], got ", k);
  p.T = k;
  p.largest = largest;
  Tensor value = allocate_like(a, {p.B, p.M, k}, aoti_torch_dtype_float32());
  Tensor index = allocate_like(a, {p.B, p.M, k}, aoti_torch_dtype_int64());
  p.value = static_cast<float*>(value.mutable_data_ptr());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  raise(op, Backend::cosine(p, a));
  return {value, index};
}

template <typename Backend>
Tensor cosine_scores(const Tensor& a, const Tensor& b, int64_t reduction, const OptionalTensor& candidates, bool exclude_self) {
  const char* op = "cosine_scores";
  typename Backend::Guard guard(a);
  CosineParams p = cosine_params(op, a, b, candidates, exclude_self);
  p.reduction = static_cast<CosineReduction>(reduction);
  const bool all = p.reduction == CosineReduction::kNone;
  if (!all && p.reduction != CosineReduction::kMean && p.reduction != CosineReduction::kSum && p.reduction != CosineReduction::kMax) {
    fail(op, "reduction must be none, mean, sum or max, got code ", reduction);
  }
  const int64_t sizes[3] = {p.B, p.M, p.N};
  Tensor value = allocate_like(a, sizes, all ? 3 : 2, aoti_torch_dtype_float32());
  Backend::allocated(value);
  p.value = static_cast<float*>(value.mutable_data_ptr());
  raise(op, Backend::cosine(p, a));
  return value;
}

template <typename Backend>
Tensor select_diverse(const Tensor& x, int64_t k, const OptionalTensor& candidates, const OptionalTensor& first, int64_t metric,
                      int64_t order) {
  const char* op = "select_diverse";
  typename Backend::Guard guard(x);
  check_rank(op, "x", x, 3, "(B, N, C)");
  check_last_contiguous(op, "x", x);
  DiverseParams p;
  p.B = x.size(0), p.N = x.size(1), p.C = x.size(2), p.K = k;
  if (k < 0 || k > p.N) fail(op, "k must be in [0, N=", p.N, "], got ", k);
  p.dtype = kernel_dtype(op, "x", x);
  p.x = x.const_data_ptr();
  for (int i = 0; i < 2; ++i) p.x_stride[i] = x.stride(i);
  p.candidates = token_mask(op, "candidates", candidates, x, p.candidates_stride);
  p.first = static_cast<const int64_t*>(checked_dense(op, "first", first, x, ScalarType::Long, {p.B}));
  p.metric = static_cast<DiverseMetric>(metric);
  p.order = static_cast<DiverseOrder>(order);
  Tensor index = allocate_like(x, {p.B, k}, aoti_torch_dtype_int64());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  raise(op, Backend::diverse(p, x));
  return index;
}

template <typename Backend>
std::tuple<Tensor, Tensor> knn_density(const Tensor& x, int64_t k, const OptionalTensor& noise, const OptionalTensor& mask) {
  const char* op = "knn_density";
  typename Backend::Guard guard(x);
  check_rank(op, "x", x, 3, "(B, N, C)");
  check_last_contiguous(op, "x", x);
  DensityParams p;
  p.B = x.size(0), p.N = x.size(1), p.C = x.size(2), p.k = k;
  if (k < 1 || k > std::max(p.N, int64_t{1})) fail(op, "k must be in [1, N=", p.N, "], got ", k);
  p.dtype = kernel_dtype(op, "x", x);
  p.x = x.const_data_ptr();
  for (int i = 0; i < 2; ++i) p.x_stride[i] = x.stride(i);
  p.noise = static_cast<const float*>(checked_dense(op, "noise", noise, x, ScalarType::Float, {p.B, p.N}));
  p.mask = token_mask(op, "mask", mask, x, p.mask_stride);
  Tensor density = allocate_like(x, {p.B, p.N}, aoti_torch_dtype_float32());
  Tensor distance = allocate_like(x, {p.B, p.N}, aoti_torch_dtype_float32());
  p.density = static_cast<float*>(density.mutable_data_ptr());
  p.distance = static_cast<float*>(distance.mutable_data_ptr());
  raise(op, Backend::density(p, x));
  return {density, distance};
}

template <typename Backend>
Tensor nearest_center(const Tensor& x, const Tensor& centers) {
  const char* op = "nearest_center";
  typename Backend::Guard guard(x);
  check_rank(op, "x", x, 3, "(B, N, C)");
  check_last_contiguous(op, "x", x);
  NearestParams p;
  p.B = x.size(0), p.N = x.size(1), p.C = x.size(2);
  check_rank(op, "centers", centers, 2, "(B, K)");
  p.K = centers.size(1);
  p.dtype = kernel_dtype(op, "x", x);
  p.x = x.const_data_ptr();
  for (int i = 0; i < 2; ++i) p.x_stride[i] = x.stride(i);
  p.centers = static_cast<const int64_t*>(checked_dense(op, "centers", centers, x, ScalarType::Long, {p.B, p.K}));
  Tensor labels = allocate_like(x, {p.B, p.N}, aoti_torch_dtype_int64());
  p.labels = static_cast<int64_t*>(labels.mutable_data_ptr());
  raise(op, Backend::nearest(p, x));
  return labels;
}

}  // namespace tokensieve::bind

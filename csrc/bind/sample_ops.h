// select_samples, once for both back ends.
#pragma once

#include <tuple>

#include "bind/select_ops.h"
#include "select/samples.h"

namespace tokensieve::bind {

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> select_samples(const Tensor& scores, int64_t count, const OptionalTensor& points, int64_t capacity,
                                                  const OptionalTensor& candidates) {
  const char* op = "select_samples";
  typename Backend::Guard guard(scores);
  SamplesParams p;
  p.rows = selection_rows(op, scores, candidates, std::nullopt, 0);
  const int64_t B = p.rows.B;
  if (count < 0) fail(op, "points must be at least 0, got ", count);
  if (capacity < 0) fail(op, "capacity must be at least 0, got ", capacity);
  p.R = count, p.capacity = capacity;
  p.points = static_cast<const float*>(checked_dense(op, "points", points, scores, ScalarType::Float, {B, count}));
  Tensor index = allocate_like(scores, {B, capacity}, aoti_torch_dtype_int64());
  Tensor counts = allocate_like(scores, {B}, aoti_torch_dtype_int64()), overflow = allocate_like(scores, {B}, aoti_torch_dtype_bool());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  p.overflow = static_cast<bool*>(overflow.mutable_data_ptr());
  raise(op, Backend::samples(p, scores));
  return {index, counts, overflow};
}

}  // namespace tokensieve::bind

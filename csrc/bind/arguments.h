// Arguments that many ops take, checked and turned into pointers.
#pragma once

#include <optional>
#include <string>

#include "bind/tensors.h"
#include "core/status.h"

namespace tokensieve::bind {

using OptionalTensor = std::optional<Tensor>;

inline void raise(const char* op, const Status& status) {
  if (!status.ok()) fail(op, status.message);
}

inline const void* checked_dense(const char* op, const char* name, const OptionalTensor& t, const Tensor& like, ScalarType dtype,
                                 const int64_t* sizes, int64_t rank) {
  if (!t) return nullptr;
  check_same_device(op, name, *t, like);
  bool same = t->scalar_type() == dtype && t->dim() == rank && t->is_contiguous();
  for (int64_t i = 0; same && i < rank; ++i) same = t->size(i) == sizes[i];
  if (!same) fail(op, name, " has the wrong dtype or shape, or is not contiguous, got shape ", shape_of(*t));
  return t->const_data_ptr();
}

inline const void* checked_dense(const char* op, const char* name, const OptionalTensor& t, const Tensor& like, ScalarType dtype,
                                 std::initializer_list<int64_t> sizes) {
  return checked_dense(op, name, t, like, dtype, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

inline const uint8_t* mask_rows(const char* op, const char* name, const OptionalTensor& mask, const Tensor& scores, int64_t& stride) {
  if (!mask) return nullptr;
  check_same_device(op, name, *mask, scores);
  if (mask->scalar_type() != ScalarType::Bool || mask->dim() != 2 || mask->size(0) != scores.size(0) || mask->size(1) != scores.size(1)) {
    fail(op, name, " must be bool of the shape of scores ", shape_of(scores), ", got shape ", shape_of(*mask));
  }
  check_last_contiguous(op, name, *mask);
  stride = mask->stride(0);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

}  // namespace tokensieve::bind

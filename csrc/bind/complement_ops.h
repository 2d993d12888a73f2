// complement_index, once for both back ends.
#pragma once

#include "bind/arguments.h"
#include "select/complement.h"

namespace tokensieve::bind {

template <typename Backend>
Tensor complement_index(const Tensor& index, int64_t N, int64_t capacity) {
  const char* op = "complement_index";
  typename Backend::Guard guard(index);
  check_rank(op, "index", index, 2, "(B, K)");
  if (index.scalar_type() != ScalarType::Long) fail(op, "index must be int64");
  check_last_contiguous(op, "index", index);
  if (N < 0) fail(op, "N must be at least 0, got ", N);
  if (capacity < 0) fail(op, "capacity must be at least 0, got ", capacity);
  ComplementParams p;
  p.B = index.size(0), p.K = index.size(1), p.N = N, p.capacity = capacity;
  p.index = static_cast<const int64_t*>(index.const_data_ptr());
  p.index_stride = index.stride(0);
  Tensor out = allocate_like(index, {p.B, capacity}, aoti_torch_dtype_int64());
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  raise(op, Backend::complement(p, index));
  return out;
}

}  // namespace tokensieve::bind

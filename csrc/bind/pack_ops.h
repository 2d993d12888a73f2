// pack_index, once for both back ends.
#pragma once

#include <tuple>

#include "bind/gather_ops.h"
#include "select/pack.h"

namespace tokensieve::bind {

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_index(const Tensor& index, int64_t N, int64_t capacity) {
  const char* op = "pack_tokens";
  check_rank(op, "index", index, 2, "(B, K)");
  typename Backend::Guard guard(index);
  const GatherParams g = index_params(op, index, index.size(0), N);
  if (capacity < 0 || capacity >= int64_t{1} << 31) fail(op, "capacity must be in [0, 2^31), got ", capacity);
  PackParams p;
  p.B = g.B, p.N = g.N, p.K = g.K, p.capacity = capacity;
  p.index = g.index, p.index_stride = g.index_stride;
  Tensor rows = allocate_like(index, {capacity}, aoti_torch_dtype_int64());
  Tensor slots = allocate_like(index, {p.B, p.K}, aoti_torch_dtype_int64());
  Tensor cu_seqlens = allocate_like(index, {p.B + 1}, aoti_torch_dtype_int32());
  Tensor total = allocate_like(index, {}, aoti_torch_dtype_int64());
  p.rows = static_cast<int64_t*>(rows.mutable_data_ptr());
  p.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  p.cu_seqlens = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  p.total = static_cast<int64_t*>(total.mutable_data_ptr());
  raise(op, Backend::pack(p, index));
  return {rows, slots, cu_seqlens, total};
}

}  // namespace tokensieve::bind

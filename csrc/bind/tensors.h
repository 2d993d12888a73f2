// Tensor -> kernel parameters: dtype codes, allocation through the C shim (the boxed dispatcher call costs 1 us more), byte views.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <vector>

#include "bind/checks.h"
#include "core/dtype.h"
#include "select/gather.h"

namespace tokensieve::bind {

using torch::headeronly::ScalarType;

inline DType kernel_dtype(const char* op, const char* name, const Tensor& t, bool allow_bool = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Bool:
      if (allow_bool) return DType::kBool;
      [[fallthrough]];
    default:
      fail(op, name, " must be float32, float16 or bfloat16", allow_bool ? " or bool" : "");
  }
}

inline Tensor allocate_like(const Tensor& like, const int64_t* sizes, int64_t rank, int32_t dtype) {
  int64_t strides[16];
  if (rank > 16) throw std::runtime_error("tokensieve: tensors of more than 16 dimensions are not supported");
  int64_t running = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = running;
    running *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  return allocate_like(like, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline int32_t raw_dtype(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// Trailing dimensions (2..) of a [B, N, ...] tensor as M segments of W contiguous bytes.
inline GatherTensor byte_rows(const char* op, const Tensor& t) {
  const int64_t element = static_cast<int64_t>(t.element_size());
  GatherTensor out;
  out.stride_b = t.stride(0) * element;
  out.stride_n = t.stride(1) * element;
  int64_t dim = t.dim() - 1, width = 1;
  for (; dim >= 2 && (t.size(dim) == 1 || t.stride(dim) == width); --dim) width *= t.size(dim);
  int64_t segments = 1, stride = 0;
  for (; dim >= 2; --dim) {
    if (t.size(dim) == 1) continue;
    if (segments == 1) {
      stride = t.stride(dim);
    } else if (t.stride(dim) != stride * segments) {
      fail(op, "tensors: the dimensions after (B, N) must be at most one strided axis over contiguous elements, got shape ", shape_of(t),
           "; call .contiguous()");
    }
    segments *= t.size(dim);
  }
  out.segments = segments;
  out.segment_bytes = width * element;
  out.stride_m = stride * element;
  return out;
}

}  // namespace tokensieve::bind

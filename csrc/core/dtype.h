// Element types that the kernels read. Accumulation and scores are always float32.
#pragma once

#include <cstdint>

namespace tokensieve {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kBool };

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kBool ? 1 : 2; }

}  // namespace tokensieve

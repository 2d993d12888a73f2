// Vectors of token rows in float32 (integers as they are), for the kernels that merge. See merge_kernel.cuh.
#pragma once

#include <type_traits>

#include "device/simt.h"
#include "merge/merge_args.h"

namespace tokensieve {
namespace merge {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ int32_t widen(int32_t x) { return x; }
__device__ __forceinline__ int64_t widen(int64_t x) { return x; }
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ void narrow(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(int32_t& to, int32_t x) { to = x; }
__device__ __forceinline__ void narrow(int64_t& to, int64_t x) { to = x; }

template <typename T>
using Sum = decltype(widen(T{}));

// kCount elements that are loaded at once, and their sums.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T x[kCount];
};
template <typename T, int kCount>
struct Sums {
  Sum<T> x[kCount];
};

// The u-th vector of token n of a tensor.
template <typename V>
__device__ __forceinline__ const V& unit_of(const MergeArg& t, int64_t b, int n, int u) {
  const char* const row = t.src + b * t.b + n * t.n;
  if (t.segments == 1) return reinterpret_cast<const V*>(row)[u];
  return reinterpret_cast<const V*>(row + u / t.units * t.m)[u % t.units];
}

template <typename T, int kCount>
__device__ __forceinline__ void put(char* row, int u, const Sums<T, kCount>& sums) {
  Pack<T, kCount> out;
#pragma unroll
  for (int j = 0; j < kCount; ++j) narrow(out.x[j], sums.x[j]);
  reinterpret_cast<Pack<T, kCount>*>(row)[u] = out;
}

// sums (+)= weight * value, or the larger; NaN wins, of two zeros the later, as on the CPU. Sums of integers wrap around.
template <bool kMax, typename T, int kCount>
__device__ __forceinline__ void accumulate(Sums<T, kCount>& sums, const Pack<T, kCount>& value, float weight, bool first) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const Sum<T> x = widen(value.x[j]);
    if constexpr (kMax) {
      if (first || x >= sums.x[j] || x != x) sums.x[j] = sums.x[j] != sums.x[j] && !first ? sums.x[j] : x;
    } else if constexpr (std::is_same_v<Sum<T>, float>) {
      sums.x[j] = first ? __fmul_rn(weight, x) : __fmaf_rn(weight, x, sums.x[j]);
    } else {
      using U = std::make_unsigned_t<T>;
      sums.x[j] = first ? x : static_cast<T>(static_cast<U>(sums.x[j]) + static_cast<U>(x));
    }
  }
}

// Two partial results of one row.
template <bool kMax, typename T, int kCount>
__device__ __forceinline__ void combine(Sums<T, kCount>& sums, const Sums<T, kCount>& other) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if constexpr (kMax) {
      if (other.x[j] >= sums.x[j] || (other.x[j] != other.x[j] && sums.x[j] == sums.x[j])) sums.x[j] = other.x[j];
    } else if constexpr (std::is_same_v<Sum<T>, float>) {
      sums.x[j] += other.x[j];
    } else {
      using U = std::make_unsigned_t<T>;
      sums.x[j] = static_cast<T>(static_cast<U>(sums.x[j]) + static_cast<U>(other.x[j]));
    }
  }
}

// x / divisor, rounded to nearest (Markstein): a reciprocal per row and three instructions a value, where the division is a call.
struct Divisor {
  float value, reciprocal, boost;
  __device__ explicit Divisor(float divisor, float power = 1.0f) {  // in the body: nvcc gives the host compiler an initialiser list to read
    boost = power;
    value = divisor * power;
    reciprocal = __frcp_rn(value);
  }
  __device__ float under(float dividend) const {
    const float x = dividend * boost, q = __fmul_rn(x, reciprocal), rest = __fmaf_rn(-q, value, x);
    return rest == rest ? __fmaf_rn(rest, reciprocal, q) : q;  // an infinite x stays infinite
  }
};

// Below 2^-128 (weights that underflowed) the reciprocal would be infinite: both sides are then 2^64 times as large.
__device__ __forceinline__ Divisor sum_of_weights(float sum) { return Divisor(sum, fabsf(sum) < 0x1p-100f ? 0x1p64f : 1.0f); }

template <typename T, int kCount>
__device__ __forceinline__ void finish(Sums<T, kCount>& sums, const Divisor& divisor, float scale) {
  if constexpr (std::is_same_v<Sum<T>, float>) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums.x[j] = divisor.value == 0.0f ? 0.0f : __fmul_rn(divisor.under(sums.x[j]), scale);
  }
}

// Runs call(Type, Count) with the element type and the elements of a vector.
template <typename T, int kCount>
struct Tag {
  using Type = T;
  static constexpr int kElements = kCount;
};
template <typename T, typename Call>
__device__ __forceinline__ void with_width(const MergeArg& t, Call&& call) {
  if (t.vector == 16) {
    call(Tag<T, 16 / sizeof(T)>());
  } else {
    call(Tag<T, 1>());
  }
}
template <bool kIntegers, typename Call>
__device__ __forceinline__ void with_type(const MergeArg& t, Call&& call) {
  switch (t.type) {
    case MergeType::kFloat32:
      return with_width<float>(t, call);
    case MergeType::kFloat16:
      return with_width<__half>(t, call);
    case MergeType::kBFloat16:
      return with_width<__nv_bfloat16>(t, call);
    case MergeType::kInt32:
      if constexpr (kIntegers) with_width<int32_t>(t, call);
      return;
    default:
      if constexpr (kIntegers) with_width<int64_t>(t, call);
      return;
  }
}

// Norms of a row's tokens on a warp: the largest (the first in the row's order wins) and that of its first token.
struct Norms {
  float largest, own;
  int at;                                                                                 // position in the list
  __device__ float scale() const { return own > 0.0f ? __fdiv_rn(largest, own) : 1.0f; }  // a zero destination: the plain mean
};

template <typename T, int kCount>
__device__ __forceinline__ float norm_of(const MergeArg& t, int64_t b, int n, int lane) {
  float sum = 0.0f;
  for (int u = lane; u < t.segments * t.units; u += 32) {
    const Pack<T, kCount> value = unit_of<Pack<T, kCount>>(t, b, n, u);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum = __fmaf_rn(widen(value.x[j]), widen(value.x[j]), sum);
  }
  return __fsqrt_rn(simt::warp::sum(sum));
}

template <typename T, int kCount>
__device__ __forceinline__ Norms norms_of(const MergeArg& t, int64_t b, const int* list, int length, int lane) {
  Norms norms = {0.0f, norm_of<T, kCount>(t, b, list[0], lane), 0};
  norms.largest = norms.own;
  for (int i = 1; i < length; ++i) {
    const float norm = norm_of<T, kCount>(t, b, list[i], lane);
    if (norm > norms.largest) norms.largest = norm, norms.at = i;
  }
  return norms;
}

}  // namespace merge
}  // namespace tokensieve

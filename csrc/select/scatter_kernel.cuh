// scatter_tokens and the gradient of its addition.
//
// In: up to 8 pairs base [B, N, M, W bytes], values [B, K, M, W], both strided; index int64 [B, K]; weights float32 [B, K].
// Out: [B, N, M, W] contiguous. Algorithm: as scatter_rows of gather_kernel.cuh: a block owns a slice of the output tokens of one batch row,
//   inverts the list into shared memory (which value each token of the slice takes, -1 = none), then writes every token once for all
//   tensors, from the base, from the values, or as base + weight * value in float32.
// The gradient: a block owns one value row, writes weight * grad[index] and sums value * grad[index]: each thread over its vectors, tensor by
//   tensor, then lanes by a fixed tree, then warps in order.
// Work: bytes = 2 B N sum(M W) (+ B K sum(M W) for an addition); gradient 3 B K sum(M W). Floor on H200: 2944 x 4096 bf16 = 48 MB, 10 us.
// Bound by HBM. Launch: grid.x = B x slices, 256 threads; gradient B x K blocks of 128. Deterministic: plain stores, no atomics.
// Limits: a token below 2^31 bytes, N and K below 2^31; every block reads 8 K bytes of index (L2). Indices of a row must be unique.
#pragma once

#include "device/simt.h"
#include "select/scatter_args.h"

namespace tokensieve {
namespace select {

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// kCount elements that are loaded at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T x[kCount];
};

// The u-th vector of a token on one side.
template <typename V>
__device__ __forceinline__ const V& unit(const char* row, int64_t stride_m, const ScatterArg& t, int u) {
  if (t.segments == 1) return reinterpret_cast<const V*>(row)[u];
  return reinterpret_cast<const V*>(row + u / t.units * stride_m)[u % t.units];
}

__device__ __forceinline__ const char* row_of(const ScatterSide& s, int64_t b, int64_t n) { return s.at + b * s.b + n * s.n; }

struct Slots {
  int64_t b;
  int begin, count;
};

template <typename V>
__device__ __forceinline__ void replace_as(const ScatterArgs& a, const ScatterArg& t, const Slots& s, const int* source) {
  constexpr int kUnroll = 4;
  const int lane = static_cast<int>(threadIdx.x) & (t.lanes - 1), group = static_cast<int>(threadIdx.x) / t.lanes;
  const int groups = static_cast<int>(blockDim.x) / t.lanes, units = t.segments * t.units;
  for (int i = group; group < groups && i < s.count; i += groups) {  // threads beyond the last whole group have nothing to do
    const int k = source[i];
    const ScatterSide& side = k < 0 ? t.base : t.value;
    const char* const row = row_of(side, s.b, k < 0 ? s.begin + i : k);
    V* const dst = reinterpret_cast<V*>(t.dst + (s.b * a.N + s.begin + i) * t.dst_row);
    for (int u0 = lane; u0 < units; u0 += kUnroll * t.lanes) {
      V value[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) value[j] = u0 + j * t.lanes < units ? unit<V>(row, side.m, t, u0 + j * t.lanes) : V{};
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (u0 + j * t.lanes < units) dst[u0 + j * t.lanes] = value[j];
      }
    }
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void add_as(const ScatterArgs& a, const ScatterArg& t, const Slots& s, const int* source) {
  using V = Pack<T, kCount>;
  const int lane = static_cast<int>(threadIdx.x) & (t.lanes - 1), group = static_cast<int>(threadIdx.x) / t.lanes;
  const int groups = static_cast<int>(blockDim.x) / t.lanes, units = t.segments * t.units;
  for (int i = group; group < groups && i < s.count; i += groups) {  // threads beyond the last whole group have nothing to do
    const int k = source[i];
    const char* const base = row_of(t.base, s.b, s.begin + i);
    const char* const value = row_of(t.value, s.b, k < 0 ? 0 : k);
    const float weight = k >= 0 && a.weights != nullptr ? a.weights[s.b * a.K + k] : 1.0f;
    V* const dst = reinterpret_cast<V*>(t.dst + (s.b * a.N + s.begin + i) * t.dst_row);
    for (int u = lane; u < units; u += t.lanes) {
      V sum = unit<V>(base, t.base.m, t, u);
      if (k >= 0) {
        const V other = unit<V>(value, t.value.m, t, u);
#pragma unroll
        for (int j = 0; j < kCount; ++j) from_float(sum.x[j], __fmaf_rn(weight, as_float(other.x[j]), as_float(sum.x[j])));
      }
      dst[u] = sum;
    }
  }
}

template <typename T>
__device__ __forceinline__ void add_any(const ScatterArgs& a, const ScatterArg& t, const Slots& s, const int* source) {
  if (t.vector == 16) {
    add_as<T, 16 / sizeof(T)>(a, t, s, source);
  } else {
    add_as<T, 1>(a, t, s, source);
  }
}

template <bool kAdd>
__device__ __forceinline__ void scatter_slots(const ScatterArgs& a, const ScatterArg& t, const Slots& s, const int* source) {
  if constexpr (kAdd) {
    if (t.dtype == DType::kFloat32) {
      add_any<float>(a, t, s, source);
    } else if (t.dtype == DType::kFloat16) {
      add_any<__half>(a, t, s, source);
    } else {
      add_any<__nv_bfloat16>(a, t, s, source);
    }
  } else if (t.vector == 16) {
    replace_as<uint4>(a, t, s, source);
  } else if (t.vector == 8) {
    replace_as<uint2>(a, t, s, source);
  } else if (t.vector == 4) {
    replace_as<uint32_t>(a, t, s, source);
  } else if (t.vector == 2) {
    replace_as<uint16_t>(a, t, s, source);
  } else {
    replace_as<uint8_t>(a, t, s, source);
  }
}

template <bool kAdd>
__global__ void __launch_bounds__(256) scatter_kernel(const ScatterArgs a) {
  SIMT_DYN_SHARED(int, source);
  Slots s;
  s.b = blockIdx.x / static_cast<unsigned>(a.blocks_per_row);
  const int64_t begin = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(a.blocks_per_row)) * a.slots_per_block;
  const int64_t left = a.N - begin;
  s.begin = static_cast<int>(begin < a.N ? begin : a.N);
  s.count = static_cast<int>(left <= 0 ? 0 : left < a.slots_per_block ? left : a.slots_per_block);
  for (int i = static_cast<int>(threadIdx.x); i < s.count; i += static_cast<int>(blockDim.x)) source[i] = -1;
  __syncthreads();
  const int64_t* const index = a.index + s.b * a.index_stride;
  for (int k = static_cast<int>(threadIdx.x); k < a.K; k += static_cast<int>(blockDim.x)) {
    const int64_t at = index[k] - s.begin;
    if (at >= 0 && at < s.count) source[at] = k;
  }
  __syncthreads();
  for (int i = 0; i < a.num_tensors; ++i) scatter_slots<kAdd>(a, a.tensors[i], s, source);
}

// ---- gradient of the addition ------------------------------------------------------------------------------------------

constexpr int kGradThreads = 128;

template <typename T, int kCount>
__device__ __forceinline__ float grad_as(const ScatterArgs& a, const ScatterArg& t, int64_t b, int64_t k, int64_t n, float weight,
                                         float sum) {
  using V = Pack<T, kCount>;
  const int units = t.segments * t.units;
  const char* const grad = row_of(t.base, b, n);
  const char* const value = row_of(t.value, b, k);
  V* const dst = reinterpret_cast<V*>(t.dst + (t.dst != nullptr ? (b * a.K + k) * t.dst_row : 0));
  for (int u = static_cast<int>(threadIdx.x); u < units; u += kGradThreads) {
    const V g = unit<V>(grad, t.base.m, t, u);
    if (a.weight_grad != nullptr) {
      const V v = unit<V>(value, t.value.m, t, u);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum = __fmaf_rn(as_float(g.x[j]), as_float(v.x[j]), sum);
    }
    if (dst != nullptr) {
      V out;
#pragma unroll
      for (int j = 0; j < kCount; ++j) from_float(out.x[j], weight * as_float(g.x[j]));
      dst[u] = out;
    }
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ float grad_any(const ScatterArgs& a, const ScatterArg& t, int64_t b, int64_t k, int64_t n, float weight,
                                          float sum) {
  return t.vector == 16 ? grad_as<T, 16 / sizeof(T)>(a, t, b, k, n, weight, sum) : grad_as<T, 1>(a, t, b, k, n, weight, sum);
}

__device__ __forceinline__ void zero_row(char* dst, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes / 2; i += kGradThreads) reinterpret_cast<uint16_t*>(dst)[i] = 0;
}

__global__ void __launch_bounds__(kGradThreads) scatter_grad_kernel(const ScatterArgs a) {
  SIMT_SHARED(float, warp_sum, [kGradThreads / 32]);
  const int64_t b = blockIdx.x / a.K, k = blockIdx.x % a.K;
  const int64_t n = a.index[b * a.index_stride + k];
  const bool used = n >= 0 && n < a.N;
  const float weight = a.weights != nullptr ? a.weights[b * a.K + k] : 1.0f;
  float sum = 0.0f;
  for (int i = 0; i < a.num_tensors; ++i) {
    const ScatterArg& t = a.tensors[i];
    if (!used) {
      if (t.dst != nullptr) zero_row(t.dst + (b * a.K + k) * t.dst_row, t.dst_row);
    } else if (t.dtype == DType::kFloat32) {
      sum = grad_any<float>(a, t, b, k, n, weight, sum);
    } else if (t.dtype == DType::kFloat16) {
      sum = grad_any<__half>(a, t, b, k, n, weight, sum);
    } else {
      sum = grad_any<__nv_bfloat16>(a, t, b, k, n, weight, sum);
    }
  }
  if (a.weight_grad == nullptr) return;
  sum = simt::warp::sum(sum);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = warp_sum[0];
    for (int w = 1; w < kGradThreads / 32; ++w) total += warp_sum[w];
    float& out = a.weight_grad[b * a.K + k];
    out = a.add_to_weight_grad ? out + total : total;
  }
}

}  // namespace select
}  // namespace tokensieve

// Gradient of attention_scores on CUDA: grad of the scores' shape -> query_grad [B, H, L, D], key_grad [B, Hkv, N, D]; score_grad.h.
//
// Algorithm, three launches, the steps of score_grad_cpu.cpp:
//   terms  (b, key head, chunk of 64 keys): per row of the group a warp a key: s, u = p g and p; then threads over D: sum u k and sum p k of
//          the chunk (which is in L1 by now); u and p go to the workspace.
//   query  (row): e = sum of u over the chunks; dq = scale * (sum u k - e sum p k), chunks in order.
//   key    (b, key head, 64 keys): dk = scale * sum over the group's rows of (u - e p) q, threads over (key, d).
// Work: keys once from memory, 8 bytes a row and key written and read, key_grad written. Floor on H200, CLS row of CLIP-L (577 x 16 x 64 bf16,
//   2.4 MB): three launches (6 us). Bound by launches; by the L1 reads of the keys from about 8 rows a group on.
// Launch: three blocks an SM in the first launch: 80 registers, at most 8 spilled bytes on sm_80, none on sm_90a.
// Deterministic: fixed trees and orders, no atomics. Limits: meant for few rows; B Hkv chunks below 2^31.
#pragma once

#include <type_traits>

#include "score/score_device.cuh"
#include "score/score_grad_layout.h"

namespace tokensieve {
namespace score {

constexpr int kGradChunkKeys = 64, kGradBlock = 256;

struct GradArgs {
  ScoreGradParams g;
  GradLayout at;
};

template <typename T>
__device__ __forceinline__ float grad_float(const T* x, int64_t i) {
  if constexpr (sizeof(T) == 4) {
    return x[i];
  } else if constexpr (std::is_same<T, __half>::value) {
    return __half2float(x[i]);
  } else {
    return __bfloat162float(x[i]);
  }
}
template <typename T>
__device__ __forceinline__ void grad_store(T* x, int64_t i, float value) {
  if constexpr (sizeof(T) == 4) {
    x[i] = value;
  } else if constexpr (std::is_same<T, __half>::value) {
    x[i] = __float2half_rn(value);
  } else {
    x[i] = __float2bfloat16_rn(value);
  }
}

__device__ inline float grad_row_weight(const ScoreParams& p, int b, int64_t l) {
  return p.row_weights != nullptr && p.query_reduction != Reduction::kNone ? p.row_weights[b * p.L + l] : 1.0f;
}

// What a score's gradient is multiplied by on its way to row l of head h; "visible mean" still divides by the key's share.
__device__ inline float grad_factor(const ScoreParams& p, int b, int64_t h, int64_t l) {
  float factor = grad_row_weight(p, b, l);
  if (p.query_reduction == Reduction::kMean) {
    float divisor = 0;
    for (int64_t i = 0; i < p.L; ++i) {
      const bool unused = p.row_weights == nullptr && p.query_positions != nullptr && p.query_positions[b * p.L + i] < 0;
      divisor += unused ? 0.0f : grad_row_weight(p, b, i);
    }
    factor = divide_or_zero(factor, divisor);
  }
  if (p.head_reduction == Reduction::kNone) return factor;
  const float weight = head_weight(p, b, h);
  return weight == 0.0f ? 0.0f : factor * divide_or_zero(weight, head_divisor(p, b));
}

__device__ inline float visible_share(const ScoreParams& p, int b, int64_t h, int64_t n) {
  float share = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    const bool hidden = n >= row_end(p, b, l) || (p.bias != nullptr && load_bias(p, bias_offset(p, b, h, l, n)) == -infinity());
    share += hidden ? 0.0f : grad_row_weight(p, b, l);
  }
  return share;
}

struct Term {
  float u, p;
};

// u and p of one row and key from their dot product.
__device__ inline Term grad_term(const ScoreGradParams& g, int b, int64_t h, int64_t l, int64_t n, float factor, float dot) {
  const ScoreParams& p = g.forward;
  if (n >= row_end(p, b, l)) return {0.0f, 0.0f};
  const float bias = p.bias == nullptr ? 0.0f : load_bias(p, bias_offset(p, b, h, l, n));
  const float s = p.bias == nullptr || p.bias_dtype == DType::kBool ? dot * p.scale : fmaf(dot, p.scale, bias);
  const float lse = p.lse_in[(b * p.H + h) * p.L + l];
  const bool softmax = p.activation == Activation::kSoftmax;
  if (bias == -infinity() || s == -infinity() || (softmax && lse == -infinity())) return {0.0f, 0.0f};
  Term t;
  t.p = lse == -infinity() ? 0.0f : expf(s - lse);
  float slope = t.p;
  if (p.activation == Activation::kLogit) slope = 1.0f;
  if (p.activation == Activation::kSigmoid) slope = activate(p, s) * (1.0f - activate(p, s));
  const int64_t R = p.range_end - p.range_begin, heads = p.head_reduction == Reduction::kNone ? p.H : 1;
  const int64_t rows = p.query_reduction == Reduction::kNone ? p.L : 1, row = (b * heads + (heads > 1 ? h : 0)) * rows + (rows > 1 ? l : 0);
  const bool inside = n >= p.range_begin && n < p.range_end;
  float from = inside ? factor * g.grad[row * R + n - p.range_begin] : 0.0f;
  if (inside && p.query_reduction == Reduction::kVisibleMean) from = divide_or_zero(from, visible_share(p, b, h, n));
  t.u = slope * from;
  return t;
}

// The 64 keys of one key head that a block of the first launch owns.
template <typename T>
struct GradChunk {
  int64_t head, index, first;  // b * Hkv + key head; of num_chunks; the first key
  int b, keys;
  const T* base;  // of the first key

  __device__ __forceinline__ explicit GradChunk(const GradArgs& a) {
    const ScoreParams& p = a.g.forward;
    head = blockIdx.x / a.at.num_chunks, index = blockIdx.x % a.at.num_chunks;
    b = static_cast<int>(head / p.Hkv);
    first = a.at.key_begin + index * kGradChunkKeys;
    const int64_t left = a.at.key_end - first;
    keys = static_cast<int>(left < kGradChunkKeys ? left : kGradChunkKeys);
    base = static_cast<const T*>(p.key) + b * p.key_stride[0] + head % p.Hkv * p.key_stride[1] + first * p.key_stride[2];
  }
};

// u and p of the row's dot products with the chunk, a warp a key: to shared memory and the workspace. Zeros for keys past the end.
template <typename T>
__device__ inline void chunk_terms(const GradArgs& a, const GradChunk<T>& c, int64_t row, int64_t h, int64_t l, const float* query,
                                   float* u, float* mass) {
  const ScoreParams& p = a.g.forward;
  float* const work = static_cast<float*>(a.g.workspace);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float factor = grad_factor(p, c.b, h, l);
#pragma unroll 1
  for (int n = static_cast<int>(threadIdx.x) / 32; n < kGradChunkKeys; n += kGradBlock / 32) {
    Term t = {0.0f, 0.0f};
    if (n < c.keys) {
      float dot = 0;
      for (int64_t d = lane; d < p.D; d += 32) dot = fmaf(query[d], grad_float(c.base + n * p.key_stride[2], d), dot);
      dot = simt::warp::sum(dot);
      t = grad_term(a.g, c.b, h, l, c.first + n, factor, dot);
    }
    if (lane == 0) {
      u[n] = t.u;
      mass[n] = t.p;
      work[a.at.u + row * a.at.stride + c.index * kGradChunkKeys + n] = t.u;
      if (a.at.with_p) work[a.at.p + row * a.at.stride + c.index * kGradChunkKeys + n] = t.p;
    }
  }
}

// Sums of u, u k and p k over the chunk to the workspace: `width` threads share the dimensions, kGradBlock / width parts the keys.
template <typename T>
__device__ inline void chunk_sums(const GradArgs& a, const GradChunk<T>& c, int64_t row, const float* u, const float* mass, float* part_u,
                                  float* part_p, int width) {
  const ScoreParams& p = a.g.forward;
  const int tid = static_cast<int>(threadIdx.x);
  float* const sums = static_cast<float*>(a.g.workspace) + a.at.sums + (row * a.at.num_chunks + c.index) * (2 * p.D + 1);
  if (tid < 32) {
    const float total = simt::warp::sum(u[tid] + u[tid + 32]);
    if (tid == 0) sums[2 * p.D] = total;
  }
  const int parts = kGradBlock / width, part = tid / width;
#pragma unroll 1
  for (int64_t first = 0; first < p.D; first += width) {
    const int64_t d = first + tid % width;
    float su = 0, sp = 0;
    for (int n = part; n < c.keys && d < p.D; n += parts) {
      const float k = grad_float(c.base + n * p.key_stride[2], d);
      su = fmaf(u[n], k, su);
      sp = fmaf(mass[n], k, sp);
    }
    part_u[tid] = su;
    part_p[tid] = sp;
    __syncthreads();
    if (part == 0 && d < p.D) {
      for (int i = 1; i < parts; ++i) su += part_u[tid + i * width], sp += part_p[tid + i * width];
      sums[d] = su;
      sums[p.D + d] = sp;
    }  // no barrier: where D takes several turns there is one part, and between rows there are two barriers
  }
}

template <typename T>
__global__ void __launch_bounds__(kGradBlock, 3) score_grad_terms_kernel(const GradArgs a) {
  SIMT_DYN_SHARED(float, query);
  SIMT_SHARED(float, u, [kGradChunkKeys]);
  SIMT_SHARED(float, mass, [kGradChunkKeys]);
  SIMT_SHARED(float, part_u, [kGradBlock]);
  SIMT_SHARED(float, part_p, [kGradBlock]);
  const ScoreParams& p = a.g.forward;
  const GradChunk<T> chunk(a);
  const int64_t group = p.H / p.Hkv;
  int width = 32;  // threads that share the dimensions of chunk_sums
  while (width < kGradBlock && width < p.D) width *= 2;
  for (int64_t r = 0; r < group * p.L; ++r) {
    const int64_t h = chunk.head % p.Hkv * group + r / p.L, l = r % p.L, row = chunk.head * group * p.L + r;
    const T* const q = static_cast<const T*>(p.query) + chunk.b * p.query_stride[0] + h * p.query_stride[1] + l * p.query_stride[2];
    for (int64_t d = threadIdx.x; d < p.D; d += kGradBlock) query[d] = grad_float(q, d);
    __syncthreads();
    chunk_terms(a, chunk, row, h, l, query, u, mass);
    __syncthreads();
    chunk_sums(a, chunk, row, u, mass, part_u, part_p, width);
  }
}

template <typename T>
__global__ void __launch_bounds__(kGradBlock) score_grad_query_kernel(const GradArgs a) {
  const ScoreParams& p = a.g.forward;
  float* const work = static_cast<float*>(a.g.workspace);
  const int64_t row = blockIdx.x;
  const float* const sums = work + a.at.sums + row * a.at.num_chunks * (2 * p.D + 1);
  float e = 0;
  if (a.at.with_p) {
    for (int64_t c = 0; c < a.at.num_chunks && p.activation == Activation::kSoftmax; ++c) e += sums[c * (2 * p.D + 1) + 2 * p.D];
    if (a.g.grad_lse != nullptr) e -= a.g.grad_lse[row];
  }
  if (threadIdx.x == 0) work[a.at.e + row] = e;
  for (int64_t d = threadIdx.x; d < p.D; d += kGradBlock) {
    float sum = 0;
    for (int64_t c = 0; c < a.at.num_chunks; ++c) {
      sum += sums[c * (2 * p.D + 1) + d];
      if (a.at.with_p) sum = fmaf(-e, sums[c * (2 * p.D + 1) + p.D + d], sum);
    }
    grad_store(static_cast<T*>(a.g.query_grad), row * p.D + d, sum * p.scale);
  }
}

template <typename T>
__global__ void __launch_bounds__(kGradBlock) score_grad_key_kernel(const GradArgs a) {
  const ScoreParams& p = a.g.forward;
  const float* const work = static_cast<const float*>(a.g.workspace);
  const int64_t tiles = (p.N + kGradChunkKeys - 1) / kGradChunkKeys, head = blockIdx.x / tiles, key = blockIdx.x % tiles * kGradChunkKeys;
  const int64_t group = p.H / p.Hkv, rows = group * p.L, b = head / p.Hkv, left = p.N - key;
  const int64_t keys = left < kGradChunkKeys ? left : kGradChunkKeys;
  for (int64_t i = threadIdx.x; i < keys * p.D; i += kGradBlock) {
    const int64_t n = key + i / p.D, d = i % p.D;
    float sum = 0;
    if (n >= a.at.key_begin && n < a.at.key_end) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = head * rows + r, at = row * a.at.stride + n - a.at.key_begin, h = head % p.Hkv * group + r / p.L;
        float ds = work[a.at.u + at];
        if (a.at.with_p) ds = fmaf(-work[a.at.e + row], work[a.at.p + at], ds);
        const int64_t q = b * p.query_stride[0] + h * p.query_stride[1] + r % p.L * p.query_stride[2];
        sum = fmaf(ds, grad_float(static_cast<const T*>(p.query) + q, d), sum);
      }
    }
    grad_store(static_cast<T*>(a.g.key_grad), (head * p.N + n) * p.D + d, sum * p.scale);
  }
}

}  // namespace score
}  // namespace tokensieve

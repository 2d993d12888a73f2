// Gradient of attention_scores on the CPU: grad of the scores' shape -> query_grad [B, H, L, D], key_grad [B, Hkv, N, D]; score_grad.h.
//
// Algorithm, three parallel steps of fixed tasks (rows = B H L):
//   1. (b, key head, chunk of 256 keys): logits as score_cpu makes them, p = exp(s - lse), u = p g; sums of u, u k and p k over the chunk.
//   2. (row): e = sum of u over the chunks; dq = scale * (sum u k - e sum p k), chunks in order.
//   3. (b, key head, chunk): ds = u - e p in place; dk = scale * sum over the group's rows of ds q.
// Keys are read twice from memory or cache in step 1 and never again: what remains is an outer product. Work: 8 rows N D flops.
// Memory: 8 bytes a row and key, so it is meant for few rows. Deterministic on any number of threads and every level.
#include <cstring>

#include "core/simd_narrow.h"
#include "score/score_finish_cpu.h"
#include "score/score_grad_layout.h"
#include "score/score_row_cpu.h"
#include "score/score_tile_cpu.h"

TS_ISA_BEGIN

constexpr int64_t kGradChunk = 256;
constexpr int64_t kGradRows = 64;  // rows whose pointers sit on the stack

struct GradTask {
  const ScoreGradParams& g;
  const ScoreParams& p;
  GradLayout at;
  float* work;
};

static float head_factor(const ScoreParams& p, int64_t b, int64_t h) {
  if (p.head_reduction == Reduction::kNone) return 1.0f;
  const float weight = p.head_weights != nullptr ? p.head_weights[b * p.H + h] : 1.0f;
  if (weight == 0.0f || p.head_reduction == Reduction::kSum) return weight;
  float divisor = 0.0f;
  for (int64_t i = 0; i < p.H; ++i) divisor += p.head_weights != nullptr ? p.head_weights[b * p.H + i] : 1.0f;
  return divisor == 0.0f ? 0.0f : weight / divisor;
}

static float row_factor(const ScoreParams& p, int64_t b, int64_t l) {
  const float weight = row_weight(p, b, l);
  if (p.query_reduction != Reduction::kMean) return weight;
  float divisor = 0.0f;
  for (int64_t i = 0; i < p.L; ++i) {
    const bool unused = p.row_weights == nullptr && p.query_positions != nullptr && p.query_positions[b * p.L + i] < 0;
    divisor += unused ? 0.0f : row_weight(p, b, i);
  }
  return divisor == 0.0f ? 0.0f : weight / divisor;
}

// g of `count` keys from `key` on; zeros up to the chunk's end.
static void score_gradients(const GradTask& t, int64_t b, int64_t h, int64_t l, int64_t key, int64_t count, float* g) {
  const ScoreParams& p = t.p;
  for (int64_t i = 0; i < kGradChunk; ++i) g[i] = 0.0f;
  const int64_t heads = p.head_reduction == Reduction::kNone ? p.H : 1, rows = p.query_reduction == Reduction::kNone ? p.L : 1;
  const int64_t row = (b * heads + (heads > 1 ? h : 0)) * rows + (rows > 1 ? l : 0);
  const int64_t begin = larger(key, p.range_begin), end = smaller(key + count, p.range_end);
  const float factor = head_factor(p, b, h) * row_factor(p, b, l);
  const float* const from = t.g.grad + row * (p.range_end - p.range_begin) - p.range_begin;
  for (int64_t n = begin; n < end; ++n) g[n - key] = factor * from[n];
  if (p.query_reduction != Reduction::kVisibleMean) return;
  Vec share[kGradChunk / kLanes];
  visible_weight(p, b, h, key, count, static_cast<int>(kGradChunk / kLanes), share);
  for (int64_t i = 0; i < kGradChunk; i += kLanes) {
    const Vec by = share[i / kLanes];
    store(g + i, select(greater(by, zero()) | greater(zero(), by), div(load(g + i), by), zero()));
  }
}

// Step 1 for one row: raw dot products in u -> u and p; returns sum of u.
static float row_terms(const GradTask& t, int64_t b, int64_t h, int64_t l, int64_t key, int64_t visible, const float* g, float* u,
                       float* ps) {
  const ScoreParams& p = t.p;
  const float lse = p.lse_in[(b * p.H + h) * p.L + l];
  const bool softmax = p.activation == Activation::kSoftmax;
  const bool nothing = !(lse > -kInfinity) && lse == lse;
  if (nothing && softmax) visible = 0;
  const BiasRow bias = bias_row(p, b, h, l, key);
  Vec total = zero();
  for (int64_t i = 0; i < kGradChunk; i += kLanes) {
    const int64_t n = visible - i;
    Vec mass = zero(), term = zero();
    if (n > 0) {
      const Vec s = logits(load(u + i), splat(p.scale), bias, i, n);
      const Mask seen = first_lanes(n) & above_minus_infinity(s);
      if (softmax || (ps != nullptr && !nothing)) mass = select(seen, exp(sub(s, splat(lse))), zero());
      Vec slope = mass;
      if (p.activation == Activation::kLogit) slope = splat(1.0f);
      if (p.activation == Activation::kSigmoid) slope = mul(sigmoid(s), sub(splat(1.0f), sigmoid(s)));
      term = select(seen, mul(slope, load(g + i)), zero());
      total = add(total, term);
    }
    store(u + i, term);
    if (ps != nullptr) store(ps + i, mass);
  }
  return reduce_add(total);
}

// to[d] = sum over n < count of weight[n] * key[n][d], 64 dimensions at a time.
template <typename T>
static void weighted_keys(float* to, const float* weight, const T* key, int64_t stride, int64_t count, int64_t D) {
  for (int64_t d = 0; d < D; d += 4 * kLanes) {
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    const int64_t left = D - d;
    for (int64_t n = 0; n < count; ++n) {
      const Vec w = splat(weight[n]);
      const T* const k = key + n * stride + d;
      for (int v = 0; v < 4; ++v) {
        const int64_t rest = left - v * kLanes;
        if (rest > 0) sum[v] = fma(w, rest >= kLanes ? load(k + v * kLanes) : load_n(k + v * kLanes, rest), sum[v]);
      }
    }
    for (int v = 0; v < 4; ++v) store_upto(to + d + v * kLanes, sum[v], left - v * kLanes);
  }
}

static const float* grad_query_row(const GradTask& t, int64_t row) {  // row = (b * H + h) * L + l
  const ScoreParams& p = t.p;
  if (p.dtype != DType::kFloat32) return t.work + t.at.query + row * p.D;
  const int64_t l = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
  return static_cast<const float*>(p.query) + b * p.query_stride[0] + h * p.query_stride[1] + l * p.query_stride[2];
}

template <typename T>
static void terms_task(const GradTask& t, int64_t head, int64_t c) {
  const ScoreParams& p = t.p;
  const int64_t group = p.H / p.Hkv, b = head / p.Hkv, rows = group * p.L, first = head * rows;
  const int64_t key = t.at.key_begin + c * kGradChunk, keys = smaller(kGradChunk, t.at.key_end - key);
  const T* const base = static_cast<const T*>(p.key) + b * p.key_stride[0] + head % p.Hkv * p.key_stride[1] + key * p.key_stride[2];
  for (int64_t r0 = 0; r0 < rows; r0 += kGradRows) {
    const int64_t count = smaller(kGradRows, rows - r0);
    const float* query[kGradRows];
    float* const u = t.work + t.at.u + (first + r0) * t.at.stride + c * kGradChunk;
    for (int64_t r = 0; r < count; ++r) query[r] = grad_query_row(t, first + r0 + r);
    dot_chunk(Rows{query, u, count, t.at.stride}, base, p.key_stride[2], keys, p.D);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r0 + r, l = row % p.L, h = row / p.L % p.H;
      float g[kGradChunk];
      float* const ps = t.at.with_p ? t.work + t.at.p + row * t.at.stride + c * kGradChunk : nullptr;
      float* const sums = t.work + t.at.sums + (row * t.at.num_chunks + c) * (2 * p.D + 1);
      const int64_t visible = larger(0, smaller(visible_keys(p, b, l) - key, keys));
      score_gradients(t, b, h, l, key, keys, g);
      sums[2 * p.D] = row_terms(t, b, h, l, key, visible, g, u + r * t.at.stride, ps);
      weighted_keys(sums, u + r * t.at.stride, base, p.key_stride[2], visible, p.D);
      if (ps != nullptr) weighted_keys(sums + p.D, ps, base, p.key_stride[2], visible, p.D);
    }
  }
}

template <typename T>
static void query_task(const GradTask& t, int64_t row) {
  const ScoreParams& p = t.p;
  const float* const sums = t.work + t.at.sums + row * t.at.num_chunks * (2 * p.D + 1);
  float e = 0.0f;
  if (t.at.with_p) {
    for (int64_t c = 0; c < t.at.num_chunks && p.activation == Activation::kSoftmax; ++c) e += sums[c * (2 * p.D + 1) + 2 * p.D];
    if (t.g.grad_lse != nullptr) e -= t.g.grad_lse[row];
  }
  t.work[t.at.e + row] = e;
  T* const to = static_cast<T*>(t.g.query_grad) + row * p.D;
  for (int64_t d = 0; d < p.D; d += kLanes) {
    Vec sum = zero();
    for (int64_t c = 0; c < t.at.num_chunks; ++c) {
      const float* const from = sums + c * (2 * p.D + 1) + d;
      sum = add(sum, load_upto(from, p.D - d));
      if (t.at.with_p) sum = fma(splat(-e), load_upto(from + p.D, p.D - d), sum);
    }
    sum = mul(sum, splat(p.scale));
    if (p.D - d >= kLanes) {
      store(to + d, sum);
    } else {
      store_n(to + d, sum, p.D - d);
    }
  }
}

template <typename T>
static void key_task(const GradTask& t, int64_t head, int64_t c) {
  const ScoreParams& p = t.p;
  const int64_t group = p.H / p.Hkv, rows = group * p.L, first = head * rows;
  const int64_t key = t.at.key_begin + c * kGradChunk, keys = smaller(kGradChunk, t.at.key_end - key);
  for (int64_t r = 0; r < rows && t.at.with_p; ++r) {
    float* const u = t.work + t.at.u + (first + r) * t.at.stride + c * kGradChunk;
    const float* const ps = t.work + t.at.p + (first + r) * t.at.stride + c * kGradChunk;
    const Vec minus = splat(-t.work[t.at.e + first + r]);
    for (int64_t i = 0; i < kGradChunk; i += kLanes) store(u + i, fma(minus, load(ps + i), load(u + i)));
  }
  const float* const u = t.work + t.at.u + first * t.at.stride + c * kGradChunk;
  T* const to = static_cast<T*>(t.g.key_grad) + (head * p.N + key) * p.D;
  for (int64_t n = 0; n < keys; ++n) {
    for (int64_t d = 0; d < p.D; d += kLanes) {
      Vec sum = zero();
      for (int64_t r = 0; r < rows; ++r) {
        sum = fma(splat(u[r * t.at.stride + n]), load_upto(grad_query_row(t, first + r) + d, p.D - d), sum);
      }
      sum = mul(sum, splat(p.scale));
      if (p.D - d >= kLanes) {
        store(to + n * p.D + d, sum);
      } else {
        store_n(to + n * p.D + d, sum, p.D - d);
      }
    }
  }
}

template <typename T>
static void grad_steps(const GradTask& t, ParallelForFn threads) {
  const ScoreParams& p = t.p;
  const int64_t rows = p.B * p.H * p.L, heads = p.B * p.Hkv, tasks = heads * t.at.num_chunks;
  const auto bytes = [&](int64_t keys) { return static_cast<size_t>(keys * p.D) * sizeof(T); };
  parallel_for(threads, heads, 1, [&](int64_t begin, int64_t end) {  // keys without a ds
    for (int64_t head = begin; head < end; ++head) {
      T* const to = static_cast<T*>(t.g.key_grad) + head * p.N * p.D;
      memset(to, 0, bytes(t.at.key_begin));
      memset(to + t.at.key_end * p.D, 0, bytes(p.N - t.at.key_end));
    }
  });
  if (p.dtype != DType::kFloat32) {
    parallel_for(threads, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t l = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
        const T* const from = static_cast<const T*>(p.query) + b * p.query_stride[0] + h * p.query_stride[1] + l * p.query_stride[2];
        for (int64_t d = 0; d < p.D; ++d) t.work[t.at.query + row * p.D + d] = to_float(from[d]);
      }
    });
  }
  parallel_for(threads, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) terms_task<T>(t, i / t.at.num_chunks, i % t.at.num_chunks);
  });
  parallel_for(threads, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) query_task<T>(t, row);
  });
  parallel_for(threads, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) key_task<T>(t, i / t.at.num_chunks, i % t.at.num_chunks);
  });
}

Status score_grad_level(const ScoreGradParams& g, ParallelForFn threads) {
  const GradTask t = {g, g.forward, grad_layout(g, kGradChunk, true), static_cast<float*>(g.workspace)};
  switch (g.forward.dtype) {
    case DType::kFloat32:
      grad_steps<float>(t, threads);
      return Status::success();
    case DType::kFloat16:
      grad_steps<Half>(t, threads);
      return Status::success();
    default:
      grad_steps<BFloat>(t, threads);
      return Status::success();
  }
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status score_grad_level(const ScoreGradParams& params, ParallelForFn threads))

Status score_grad_cpu(const ScoreGradParams& params, const ScoreGradPlan& /*plan*/, CpuLevel level, ParallelForFn threads) {
  if (const char* why = grad_refusal(params)) return Status::error(why);
  if (params.forward.Hkv == 0) return Status::success();
  TS_CPU_SWITCH(level, score_grad_level(params, threads))
}
}  // namespace tokensieve
#endif

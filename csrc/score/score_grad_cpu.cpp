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

// The register tile of steps 1 and 3: kSums sums of weight x row, each over 16 or 32 dimensions, rows in order.
constexpr int kTileSums = TS_ISA_LEVEL == 2 ? 8 : 4, kTileVecs = TS_ISA_LEVEL == 2 ? 2 : 1;
constexpr int64_t kTileDims = kTileVecs * kLanes;

// Loops over the sums are unrolled: else the sums live in memory, cleared by a slow rep stos.
template <int kSums>
TS_INLINE void clear(Vec (&sum)[kSums][kTileVecs]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    for (int v = 0; v < kTileVecs; ++v) sum[i][v] = zero();
  }
}

// sum[i] += weight(i) * row[0, left), left > 0.
template <int kSums, bool kFull, typename T, typename Weight>
TS_INLINE void add_row(Vec (&sum)[kSums][kTileVecs], const T* row, int64_t left, const Weight& weight) {
  Vec x[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) {
    x[v] = kFull ? load(row + v * kLanes) : left > v * kLanes ? load_upto(row + v * kLanes, left - v * kLanes) : zero();
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    const Vec w = splat(weight(i));
    for (int v = 0; v < kTileVecs; ++v) sum[i][v] = fma(w, x[v], sum[i][v]);
  }
}

struct KeySum {  // to[d] = sum over n < count of weight[n] * key[n][d]
  const float* weight;
  int64_t count;
  float* to;
};

template <int kSums, bool kFull, typename T>
static void weighted_tile(const KeySum* sums, const T* key, int64_t stride, int64_t d, int64_t left) {
  int64_t common = sums[0].count;
  for (int i = 1; i < kSums; ++i) common = smaller(common, sums[i].count);
  Vec sum[kSums][kTileVecs];
  clear(sum);
  for (int64_t n = 0; n < common; ++n) {
    add_row<kSums, kFull>(sum, key + n * stride + d, left, [&](int i) { return sums[i].weight[n]; });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {  // keys that not all of the rows see
    Vec one[1][kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) one[0][v] = sum[i][v];
    for (int64_t n = common; n < sums[i].count; ++n) {
      add_row<1, kFull>(one, key + n * stride + d, left, [&](int) { return sums[i].weight[n]; });
    }
    for (int v = 0; v < kTileVecs; ++v) store_upto(sums[i].to + d + v * kLanes, one[0][v], left - v * kLanes);
  }
}

template <int kSums, typename T>
static void weighted_sums(const KeySum* sums, const T* key, int64_t stride, int64_t D) {
  for (int64_t d = 0; d < D; d += kTileDims) {
    if (D - d >= kTileDims) {
      weighted_tile<kSums, true>(sums, key, stride, d, D - d);
    } else {
      weighted_tile<kSums, false>(sums, key, stride, d, D - d);
    }
  }
}

template <typename T>
static void weighted_keys(const KeySum* sums, int64_t num, const T* key, int64_t stride, int64_t D) {
  int64_t i = 0;
  for (; i + kTileSums <= num; i += kTileSums) weighted_sums<kTileSums>(sums + i, key, stride, D);
  for (; i + 2 <= num; i += 2) weighted_sums<2>(sums + i, key, stride, D);
  if (i < num) weighted_sums<1>(sums + i, key, stride, D);
}

// Query rows of a key head's group in float32.
struct QueryRows {
  const float* first;
  int64_t head, row;  // floats from one to the next

  const float* at(int64_t h, int64_t l) const { return first + h * head + l * row; }
};
static QueryRows query_rows(const GradTask& t, int64_t head) {
  const ScoreParams& p = t.p;
  const int64_t group = p.H / p.Hkv, h = head % p.Hkv * group;
  if (p.dtype != DType::kFloat32) return {t.work + t.at.query + head * group * p.L * p.D, p.L * p.D, p.D};
  const float* const query = static_cast<const float*>(p.query);
  return {query + head / p.Hkv * p.query_stride[0] + h * p.query_stride[1], p.query_stride[1], p.query_stride[2]};
}

template <typename T>
static void terms_task(const GradTask& t, int64_t head, int64_t c) {
  const ScoreParams& p = t.p;
  const int64_t group = p.H / p.Hkv, b = head / p.Hkv, rows = group * p.L, first = head * rows;
  const int64_t key = t.at.key_begin + c * kGradChunk, keys = smaller(kGradChunk, t.at.key_end - key);
  const T* const base = static_cast<const T*>(p.key) + b * p.key_stride[0] + head % p.Hkv * p.key_stride[1] + key * p.key_stride[2];
  const QueryRows queries = query_rows(t, head);
  for (int64_t r0 = 0; r0 < rows; r0 += kGradRows) {
    const int64_t count = smaller(kGradRows, rows - r0);
    const float* query[kGradRows];
    float* const u = t.work + t.at.u + (first + r0) * t.at.stride + c * kGradChunk;
    for (int64_t r = 0; r < count; ++r) query[r] = queries.at((r0 + r) / p.L, (r0 + r) % p.L);
    dot_chunk(Rows{query, u, count, t.at.stride}, base, p.key_stride[2], keys, p.D);
    KeySum sums[2 * kGradRows];
    int64_t num = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r0 + r, l = row % p.L, h = row / p.L % p.H;
      float g[kGradChunk];
      float* const ps = t.at.with_p ? t.work + t.at.p + row * t.at.stride + c * kGradChunk : nullptr;
      float* const out = t.work + t.at.sums + (row * t.at.num_chunks + c) * (2 * p.D + 1);
      const int64_t visible = larger(0, smaller(visible_keys(p, b, l) - key, keys));
      score_gradients(t, b, h, l, key, keys, g);
      out[2 * p.D] = row_terms(t, b, h, l, key, visible, g, u + r * t.at.stride, ps);
      sums[num++] = {u + r * t.at.stride, visible, out};
      if (ps != nullptr) sums[num++] = {ps, visible, out + p.D};
    }
    weighted_keys(sums, num, base, p.key_stride[2], p.D);
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
struct KeyGrad {
  QueryRows queries;
  const float* u;
  int64_t stride;  // of u
  T* to;           // [keys, D]
};

template <int kSums, bool kFull, typename T>
static void key_tile(const ScoreParams& p, int64_t group, const KeyGrad<T>& at, int64_t n, int64_t d) {
  const int64_t left = p.D - d;
  const float* u = at.u + n;
  Vec sum[kSums][kTileVecs];
  clear(sum);
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t l = 0; l < p.L; ++l, u += at.stride) {
      add_row<kSums, kFull>(sum, at.queries.at(h, l) + d, left, [&](int i) { return u[i]; });
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    for (int v = 0; v < kTileVecs; ++v) {
      store_upto(at.to + (n + i) * p.D + d + v * kLanes, mul(sum[i][v], splat(p.scale)), left - v * kLanes);
    }
  }
}

// dk of kSums keys from key n on.
template <int kSums, typename T>
static void key_sums(const ScoreParams& p, int64_t group, const KeyGrad<T>& at, int64_t n) {
  for (int64_t d = 0; d < p.D; d += kTileDims) {
    if (p.D - d >= kTileDims) {
      key_tile<kSums, true>(p, group, at, n, d);
    } else {
      key_tile<kSums, false>(p, group, at, n, d);
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
  const KeyGrad<T> at = {query_rows(t, head), t.work + t.at.u + first * t.at.stride + c * kGradChunk, t.at.stride,
                         static_cast<T*>(t.g.key_grad) + (head * p.N + key) * p.D};
  int64_t n = 0;
  for (; n + kTileSums <= keys; n += kTileSums) key_sums<kTileSums>(p, group, at, n);
  for (; n < keys; ++n) key_sums<1>(p, group, at, n);
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

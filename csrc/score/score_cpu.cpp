// attention_scores on the CPU: query [B, H, L, D], key [B, Hkv, N, D] (float32, float16, bfloat16) -> scores [B, H or 1, L or 1, R]
// float32, lse [B, H, L].
//
// Algorithm. Rows of L go in passes of layout.pass_rows. A pass is three parallel steps of fixed tasks with a fixed order inside:
//   1. mass     (b, key head, chunk of <= 256 keys): logits s of the group's rows, their maximum m, mass e = exp(s - m), its sum.
//   2. factors  (b, h, l): merge the chunks' (m, sum) in order; factor = row weight * exp(m_chunk - m_row) / sum_row.
//   3. reduce   (b, chunk): out[n] = over heads of over rows of factor * e, in order.
// Keys are read once a pass and every element takes one exp. With several passes and 8 or more key heads, one task runs all passes of a
// key head instead. With lse given, mass is exp(s - lse) and step 2 only writes weights. Chunks and passes come from the shape, so
// any number of threads gives the same bits; so do all instruction levels (core/simd.h).
//
// Work: 2 B H L N D flops, B H L N exps; B Hkv N D key bytes a pass, 8 B H L N bytes of mass (in L2/L3); workspace <= about the keys.
// Bound by memory for one row (2944 x 32 x 128 float32 is 48 MB: 2.7 ms at 18 GB/s), by FMA from about 16 rows on.
// A NaN logit makes its row NaN on the keys that it sees. A row that sees nothing is 0, its lse -inf.
#include "score/colsum.h"
#include "score/score.h"
#include "score/score_cpu_layout.h"
#include "score/score_reduce_cpu.h"
#include "score/score_row_cpu.h"
#include "score/score_tile_cpu.h"

TS_ISA_BEGIN

constexpr int64_t kMaxRows = 64;  // rows of a task whose pointers sit on the stack; longer groups (G > 64) go in slices

TS_INLINE const float* query_row(const Task& t, int64_t b, int64_t h, int64_t l) {
  const ScoreParams& p = t.p;
  if (p.dtype == DType::kFloat32) {
    return static_cast<const float*>(p.query) + b * p.query_stride[0] + h * p.query_stride[1] + l * p.query_stride[2];
  }
  return t.work + t.at.query + ((b * p.H + h) * t.at.pass_rows + l - t.row_begin) * p.D;
}

template <typename T>
static void convert_queries(const Task& t, int64_t head) {  // head = b * H + h
  const ScoreParams& p = t.p;
  for (int64_t l = 0; l < t.rows; ++l) {
    const T* from = static_cast<const T*>(p.query) + head / p.H * p.query_stride[0] + head % p.H * p.query_stride[1] +
                    (t.row_begin + l) * p.query_stride[2];
    float* to = t.work + t.at.query + (head * t.at.pass_rows + l) * p.D;
    int64_t d = 0;
    for (; d + kLanes <= p.D; d += kLanes) store(to + d, load(from + d));
    for (; d < p.D; ++d) to[d] = to_float(from[d]);
  }
}

// Step 1, rows [first, first + count) of the group (row = g * t.rows + l) of key head `head` = b * Hkv + hk against chunk c.
template <typename T>
static void mass_rows(const Task& t, int64_t head, int64_t c, int64_t first, int64_t count) {
  const ScoreParams& p = t.p;
  const int64_t b = head / p.Hkv, hk = head % p.Hkv;
  const int64_t key = t.at.key_begin + c * t.at.chunk, keys = smaller(t.at.chunk, t.at.key_end - key);
  float* mass = t.work + t.at.mass + ((head * t.at.num_chunks + c) * t.at.group * t.at.pass_rows + first) * t.at.chunk;
  const float* query[kMaxRows];
  int64_t visible[kMaxRows], most = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t h = hk * t.at.group + (first + r) / t.rows, l = t.row_begin + (first + r) % t.rows;
    query[r] = query_row(t, b, h, l);
    visible[r] = larger(0, smaller(visible_keys(p, b, l) - key, keys));
    most = larger(most, visible[r]);
  }
  const T* base = static_cast<const T*>(p.key) + b * p.key_stride[0] + hk * p.key_stride[1] + key * p.key_stride[2];
  dot_chunk(Rows{query, mass, count, t.at.chunk}, base, p.key_stride[2], most, p.D);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t h = hk * t.at.group + (first + r) / t.rows, l = (first + r) % t.rows;
    const int64_t stat = ((b * p.H + h) * t.at.pass_rows + l) * t.at.num_chunks + c;
    const float* lse = p.lse_in ? p.lse_in + (b * p.H + h) * p.L + t.row_begin + l : nullptr;
    const BiasRow bias = bias_row(p, b, h, t.row_begin + l, key);
    float *maximum = t.work + t.at.maximum + stat, *sum = t.work + t.at.sum + stat;
    if (p.activation == Activation::kSoftmax) {
      mass_of_row(mass + r * t.at.chunk, visible[r], keys, p.scale, bias, lse, maximum, sum);
    } else {
      values_of_row(p, mass + r * t.at.chunk, visible[r], keys, bias, maximum, sum);
    }
  }
}

template <typename T>
static void mass_task(const Task& t, int64_t head, int64_t c) {
  const int64_t rows = t.at.group * t.rows;
  for (int64_t r = 0; r < rows; r += kMaxRows) mass_rows<T>(t, head, c, r, smaller(kMaxRows, rows - r));
}

// The mass of row (b, h, l of the pass) in all chunks becomes that of a NaN row: NaN factors would reach the keys that it does not see.
static void nan_mass(const Task& t, int64_t b, int64_t h, int64_t l) {
  const ScoreParams& p = t.p;
  const int64_t head = b * p.Hkv + h / t.at.group, end = smaller(visible_keys(p, b, t.row_begin + l), t.at.key_end);
  float* mass = t.work + t.at.mass + (head * t.at.num_chunks * t.at.group * t.at.pass_rows + h % t.at.group * t.rows + l) * t.at.chunk;
  for (int64_t key = t.at.key_begin; key < end; key += t.at.chunk, mass += t.at.group * t.at.pass_rows * t.at.chunk) {
    nan_row(mass, smaller(t.at.chunk, end - key), bias_row(p, b, h, t.row_begin + l, key));
  }
}

// Step 2 of one row: chunk statistics -> factors and lse.
static void merge_row(const Task& t, int64_t b, int64_t h, int64_t l) {
  const ScoreParams& p = t.p;
  const int64_t chunks = t.at.num_chunks, row = (b * p.H + h) * t.at.pass_rows + l, out = (b * p.H + h) * p.L + t.row_begin + l;
  const float weight = row_weight(p, b, t.row_begin + l);
  float* factor = t.work + t.at.factor + (b * chunks * p.H + h) * t.at.pass_rows + l;
  const int64_t step = p.H * t.at.pass_rows;
  if (p.lse_in) {
    for (int64_t c = 0; c < chunks; ++c) factor[c * step] = weight;
    if (p.lse_out) p.lse_out[out] = p.lse_in[out];
    return;
  }
  const float* maximum = t.work + t.at.maximum + row * chunks;
  float* sum = t.work + t.at.sum + row * chunks;
  float top = -kInfinity;
  for (int64_t c = 0; c < chunks; ++c) top = maximum[c] > top ? maximum[c] : top;
  const Vec shift = splat(top > -kInfinity ? top : 0.0f);
  Vec total = zero();
  for (int64_t c = 0; c < chunks; c += kLanes) {
    const int64_t n = chunks - c;
    const Vec growth = select(first_lanes(n), exp(sub(load_upto(maximum + c, n), shift)), zero());
    total = fma(growth, load_upto(sum + c, n), total);
  }
  const float mass = reduce_add(total);
  const float inverse = mass == 0.0f ? 0.0f : weight / mass;
  const bool softmax = p.activation == Activation::kSoftmax, nan = softmax && mass != mass;
  if (nan) nan_mass(t, b, h, l);
  if (nan || !softmax) {
    for (int64_t c = 0; c < chunks; ++c) factor[c * step] = weight;
  }
  for (int64_t c = 0; c < chunks && softmax && !nan; c += kLanes) {
    const Vec share = mul(exp(sub(load_upto(maximum + c, chunks - c), shift)), splat(inverse));
    float lane[kLanes];
    store(lane, share);
    for (int64_t j = 0; j < kLanes && c + j < chunks; ++j) factor[(c + j) * step] = mass == 0.0f ? 0.0f : lane[j];
  }
  if (p.lse_out) p.lse_out[out] = row_lse(top, mass);
}

// One pass, three parallel steps over all heads.
template <typename T>
static void run_pass(const Task& t, ParallelForFn threads) {
  const ScoreParams& p = t.p;
  const int64_t chunks = t.at.num_chunks;
  if constexpr (sizeof(T) == 2) {
    parallel_for(threads, p.B * p.H, 1 + 65536 / (t.rows * p.D + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convert_queries<T>(t, i);
    });
  }
  const int64_t mass_cost = t.at.chunk * p.D * (t.at.group * t.rows + 8);  // about 32 flops a nanosecond
  parallel_for(threads, p.B * p.Hkv * chunks, 1 + 500000 / (mass_cost + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) mass_task<T>(t, i / chunks, i % chunks);
  });
  parallel_for(threads, p.B * p.H * t.rows, 1 + 20000 / (40 + 2 * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) merge_row(t, i / t.rows / p.H, i / t.rows % p.H, i % t.rows);
  });
  const int64_t reduce_cost = t.at.chunk * p.H * (t.rows + 1);  // about 8 elements a nanosecond
  parallel_for(threads, p.B * chunks, 1 + 100000 / (reduce_cost + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      each_slice(t, i / chunks, i % chunks, [&](const Slice& s) {
        if (p.query_reduction == Reduction::kNone) {
          reduce_heads(t, s);
        } else if (t.pass + 1 < t.at.num_passes) {
          store_slice(t, s, 0, p.H);
        } else {
          finish_slice(t, s, RowsFrom::kThisPass);
        }
      });
    }
  });
}

// All passes of one key head in one task: for many rows, where 3 parallel steps a pass would cost more than they gain.
template <typename T>
static void run_head(const ScoreParams& p, const ScoreLayout& at, int64_t head) {
  const int64_t b = head / p.Hkv, first = b * p.H + head % p.Hkv * at.group;  // b * H + first head of the group
  for (int64_t pass = 0; pass < at.num_passes; ++pass) {
    const Task t = make_task(p, at, pass);
    if constexpr (sizeof(T) == 2) {
      for (int64_t g = 0; g < at.group; ++g) convert_queries<T>(t, first + g);
    }
    for (int64_t c = 0; c < at.num_chunks; ++c) mass_task<T>(t, head, c);
    for (int64_t g = 0; g < at.group; ++g) {
      for (int64_t l = 0; l < t.rows; ++l) merge_row(t, b, first % p.H + g, l);
    }
    for (int64_t c = 0; c < at.num_chunks; ++c) {
      each_slice(t, b, c, [&](const Slice& s) { store_slice(t, s, first % p.H, first % p.H + at.group); });
    }
  }
}

template <typename T>
static void run(const ScoreParams& p, const ScoreLayout& at, ParallelForFn threads) {
  const bool by_head = at.num_passes > 1 && p.query_reduction != Reduction::kNone && p.B * p.Hkv >= 8;  // same bits either way
  if (!by_head) {
    for (int64_t pass = 0; pass < at.num_passes; ++pass) run_pass<T>(make_task(p, at, pass), threads);
    return;
  }
  parallel_for(threads, p.B * p.Hkv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_head<T>(p, at, i);
  });
  const Task t = make_task(p, at, at.num_passes - 1);
  parallel_for(threads, p.B * at.num_chunks, 1 + 100000 / (at.chunk * p.H + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      each_slice(t, i / at.num_chunks, i % at.num_chunks, [&](const Slice& s) { finish_slice(t, s, RowsFrom::kStored); });
    }
  });
}

Status score_level(const ScoreParams& p, const ScorePlan& plan, ParallelForFn threads) {
  if (plan.algo == ScoreAlgo::kCpuStrip) return colsum_level(p, threads);
  const ScoreLayout at = score_layout(p);
  if (p.dtype == DType::kFloat32) {
    run<float>(p, at, threads);
  } else if (p.dtype == DType::kFloat16) {
    run<Half>(p, at, threads);
  } else {
    run<BFloat>(p, at, threads);
  }
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status score_level(const ScoreParams& params, const ScorePlan& plan, ParallelForFn threads))

Status score_cpu(const ScoreParams& params, const ScorePlan& plan, CpuLevel level, ParallelForFn threads) {
  const ScoreParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("query and key must be float32, float16 or bfloat16");
  if (p.Hkv > 0 && p.H % p.Hkv != 0) return Status::error("the number of query heads must be a multiple of the number of key heads");
  if (p.activation != Activation::kSoftmax && p.lse_in) return Status::error("a given lse needs activation softmax");
  if (p.head_reduction == Reduction::kVisibleMean) return Status::error("head_reduction must be none, mean, sum or max");
  if (p.range_begin < 0 || p.range_begin > p.range_end || p.range_end > p.N) return Status::error("key range must lie in [0, N]");
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  if (p.B == 0) return Status::success();
  if (p.L == 0 || p.H == 0) {  // nothing to sum over
    const int64_t heads = p.head_reduction == Reduction::kNone ? p.H : 1, rows = p.query_reduction == Reduction::kNone ? p.L : 1;
    const int64_t count = p.B * heads * rows * (p.range_end - p.range_begin);
    for (int64_t i = 0; i < count; ++i) p.scores[i] = p.accumulate ? p.accumulate[i] : 0.0f;
    return Status::success();
  }
  if (p.range_begin == p.range_end && !p.lse_out) return Status::success();
  TS_CPU_SWITCH(level, score_level(params, plan, threads))
}
}  // namespace tokensieve
#endif

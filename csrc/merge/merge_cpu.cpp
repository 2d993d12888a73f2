// merge_tokens on the CPU: tensors[t] [B, N, M, W] strided, inverse [B, N] (output row of a token) -> [B, R, M, W] contiguous; sums of sizes.
//
// Algorithm: a stable counting sort makes the list of tokens of every output row (its own token first, then ascending), then the rows are
//   written one after the other: a row of one token is a copy, others add their tokens 4 at a time in float32, 16 columns a step, columns in
//   chunks of 4 KB so that a long row's sum stays in the first-level cache.
// Work: N C fused multiply-adds; bytes (N + R) C. 577 x 1024 floats to 289 rows: 3.5 MB. Bound by memory.
// Deterministic: a row's sum runs over its list in order, whatever the number of threads; largest = lowest in the list's order.
// Limits: N and R below 2^31. Indices are checked before anything is written.
#include <cstring>

#include "merge/merge_rows_cpu.h"

TS_ISA_BEGIN

constexpr int64_t kChunk = 1024;  // columns whose running sums are kept: 4 KB of stack
constexpr int kGroup = 4;         // tokens that are added in one pass over the columns

// Up to 4 tokens of a row on one chunk of columns.
template <typename T>
struct Group {
  const T* from[kGroup];
  Vec weight[kGroup];
  T* to;
  float* sum;
  Vec divisor, scale;
  bool first, last, divide;
};

template <bool kTail, typename T>
TS_INLINE Vec columns(const T* p, int64_t left) {
  if constexpr (kTail) return load_n(p, left);
  return load(p);
}

template <typename T, int kCount, bool kMax, bool kTail>
TS_INLINE void group_step(const Group<T>& g, int64_t i, int64_t left) {
  Vec sum = columns<kTail>(g.from[0] + i, left);
  if constexpr (kMax) {
    if (!g.first) sum = nan_max(load(g.sum + i), sum);
#pragma GCC unroll 3
    for (int j = 1; j < kCount; ++j) sum = nan_max(sum, columns<kTail>(g.from[j] + i, left));
  } else {
    sum = g.first ? mul(g.weight[0], sum) : fma(g.weight[0], sum, load(g.sum + i));
#pragma GCC unroll 3
    for (int j = 1; j < kCount; ++j) sum = fma(g.weight[j], columns<kTail>(g.from[j] + i, left), sum);
  }
  if (!g.last) return store(g.sum + i, sum);
  if (g.divide) sum = mul(div(sum, g.divisor), g.scale);
  if constexpr (kTail) {
    store_n(g.to + i, sum, left);
  } else {
    store(g.to + i, sum);
  }
}

template <typename T, int kCount, bool kMax>
static void group_pass(const Group<T>& g, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) group_step<T, kCount, kMax, false>(g, i, kLanes);
  if (i < width) group_step<T, kCount, kMax, true>(g, i, width - i);
}

template <typename T, bool kMax>
TS_INLINE void group_of(const Group<T>& g, int count, int64_t width) {
  switch (count) {
    case 1:
      return group_pass<T, 1, kMax>(g, width);
    case 2:
      return group_pass<T, 2, kMax>(g, width);
    case 3:
      return group_pass<T, 3, kMax>(g, width);
    default:
      return group_pass<T, 4, kMax>(g, width);
  }
}

// One output row's job.
struct RowJob {
  const int32_t* token;
  int32_t count;
  const float* weights;  // by token, or null
  const int64_t* from;   // by token, or null
  int64_t source(int32_t i) const { return from != nullptr ? from[token[i]] : token[i]; }
  float divisor, scale;
  bool divide, largest;
};

template <typename T>
static void reduce_row(const MergeTensor& x, int64_t b, const RowJob& job, char* to, int64_t begin, int64_t end) {
  const int64_t width = x.segment_bytes / static_cast<int64_t>(sizeof(T));
  alignas(64) float sum[kChunk];
  Group<T> g;
  g.sum = sum;
  g.divisor = splat(job.divisor), g.scale = splat(job.scale), g.divide = job.divide;
  for (int64_t m = 0; m < x.segments; ++m) {
    const int64_t stop = smaller(width, end - m * width);
    for (int64_t c = larger(0, begin - m * width); c < stop; c += kChunk) {
      g.to = reinterpret_cast<T*>(to) + m * width + c;
      for (int32_t i = 0; i < job.count; i += kGroup) {
        const int count = static_cast<int>(smaller(kGroup, job.count - i));
        for (int j = 0; j < count; ++j) {
          g.from[j] = token_at<T>(x, b, job.source(i + j), m) + c;
          g.weight[j] = splat(job.weights != nullptr ? job.weights[job.token[i + j]] : 1.0f);
        }
        g.first = i == 0, g.last = i + kGroup >= job.count;
        if (job.largest) {
          group_of<T, true>(g, count, smaller(kChunk, stop - c));
        } else {
          group_of<T, false>(g, count, smaller(kChunk, stop - c));
        }
      }
    }
  }
}

// Integers: exact sums (modulo 2^32 or 2^64) or the largest, column by column.
template <typename T, typename Unsigned>
static void reduce_integers(const MergeTensor& x, int64_t b, const RowJob& job, char* to, int64_t begin, int64_t end) {
  const int64_t width = x.segment_bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t c = begin; c < end; ++c) {
    T value = token_at<T>(x, b, job.source(0), c / width)[c % width];
    for (int32_t i = 1; i < job.count; ++i) {
      const T next = token_at<T>(x, b, job.source(i), c / width)[c % width];
      if (job.largest) {
        value = next > value ? next : value;
      } else {
        value = static_cast<T>(static_cast<Unsigned>(value) + static_cast<Unsigned>(next));
      }
    }
    reinterpret_cast<T*>(to)[c] = value;
  }
}

TS_INLINE void copy_columns(const MergeTensor& x, int64_t b, int64_t token, char* to, int64_t begin, int64_t end) {  // in bytes
  const int64_t width = x.segments == 1 || x.stride_m == x.segment_bytes ? x.segments * x.segment_bytes : x.segment_bytes;
  for (int64_t at = begin; at < end;) {
    const int64_t m = at / width, stop = smaller((m + 1) * width, end);
    const char* const from = static_cast<const char*>(x.src) + b * x.stride_b + token * x.stride_n + m * x.stride_m;
    memcpy(to + at, from + at % width, static_cast<size_t>(stop - at));
    at = stop;
  }
}

// Rows of one token are copies unless a factor or epsilon stands on them.
TS_INLINE bool copies(const MergeParams& p) { return p.mode == MergeMode::kWeighted || (p.weights == nullptr && p.epsilon == 0.0f); }

// Columns [begin, end) of row r.
static void write_row(const MergeParams& p, const MergeTensor& x, int64_t b, int64_t r, int64_t begin, int64_t end) {
  const RowLists lists = row_lists(p, b);
  const int64_t row = x.segments * x.segment_bytes, bytes = merge_type_bytes(x.type);
  char* const to = static_cast<char*>(x.dst) + (b * p.R + r) * row;
  RowJob job = {};
  job.token = lists.token + lists.start[r], job.count = lists.start[r + 1] - lists.start[r];
  job.divisor = job.scale = 1.0f, job.largest = p.mode == MergeMode::kAmax;
  job.divide = p.mode != MergeMode::kSum && !job.largest;
  if (p.weights != nullptr) job.weights = p.weights + b * p.N;
  if (p.from != nullptr) job.from = p.from + b * p.from_stride;
  if (job.divide) job.divisor = lists.divisor[r];
  if (job.count == 1 && copies(p)) return copy_columns(x, b, job.source(0), to, begin * bytes, end * bytes);
  if (job.count == 0 || (job.divide && job.divisor == 0.0f)) {
    memset(to + begin * bytes, 0, static_cast<size_t>((end - begin) * bytes));
  } else if (x.type == MergeType::kInt64) {
    reduce_integers<int64_t, uint64_t>(x, b, job, to, begin, end);
  } else if (x.type == MergeType::kInt32) {
    reduce_integers<int32_t, uint32_t>(x, b, job, to, begin, end);
  } else if (x.type == MergeType::kFloat32) {
    if (p.mode == MergeMode::kMlerp) job.scale = norms_of<float>(x, b, job.token, job.count).scale();
    reduce_row<float>(x, b, job, to, begin, end);
  } else if (x.type == MergeType::kFloat16) {
    if (p.mode == MergeMode::kMlerp) job.scale = norms_of<Half>(x, b, job.token, job.count).scale();
    reduce_row<Half>(x, b, job, to, begin, end);
  } else {
    if (p.mode == MergeMode::kMlerp) job.scale = norms_of<BFloat>(x, b, job.token, job.count).scale();
    reduce_row<BFloat>(x, b, job, to, begin, end);
  }
}

TS_INLINE void write_totals(const MergeParams& p, int64_t b) {
  if (p.total == nullptr) return;
  const RowLists lists = row_lists(p, b);
  const float* const size = p.size != nullptr ? p.size + b * p.N : nullptr;
  for (int64_t r = 0; r < p.R; ++r) {
    const float total = sum_of(lists, r, size);
    p.total[b * p.R + r] = total;
    if (p.log_total == nullptr) continue;
    const bool usual = total > 0.0f && total < kInfinity;
    p.log_total[b * p.R + r] = usual ? static_cast<float>(log(total)) : total <= 0.0f ? -kInfinity : total;  // inf and NaN stay
  }
}

Status merge_level(const MergeParams& p, ParallelForFn threads) {
  parallel_for(threads, p.B, larger(1, 4096 / (p.N + p.R + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      build_lists(p, b);
      fill_divisors(p, b);
      write_totals(p, b);
    }
  });
  for (int t = 0; t < p.num_tensors; ++t) {
    const MergeTensor& x = p.tensors[t];
    const int64_t width = x.segments * x.segment_bytes / merge_type_bytes(x.type);
    if (width == 0) continue;
    const int64_t part = p.B * p.R >= 32 ? width : larger(256, (width / 32 + 15) / 16 * 16);  // few long rows: threads share their columns
    const int64_t parts = (width + part - 1) / part;
    const int64_t bytes = (p.N + p.R) * x.segments * x.segment_bytes / larger(1, p.R * parts);  // of a unit
    parallel_for(threads, p.B * p.R * parts, larger(1, (64 << 10) / larger(1, bytes)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i / parts, c = i % parts * part;
        write_row(p, x, row / p.R, row % p.R, c, smaller(c + part, width));
      }
    });
  }
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status merge_level(const MergeParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status merge_grad_level(const MergeParams& params, ParallelForFn threads))
namespace baseline {
Status merge_grad_level(const MergeParams& params, ParallelForFn threads);
}

static Status check(const MergeParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (p.num_tensors < 0 || p.num_tensors > kMaxMergeTensors) return Status::error("at most 8 tensors per launch");
  if (p.N >= kLimit - 2 || p.R >= kLimit - 2) return Status::error("N and the number of output rows must be below 2^31 - 2");
  const int64_t entries = p.complement ? p.K : p.N, limit = p.complement ? p.N : p.R;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t* const inverse = p.inverse + b * p.inverse_stride;
    int64_t bad = 0;
    for (int64_t i = 0; i < entries; ++i) bad += inverse[i] < -1 || inverse[i] >= limit ? 1 : 0;
    for (int64_t i = 0; p.from != nullptr && i < p.N; ++i) {
      const int64_t from = p.from[b * p.from_stride + i];
      bad += from < -1 || from >= p.rows ? 1 : 0;
    }
    if (bad != 0) return Status::error("every row, label or index must be in range");
    if (p.own == nullptr) continue;
    const int64_t* const own = p.own + b * p.own_stride;
    for (int64_t r = 0; r < p.R; ++r) {
      if (own[r] < -1 || own[r] >= p.N || (own[r] >= 0 && inverse[own[r]] != r)) {
        return Status::error("index and inverse must belong together: inverse[index[row]] == row");
      }
    }
  }
  return Status::success();
}

Status merge_cpu(const MergeParams& params, const MergePlan&, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, merge_level(params, threads))
}

Status merge_grad_cpu(const MergeParams& params, const MergePlan&, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, merge_grad_level(params, threads))
}
}  // namespace tokensieve
#endif

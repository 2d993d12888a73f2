// pool_runs and row_column_means on the CPU, and their gradients.
//
// Runs: an output row is a token's copy or the mean of `stride` neighbours, 64 channels in registers. bytes (S + R) C, bound by memory.
// Means: x [B, T, N, C] is read once, in runs of 256 channels: eight tokens of all frames at a time, whose column sums stay in the first-level
//   cache, the row sums (T x 256) in the second. 100 x 256 x 1024 floats: 105 MB, where two calls of mean read 210.
// Deterministic: float32, ascending tokens and frames, whatever the number of threads; mean = sum / count.
#include <cstring>

#include "core/simd_narrow.h"
#include "merge/pool_args.h"

TS_ISA_BEGIN

// Where output row r comes from: `count` tokens from `first` on.
struct Run {
  int64_t first, count;
};

TS_INLINE Run run_of(const RunsParams& p, const int64_t* starts, int64_t r) {
  const int64_t kept = p.length / p.stride, lost = p.length - kept;
  int64_t low = 0, high = p.images;  // runs that begin at or before row r
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] - middle * lost <= r) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low > 0) {
    const int64_t inside = r - (starts[low - 1] - (low - 1) * lost);
    if (inside < kept) return {starts[low - 1] + inside * p.stride, p.stride};
  }
  return {r + low * lost, 1};
}

template <typename T>
static void run_row(const RunsParams& p, int64_t b, int64_t r, int64_t R) {
  const Run run = run_of(p, p.starts + b * p.starts_stride, r);
  const T* const from = static_cast<const T*>(p.x) + b * p.stride_b + run.first * p.stride_n;
  T* const to = static_cast<T*>(p.out) + (b * R + r) * p.C;
  if (run.count == 1) {
    memcpy(to, from, static_cast<size_t>(p.C) * sizeof(T));
    return;
  }
  const Vec count = splat(static_cast<float>(run.count));
  int64_t c = 0;
  for (; c + 4 * kLanes <= p.C; c += 4 * kLanes) {
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < run.count; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = add(sum[v], load(from + i * p.stride_n + c + v * kLanes));
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(to + c + v * kLanes, div(sum[v], count));
  }
  for (; c < p.C; c += kLanes) {
    Vec sum = zero();
    for (int64_t i = 0; i < run.count; ++i) sum = add(sum, load_upto(from + i * p.stride_n + c, p.C - c));
    store_upto(to + c, div(sum, count), p.C - c);
  }
}

// Row r's gradient to the tokens of its run, and zeros to a dropped tail behind it.
template <typename T>
static void run_grad_row(const RunsParams& p, int64_t b, int64_t r, int64_t R) {
  const int64_t* const starts = p.starts + b * p.starts_stride;
  const Run run = run_of(p, starts, r);
  const int64_t next = r + 1 < R ? run_of(p, starts, r + 1).first : p.S, begin = r == 0 ? 0 : run.first;
  const T* const grad = static_cast<const T*>(p.grad) + (b * R + r) * p.C;
  T* const to = static_cast<T*>(p.x_grad) + b * p.S * p.C;
  const Vec share = splat(1.0f / static_cast<float>(run.count));
  for (int64_t n = begin; n < next; ++n) {
    T* const row = to + n * p.C;
    if (n < run.first || n >= run.first + run.count) {
      memset(row, 0, static_cast<size_t>(p.C) * sizeof(T));
    } else if (run.count == 1) {
      memcpy(row, grad, static_cast<size_t>(p.C) * sizeof(T));
    } else {
      for (int64_t c = 0; c < p.C; c += kLanes) store_upto(row + c, mul(share, load_upto(grad + c, p.C - c)), p.C - c);
    }
  }
}

template <typename F>
static void each_unit(ParallelForFn threads, int64_t units, int64_t bytes, F&& f) {
  parallel_for(threads, units, larger(1, (64 << 10) / larger(1, bytes)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i);
  });
}

Status runs_level(const RunsParams& p, ParallelForFn threads) {
  const int64_t R = pool::rows(p);
  if (p.C == 0) return Status::success();
  each_unit(threads, p.B * R, (p.S / larger(1, R) + 1) * p.C * dtype_bytes(p.dtype), [&](int64_t i) {
    if (p.dtype == DType::kFloat32) {
      run_row<float>(p, i / R, i % R, R);
    } else if (p.dtype == DType::kFloat16) {
      run_row<Half>(p, i / R, i % R, R);
    } else {
      run_row<BFloat>(p, i / R, i % R, R);
    }
  });
  return Status::success();
}

Status runs_grad_level(const RunsParams& p, ParallelForFn threads) {
  const int64_t R = pool::rows(p);
  if (p.C == 0 || p.B == 0) return Status::success();
  if (R == 0) {  // everything was dropped
    memset(p.x_grad, 0, static_cast<size_t>(p.B * p.S * p.C * dtype_bytes(p.dtype)));
    return Status::success();
  }
  each_unit(threads, p.B * R, (p.S / R + 1) * p.C * dtype_bytes(p.dtype), [&](int64_t i) {
    if (p.dtype == DType::kFloat32) {
      run_grad_row<float>(p, i / R, i % R, R);
    } else if (p.dtype == DType::kFloat16) {
      run_grad_row<Half>(p, i / R, i % R, R);
    } else {
      run_grad_row<BFloat>(p, i / R, i % R, R);
    }
  });
  return Status::success();
}

constexpr int kTokens = static_cast<int>(pool::kMeansRun);

template <typename T>
static void write_means(T* to, const float* sums, int64_t width, int64_t count) {
  for (int64_t c = 0; c < width; c += kLanes) {
    store_upto(to + c, div(load_upto(sums + c, width - c), splat(static_cast<float>(count))), width - c);
  }
}

// kCount tokens of one frame, C floats apart at `from`: added to the frame's row sum in their order, and each to its column sum.
template <int kCount, bool kFull, typename T>
TS_INLINE void add_tokens(const T* from, int64_t stride_n, float* row, float* columns, int64_t width, int64_t left) {
  Vec sum = kFull ? load(row) : load_n(row, left);
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) {
    const Vec value = kFull ? load(from + n * stride_n) : load_n(from + n * stride_n, left);
    float* const column = columns + n * width;
    sum = add(sum, value);
    if (kFull) {
      store(column, add(load(column), value));
    } else {
      store_n(column, add(load_n(column, left), value), left);
    }
  }
  if (kFull) {
    store(row, sum);
  } else {
    store_n(row, sum, left);
  }
}

// kCount tokens of all frames: on top of the row sums [T, width], and their column sums [kCount, width] written out.
template <int kCount, typename T>
static void sum_tokens(const MeansParams& p, const T* x, int64_t width, float* rows, float* columns, T* to) {
  const int64_t full = width / kLanes * kLanes;
  memset(columns, 0, static_cast<size_t>(kCount * width) * sizeof(float));
  for (int64_t t = 0; t < p.T; ++t) {
    const T* const from = x + t * p.stride_t;
    float* const row = rows + t * width;
    for (int64_t c = 0; c < full; c += kLanes) add_tokens<kCount, true>(from + c, p.stride_n, row + c, columns + c, width, kLanes);
    if (full < width) add_tokens<kCount, false>(from + full, p.stride_n, row + full, columns + full, width, width - full);
  }
  for (int n = 0; n < kCount; ++n) write_means(to + n * p.C, columns + n * width, width, p.T);
}

// Channels [begin, end) of a batch row. sums: rows [T, width], columns [kTokens, width].
template <typename T>
static void means_block(const MeansParams& p, int64_t b, int64_t begin, int64_t end, float* sums) {
  const int64_t width = end - begin;
  float* const columns = sums + p.T * width;
  const T* const x = static_cast<const T*>(p.x) + b * p.stride_b + begin;
  T* const to = static_cast<T*>(p.columns) + b * p.N * p.C + begin;
  memset(sums, 0, static_cast<size_t>(p.T * width) * sizeof(float));
  int64_t n = 0;
  for (; n + kTokens <= p.N; n += kTokens) sum_tokens<kTokens>(p, x + n * p.stride_n, width, sums, columns, to + n * p.C);
  for (; n < p.N; ++n) sum_tokens<1>(p, x + n * p.stride_n, width, sums, columns, to + n * p.C);
  for (int64_t t = 0; t < p.T; ++t) write_means(static_cast<T*>(p.rows) + (b * p.T + t) * p.C + begin, sums + t * width, width, p.N);
}

Status means_level(const MeansParams& p, ParallelForFn threads) {
  if (p.C == 0 || p.B == 0) return Status::success();
  const int64_t width = pool::means_width(p), blocks = (p.C + width - 1) / width;
  parallel_for(threads, p.B * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * width, end = smaller(begin + width, p.C);
      float* const sums = static_cast<float*>(p.workspace) + i * (kTokens + p.T) * width;
      if (p.dtype == DType::kFloat32) {
        means_block<float>(p, i / blocks, begin, end, sums);
      } else if (p.dtype == DType::kFloat16) {
        means_block<Half>(p, i / blocks, begin, end, sums);
      } else {
        means_block<BFloat>(p, i / blocks, begin, end, sums);
      }
    }
  });
  return Status::success();
}

template <typename T>
static void means_grad_token(const MeansParams& p, int64_t b, int64_t t, int64_t n) {
  const T* const rows = p.rows_grad != nullptr ? static_cast<const T*>(p.rows_grad) + (b * p.T + t) * p.C : nullptr;
  const T* const columns = p.columns_grad != nullptr ? static_cast<const T*>(p.columns_grad) + (b * p.N + n) * p.C : nullptr;
  T* const to = static_cast<T*>(p.x_grad) + ((b * p.T + t) * p.N + n) * p.C;
  const Vec of_rows = splat(1.0f / static_cast<float>(p.N)), of_columns = splat(1.0f / static_cast<float>(p.T));
  for (int64_t c = 0; c < p.C; c += kLanes) {
    Vec sum = rows != nullptr ? mul(of_rows, load_upto(rows + c, p.C - c)) : zero();
    if (columns != nullptr) sum = fma(of_columns, load_upto(columns + c, p.C - c), sum);
    store_upto(to + c, sum, p.C - c);
  }
}

Status means_grad_level(const MeansParams& p, ParallelForFn threads) {
  if (p.C == 0) return Status::success();
  each_unit(threads, p.B * p.T * p.N, 2 * p.C * dtype_bytes(p.dtype), [&](int64_t i) {
    const int64_t frame = i / p.N, n = i % p.N;
    if (p.dtype == DType::kFloat32) {
      means_grad_token<float>(p, frame / p.T, frame % p.T, n);
    } else if (p.dtype == DType::kFloat16) {
      means_grad_token<Half>(p, frame / p.T, frame % p.T, n);
    } else {
      means_grad_token<BFloat>(p, frame / p.T, frame % p.T, n);
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status runs_level(const RunsParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status runs_grad_level(const RunsParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status means_level(const MeansParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status means_grad_level(const MeansParams& params, ParallelForFn threads))

static Status check(const RunsParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    int64_t free = 0;  // the first token behind the run before
    for (int64_t i = 0; i < p.images; ++i) {
      const int64_t start = p.starts[b * p.starts_stride + i];
      if (start < free || start > p.S - p.length)
        return Status::error("starts must be ascending, runs must not overlap and must end inside x");
      free = start + p.length;
    }
  }
  return Status::success();
}

Status runs_cpu(const RunsParams& params, const PoolPlan&, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, runs_level(params, threads))
}

Status runs_grad_cpu(const RunsParams& params, const PoolPlan&, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, runs_grad_level(params, threads))
}

Status means_cpu(const MeansParams& params, const PoolPlan&, CpuLevel level,
                 ParallelForFn threads){TS_CPU_SWITCH(level, means_level(params, threads))}

Status means_grad_cpu(const MeansParams& params, const PoolPlan&, CpuLevel level, ParallelForFn threads) {
  TS_CPU_SWITCH(level, means_grad_level(params, threads))
}
}  // namespace tokensieve
#endif

// select_samples on the CPU: scores [B, N] -> picks [B, capacity] int64, counts [B], overflow [B].
//
// Algorithm, one row at a time: ordered keys, stable radix sort, one pass for the cdf, two binary searches a point, one ordered pass over the
// marks. Bytes: N * dtype + 8 capacity; about 12 passes over 4 N bytes in L1 or L2. Bound by the sort: one thread a row. Exact, the same on
// every level and on CUDA.
#include "select/keys_cpu.h"
#include "select/mass.h"
#include "select/samples_cpu_layout.h"
#include "select/samples_row.h"
#include "select/sort_cpu.h"

TS_ISA_BEGIN

struct SortedRow {
  Pairs x;  // key: ordered bits with NaN at 0, ascending
  int64_t n;
};

static SortedRow sorted_candidates(const SamplesParams& p, int64_t b, int64_t padded, int32_t* keys) {
  const TopkParams& rows = p.rows;
  const uint8_t* const candidates = rows.candidates ? rows.candidates + b * rows.candidates_stride : nullptr;
  make_keys(static_cast<const char*>(rows.scores) + b * rows.score_stride * dtype_bytes(rows.dtype), rows.dtype, rows.N, keys);
  uint32_t* const buffer = reinterpret_cast<uint32_t*>(keys) + padded;
  const Pairs x = {buffer, buffer + padded}, other = {buffer + 2 * padded, buffer + 3 * padded};
  int64_t n = 0;
  for (int64_t i = 0; i < rows.N; ++i) {
    if (candidates && !candidates[i]) continue;
    x.key[n] = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;
    x.position[n++] = static_cast<uint32_t>(i);
  }
  if (n > kInsertionSort) return {radix_sort(x, other, n), n};
  insertion_sort(x, n);
  return {x, n};
}

// Fills the cdf; returns whether the row has mass above its first token's, and the least value above 0.
static bool fill_cdf(const SortedRow& row, int64_t N, float* cdf, float* start) {
  constexpr uint32_t kZero = 0x80000000u;
  const auto bits_at = [&](int64_t j) { return row.x.key[j] > kZero ? row.x.key[j] & 0x7fffffffu : 0u; };
  const uint32_t largest = row.n > 0 ? bits_at(row.n - 1) : 0;
  if (largest == 0) return false;
  const int shift = select::mass_shift(N);
  const auto mass_at = [&](int64_t j) { return bits_at(j) == 0 ? uint64_t{0} : select::mass_of(bits_at(j), largest, shift); };
  uint64_t range = 0;
  for (int64_t j = 1; j < row.n; ++j) range += mass_at(j);
  if (range == 0) return false;
  uint64_t sum = 0;
  *start = 1.0f;
  for (int64_t j = 0; j < row.n; ++j) {
    sum += j > 0 ? mass_at(j) : 0;
    cdf[j] = select::cdf_value(sum, range);
    if (cdf[j] > 0.0f && cdf[j] < *start) *start = cdf[j];
  }
  return true;
}

static void samples_row(const SamplesParams& p, int64_t b, int64_t padded, int32_t* scratch) {
  const SortedRow row = sorted_candidates(p, b, padded, scratch);
  float* const cdf = reinterpret_cast<float*>(scratch) + 5 * padded;
  uint8_t* const marks = reinterpret_cast<uint8_t*>(scratch + 6 * padded);
  int64_t count = 0;
  float start;
  if (fill_cdf(row, p.rows.N, cdf, &start)) {
    __builtin_memset(marks, 0, static_cast<size_t>(row.n));
    for (int64_t t = 0; t < p.R; ++t) {
      const int64_t j = select::nearest([&](int64_t i) { return cdf[i]; }, row.n, select::sample_point(p, b, t, start));
      if (j < 0) continue;
      count += marks[j] == 0 ? 1 : 0;
      marks[j] = 1;
    }
  }
  p.counts[b] = count;
  p.overflow[b] = count > p.capacity;
  int64_t* out = p.index + b * p.capacity;
  int64_t skip = count > p.capacity ? count - p.capacity : 0;
  for (int64_t j = 0, left = count; left > 0; ++j) {
    if (marks[j] == 0) continue;
    --left;
    if (skip-- > 0) continue;
    *out++ = row.x.position[j];
  }
  for (const int64_t* const stop = p.index + (b + 1) * p.capacity; out < stop; ++out) *out = -1;
}

Status samples_level(const SamplesParams& p, ParallelForFn threads) {
  const SamplesLayout at = samples_layout(p);
  const int64_t cost = (p.rows.B / (at.groups + 1) + 1) * (10 * p.rows.N + 30 * p.R + 500);  // about 1 ns each
  parallel_for(threads, at.groups, 1 + 10000 / cost, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t b = group; b < p.rows.B; b += at.groups) {
        samples_row(p, b, at.padded, static_cast<int32_t*>(p.workspace) + group * at.ints);
      }
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status samples_level(const SamplesParams& params, ParallelForFn threads))

Status samples_cpu(const SamplesParams& params, const SamplesPlan& plan, CpuLevel level, ParallelForFn threads) {
  if (params.rows.B == 0) return Status::success();
  if (params.rows.dtype == DType::kBool) return Status::error("scores must be float32, float16 or bfloat16");
  if (params.rows.N >= int64_t{1} << 31) return Status::error("N must be below 2^31");
  if (plan.workspace_bytes > 0 && !params.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, samples_level(params, threads))
}
}  // namespace tokensieve
#endif

// score_quantiles on the CPU: scores [B, N] -> float32 [B, Q].
//
// Algorithm, one row at a time: scores -> ordered int32 keys; for every quantile the bisection of select_topk (cut_cpu.h) finds the order
// statistic at or below it, two vector passes the next one. No sort.
// Bytes: N * dtype + 4 Q; about 5 N key visits a quantile in L1 or L2. Bound by instructions: one thread a row. The same on every level.
#include "select/cut_cpu.h"
#include "select/quantile_value.h"
#include "select/topk_cpu_layout.h"

TS_ISA_BEGIN

TS_INLINE float score_of(int32_t key) {  // the inverse of key_of
  return float_of_bits(static_cast<uint32_t>(key < 0 ? key ^ INT32_MAX : key));
}

// keys: `count` of them, a multiple of 16, n of which are candidates.
static float quantile(const int32_t* keys, int64_t count, int64_t n, float q, int32_t* spare) {
  const select::QuantileRank rank = select::quantile_rank(q, n);
  const int64_t k = n - rank.below;  // of the largest k the smallest is x_below
  const Cut cut = find_cut(keys, count, n, k, spare);
  const int32_t low = cut.ties > 0 ? cut.threshold : least_above(keys, count, cut.threshold);
  int32_t high = low;
  if (rank.weight > 0.0f && k - count_above(keys, count, low) < 2) high = least_above(keys, count, low);
  return select::quantile_between(score_of(low), score_of(high), rank.weight);
}

static void quantiles_row(const QuantilesParams& p, int64_t b, const TopkLayout& at, int32_t* keys) {
  const TopkParams& rows = p.rows;
  make_keys(static_cast<const char*>(rows.scores) + b * rows.score_stride * dtype_bytes(rows.dtype), rows.dtype, rows.N, keys);
  const int64_t count = at.padded - kLanes;
  for (int64_t i = rows.N; i < count; ++i) keys[i] = kExcluded;
  int64_t n = rows.N;
  if (rows.candidates) {
    const uint8_t* const candidates = rows.candidates + b * rows.candidates_stride;
    n = 0;
    for (int64_t i = 0; i < rows.N; ++i) {
      keys[i] = candidates[i] ? keys[i] : kExcluded;
      n += candidates[i] ? 1 : 0;
    }
  }
  bool nan = n == 0;
  for (int64_t i = 0; i < rows.N; ++i) nan |= keys[i] == kNanKey;
  for (int i = 0; i < p.Q; ++i) p.out[b * p.Q + i] = nan ? __builtin_nanf("") : quantile(keys, count, n, p.q[i], keys + at.padded);
}

Status quantiles_level(const QuantilesParams& p, ParallelForFn threads) {
  TopkParams rows = p.rows;
  rows.K = 0;
  const TopkLayout at = topk_layout(rows);
  const int64_t cost = (rows.B / (at.groups + 1) + 1) * p.Q * (rows.N + 500);  // about 1 ns each
  parallel_for(threads, at.groups, 1 + 10000 / cost, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t b = group; b < rows.B; b += at.groups) quantiles_row(p, b, at, static_cast<int32_t*>(p.workspace) + group * at.ints);
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status quantiles_level(const QuantilesParams& params, ParallelForFn threads))

Status quantiles_cpu(const QuantilesParams& params, const QuantilesPlan& plan, CpuLevel level, ParallelForFn threads) {
  if (params.rows.B == 0 || params.Q == 0) return Status::success();
  if (params.rows.dtype == DType::kBool) return Status::error("scores must be float32, float16 or bfloat16");
  if (params.rows.N >= int64_t{1} << 31) return Status::error("N must be below 2^31");
  if (params.Q > kMaxQuantiles) return Status::error("at most 16 quantiles");
  if (plan.workspace_bytes > 0 && !params.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, quantiles_level(params, threads))
}
}  // namespace tokensieve
#endif

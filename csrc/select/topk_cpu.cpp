// select_topk on the CPU: scores [B, N] (float32, float16, bfloat16) -> index [B, prefix + K + suffix] int64, padded with -1 at the end.
//
// Algorithm, one row at a time: scores -> ordered int32 keys (the order of core/order.h); bisection on the value of a key with vector
// counts, until exactly k keys lie above it or one value is left, whose first tokens fill up; one ordered packing pass. Once under a
// quarter of the keys can still hold the threshold they are packed together, so the search reads about 3 N keys, never more than 32 N.
// Order by score: the k ascending positions go through a stable radix sort on the key, so ties stay lowest index first.
// always_keep: its tokens get the largest key; if there are k or more of them, they compete by score among themselves.
//
// Bytes: N * dtype + 8 K; about 6 vector passes over keys in L1 or L2 (50k keys: 200 KB). Bound by instructions: one thread a row.
// Tie rule: larger score, then lower index; NaN below -inf; -0.0 == +0.0. Exact, the same on every level.
#include "select/cut_cpu.h"
#include "select/keys_cpu.h"
#include "select/sort_cpu.h"
#include "select/topk_cpu_layout.h"

TS_ISA_BEGIN

// Applies candidates and always_keep to the keys. Returns how many tokens compete: with k or more always_keep tokens only those.
static int64_t apply_masks(const uint8_t* candidates, const uint8_t* always, int64_t count, int64_t k, int32_t* keys, bool* always_only) {
  int64_t eligible = 0, kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    kept += always && always[i] ? 1 : 0;
    eligible += (always && always[i]) || !candidates || candidates[i] ? 1 : 0;
  }
  *always_only = kept > 0 && kept >= k;
  for (int64_t i = 0; i < count; ++i) {
    if (always && always[i]) {
      if (!*always_only) keys[i] = kAlwaysKey;
    } else if (*always_only || (candidates && !candidates[i])) {
      keys[i] = kExcluded;
    }
  }
  return *always_only ? kept : eligible;
}

// Positions of the selected keys in ascending order; returns their end.
static int64_t* pack_positions(const int32_t* keys, int64_t count, Cut cut, int64_t offset, int64_t* out, const int64_t* selected_end,
                               const int64_t* end) {
  int64_t i = 0;
  for (; cut.ties > 0 && i < count; i += kLanes) {
    Mask chosen = above(keys + i, cut.threshold), equal = above(keys + i, cut.threshold - 1) & ~chosen;
    for (; equal && cut.ties > 0; equal &= equal - 1, --cut.ties) chosen |= equal & -equal;
    out = append_positions(out, end, offset + i, chosen);
  }
  for (; out < selected_end; i += kLanes) out = append_positions(out, end, offset + i, above(keys + i, cut.threshold));
  return out;
}

struct Row {
  const void* scores;
  const uint8_t *candidates, *always;
  int64_t k;         // asked for
  int64_t* out;      // prefix | selection | suffix | -1 ...
  int32_t* scratch;  // layout.ints
};

// Reorders the `count` ascending positions in `out` (without offset) to descending score; always_keep tokens first.
static void order_by_score(const TopkParams& p, const TopkLayout& at, const Row& row, bool always_first, int64_t count) {
  uint32_t* const buffer = reinterpret_cast<uint32_t*>(row.scratch + 2 * at.padded);
  int32_t* const keys = row.scratch;
  make_keys(row.scores, p.dtype, p.N, keys);  // the selection may have replaced some of them
  int64_t done = 0;
  for (int pass = always_first ? 0 : 1; pass < 2; ++pass) {
    const Pairs x = {buffer, buffer + at.sorted}, other = {buffer + 2 * at.sorted, buffer + 3 * at.sorted};
    int64_t taken = 0, left = done;
    for (int64_t i = done; i < count; ++i) {
      const int64_t position = row.out[i];
      if (pass == 0 && !row.always[position]) {
        row.out[left++] = position;  // stays for the second pass
        continue;
      }
      x.key[taken] = ~(static_cast<uint32_t>(keys[position]) ^ 0x80000000u);
      x.position[taken++] = static_cast<uint32_t>(position);
    }
    Pairs sorted = x;
    if (taken <= kInsertionSort) {
      insertion_sort(x, taken);
    } else {
      sorted = radix_sort(x, other, taken);
    }
    for (int64_t i = left - 1; i >= done; --i) row.out[i + taken] = row.out[i];
    for (int64_t i = 0; i < taken; ++i) row.out[done + i] = sorted.position[i];
    done += taken;
  }
}

static void select_row(const TopkParams& p, const TopkLayout& at, const Row& row) {
  int32_t* const keys = row.scratch;
  int64_t* out = row.out;
  const int64_t* const end = out + topk_output_length(p);
  const int64_t offset = p.order == TopkOrder::kScore ? 0 : p.offset;
  for (int64_t i = 0; i < p.prefix; ++i) *out++ = p.offset - p.prefix + i;
  int64_t k = smaller(row.k, p.N);
  bool always_only = false;
  if (k == p.N && !row.candidates) {  // everything
    for (int64_t i = 0; i < k; ++i) *out++ = offset + i;
  } else if (k > 0) {
    make_keys(row.scores, p.dtype, p.N, keys);
    const int64_t count = at.padded - kLanes;
    for (int64_t i = p.N; i < count; ++i) keys[i] = kExcluded;
    int64_t eligible = p.N;
    if (row.candidates || row.always) eligible = apply_masks(row.candidates, row.always, p.N, k, keys, &always_only);
    k = smaller(k, eligible);
    if (k > 0) out = pack_positions(keys, count, find_cut(keys, count, eligible, k, keys + at.padded), offset, out, out + k, end);
  }
  if (p.order == TopkOrder::kScore && k > 0) {
    order_by_score(p, at, row, row.always && !always_only, k);
    for (int64_t i = 0; i < k; ++i) row.out[i] += p.offset;
  }
  for (int64_t i = 0; i < p.suffix; ++i) *out++ = p.offset + p.N + i;
  while (out < end) *out++ = -1;
}

Status topk_level(const TopkParams& p, ParallelForFn threads) {
  const TopkLayout at = topk_layout(p);
  const int64_t cost = (p.B / (at.groups + 1) + 1) * (p.N + 4 * at.sorted + 500);  // about 1 ns each
  parallel_for(threads, at.groups, 1 + 10000 / cost, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      int32_t* const scratch = static_cast<int32_t*>(p.workspace) + group * at.ints;
      for (int64_t b = group; b < p.B; b += at.groups) {
        const char* const scores = static_cast<const char*>(p.scores) + b * p.score_stride * dtype_bytes(p.dtype);
        select_row(p, at,
                   Row{scores, p.candidates ? p.candidates + b * p.candidates_stride : nullptr,
                       p.always_keep ? p.always_keep + b * p.always_keep_stride : nullptr, p.k_rows ? p.k_rows[b] : p.K,
                       p.index + b * topk_output_length(p), scratch});
      }
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status topk_level(const TopkParams& params, ParallelForFn threads))

Status topk_cpu(const TopkParams& params, const TopkPlan& plan, CpuLevel level, ParallelForFn threads) {
  const TopkParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("scores must be float32, float16 or bfloat16");
  if (p.N >= int64_t{1} << 31) return Status::error("N must be below 2^31");
  if (p.order == TopkOrder::kScore && (p.prefix != 0 || p.suffix != 0)) return Status::error("prefix and suffix need order \"position\"");
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  for (int64_t b = 0; p.k_rows && b < p.B; ++b) {
    if (p.k_rows[b] < 0 || p.k_rows[b] > p.K) return Status::error("every k must be in [0, max_k]");
  }
  TS_CPU_SWITCH(level, topk_level(params, threads))
}
}  // namespace tokensieve
#endif

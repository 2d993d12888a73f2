// Counts of select_mass and select_threshold on the CPU: scores [B, N] -> counts, take [B] int64, overflow [B].
//
// Threshold: one vector count of keys above the key of tau. Mass: bisection on the value of a key, where every step sums the masses of the
// keys above it; once under half of the keys can still hold the cut they are packed together. Masses are recomputed from the keys (six
// integer operations, four lanes of AVX2): a stored mass would be twice the bytes of a key.
//
// Bytes: N * dtype; about 10 N key visits in L1 or L2 of some 28 steps. Bound by instructions: one thread a row. No sort.
#include "select/count.h"
#include "select/keys_cpu.h"
#include "select/mass.h"

TS_ISA_BEGIN

struct Above {
  uint64_t mass = 0;
  int64_t count = 0;
};

// Keys > threshold, threshold >= 0.
TS_INLINE Above mass_above(const int32_t* keys, int64_t n, int32_t threshold, uint32_t largest, int shift) {
  Above out;
  if (largest == select::kInfBits) {
    for (int64_t i = 0; i < n; ++i) {
      out.count += keys[i] > threshold ? 1 : 0;
      out.mass += keys[i] > threshold && keys[i] == static_cast<int32_t>(select::kInfBits) ? 1 : 0;
    }
    return out;
  }
  const uint32_t top = largest >> 23 != 0 ? largest >> 23 : 1u;
  for (int64_t i = 0; i < n; ++i) {  // mass_of, written so that it vectorises
    const uint32_t bits = keys[i] > threshold ? static_cast<uint32_t>(keys[i]) : 0u;
    const uint32_t exponent = bits >> 23, hidden = exponent != 0 ? 0x800000u : 0u;
    const uint32_t down = top - (exponent != 0 ? exponent : 1u);
    out.mass += (static_cast<uint64_t>((bits & 0x7fffffu) | hidden) << shift) >> (down < 63u ? down : 63u);
    out.count += bits != 0 ? 1 : 0;
  }
  return out;
}

// Where the prefix ends: in (low, high] of the values of keys. `taken` tokens are above all that is left in keys, and of what is left
// mass(> high) < target <= mass(> low).
struct Search {
  const int32_t* keys;  // n of them, a multiple of 16
  int64_t n, taken;
  int32_t low, high;
  Above above_low, above_high;
  uint64_t target;
};

// Only the keys in (low, high] stay; in place after the first time.
TS_INLINE void pack_range(Search& s, int32_t* spare) {
  int64_t left = 0;
  for (int64_t i = 0; i < s.n; i += kLanes) {
    left += append_keys(spare + left, s.keys + i, above(s.keys + i, s.low) & ~above(s.keys + i, s.high));
  }
  s.taken += s.above_high.count;
  s.target -= s.above_high.mass;
  s.above_low = {s.above_low.mass - s.above_high.mass, s.above_low.count - s.above_high.count};
  s.above_high = {};
  s.n = (left + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = left; i < s.n; ++i) spare[i] = kExcluded;
  s.keys = spare;
}

constexpr uint32_t kRanges = 256;

// One step of 256 equal ranges of values: their masses in one pass, which takes five cycles a key; then the range of the cut is packed.
static void narrow(Search& s, uint32_t largest, int shift, int32_t* spare) {
  const uint32_t high = static_cast<uint32_t>(s.high), width = high - static_cast<uint32_t>(s.low);
  int down = 0;
  while ((width - 1) >> down >= kRanges) ++down;
  Above range[kRanges + 1];  // the last one: not in (low, high]
  for (int64_t i = 0; i < s.n; ++i) {
    const uint32_t below = high - static_cast<uint32_t>(s.keys[i]);
    Above& own = range[below < width ? below >> down : kRanges];
    own.mass += select::mass_of(static_cast<uint32_t>(s.keys[i]), largest, shift);
    own.count += 1;
  }
  uint32_t r = 0;
  for (; s.above_high.mass + range[r].mass < s.target; ++r) {
    s.above_high.mass += range[r].mass;
    s.above_high.count += range[r].count;
  }
  s.above_low = {s.above_high.mass + range[r].mass, s.above_high.count + range[r].count};
  const int64_t top = static_cast<int64_t>(s.high) - (static_cast<int64_t>(r) << down), bottom = top - (int64_t{1} << down);
  s.high = static_cast<int32_t>(top);
  s.low = bottom > s.low ? static_cast<int32_t>(bottom) : s.low;
  pack_range(s, spare);
}

// Tokens of the shortest prefix whose mass reaches `target`, 0 < target <= mass of all. keys: n of them, a multiple of 16.
static int64_t shortest_prefix(const int32_t* keys, int64_t n, Above all, uint64_t target, uint32_t largest, int shift, int32_t* spare) {
  const uint32_t top = largest >> 23;
  const int32_t massless = top > 41 && largest != select::kInfBits ? static_cast<int32_t>((top - 41) << 23) : 0;
  Search s = {keys, n, 0, least_above(keys, n, massless) - 1, static_cast<int32_t>(largest), all, {}, target};
  while (s.n > 128 && s.high - s.low > 1) narrow(s, largest, shift, spare);
  while (s.high - s.low > 1) {  // few keys: bisection
    const int32_t middle = s.low + (s.high - s.low) / 2;
    const Above here = mass_above(s.keys, s.n, middle, largest, shift);
    if (here.mass >= s.target) {
      s.low = middle;
      s.above_low = here;
    } else {
      s.high = middle;
      s.above_high = here;
    }
    if (s.n > 64 && (s.above_low.count - s.above_high.count) * 2 < s.n) pack_range(s, spare);
  }
  const uint64_t each = select::mass_of(static_cast<uint32_t>(s.high), largest, shift);  // one value left: ties
  return s.taken + s.above_high.count + static_cast<int64_t>((s.target - s.above_high.mass + each - 1) / each);
}

struct CountRow {
  const void* scores;
  const uint8_t *candidates, *always;
  double level;
  int32_t* scratch;  // keys[padded], spare[padded]
};

// Keys of the candidates; what is always kept is left out and summed up apart, so that it comes first.
static void count_row(const CountParams& p, int64_t b, int64_t padded, const CountRow& row) {
  const TopkParams& rows = p.rows;
  int32_t* const keys = row.scratch;
  const int64_t n = padded - kLanes;
  make_keys(row.scores, rows.dtype, rows.N, keys);
  for (int64_t i = rows.N; i < n; ++i) keys[i] = kExcluded;
  const bool by_mass = p.rule == CountRule::kReach || p.rule == CountRule::kBelow;
  int64_t always = 0, eligible = rows.N;
  int32_t largest = 0;
  for (int64_t i = 0; i < rows.N; ++i) largest = keys[i] > largest ? keys[i] : largest;
  if (row.candidates || row.always) {
    eligible = 0;
    largest = 0;
    for (int64_t i = 0; i < rows.N; ++i) {
      const bool first = row.always && row.always[i], exists = first || !row.candidates || row.candidates[i];
      if (exists && keys[i] > largest) largest = keys[i];
      if (!exists) keys[i] = kExcluded;
      eligible += exists ? 1 : 0;
      always += first ? 1 : 0;
    }
  }
  const int shift = select::mass_shift(rows.N);
  uint64_t first_mass = 0;
  for (int64_t i = 0; row.always && i < rows.N; ++i) {
    if (!row.always[i]) continue;
    if (by_mass && keys[i] > 0) first_mass += select::mass_of(static_cast<uint32_t>(keys[i]), static_cast<uint32_t>(largest), shift);
    keys[i] = kExcluded;
  }
  int64_t count = always;
  if (!by_mass) {
    const float tau = static_cast<float>(row.level);
    if (tau == tau) {
      const int32_t key = key_of(static_cast<int32_t>(bits_of_float(tau)));
      int64_t beyond = 0;
      const int32_t threshold = p.rule == CountRule::kAbove ? key : key - 1;
      for (int64_t i = 0; i < n; ++i) beyond += keys[i] > threshold ? 1 : 0;
      count += beyond;
    }
  } else {
    const Above all = mass_above(keys, n, 0, static_cast<uint32_t>(largest), shift);
    const uint64_t total = all.mass + first_mass, target = select::mass_target(p.rule, row.level, total);
    if (target > total) {
      count = eligible;
    } else if (target > first_mass) {
      count += shortest_prefix(keys, n, all, target - first_mass, static_cast<uint32_t>(largest), shift, keys + padded);
      count -= p.rule == CountRule::kBelow ? 1 : 0;
    }
  }
  select::store_count(p, b, select::limited_count(p, count, always, eligible));
}

Status count_level(const CountParams& p, ParallelForFn threads) {
  const TopkParams& rows = p.rows;
  const int64_t padded = (rows.N + kLanes - 1) / kLanes * kLanes + kLanes;
  const int64_t groups = rows.B < kCountGroups ? rows.B : kCountGroups;
  parallel_for(threads, groups, 1 + 10000 / (10 * rows.N * (rows.B / (groups + 1) + 1) + 500), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t b = group; b < rows.B; b += groups) {
        count_row(p, b, padded,
                  CountRow{static_cast<const char*>(rows.scores) + b * rows.score_stride * dtype_bytes(rows.dtype),
                           rows.candidates ? rows.candidates + b * rows.candidates_stride : nullptr,
                           rows.always_keep ? rows.always_keep + b * rows.always_keep_stride : nullptr,
                           p.levels ? static_cast<double>(p.levels[b]) : p.level, static_cast<int32_t*>(p.workspace) + group * 2 * padded});
      }
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status count_level(const CountParams& params, ParallelForFn threads))

Status count_cpu(const CountParams& params, const CountPlan& plan, CpuLevel level, ParallelForFn threads) {
  if (params.rows.dtype == DType::kBool) return Status::error("scores must be float32, float16 or bfloat16");
  if (params.rows.N >= int64_t{1} << 31) return Status::error("N must be below 2^31");
  if (plan.workspace_bytes > 0 && !params.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, count_level(params, threads))
}
}  // namespace tokensieve
#endif

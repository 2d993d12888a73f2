// complement_index on the CPU: index [B, K] int64 -> the other positions of [0, N) [B, capacity], ascending, padded with -1.
//
// Algorithm, one row at a time: a byte for every position, one pass that sets the named ones, one that packs 16 positions at a time.
// Bytes: 8 K + 8 capacity, and N in L1 or L2. Bound by the stores. Exact, the same on every level. Indices are checked before anything
// is written.
#include <cstddef>

#include "select/complement_cpu_layout.h"
#include "select/positions_cpu.h"
#include "select/topk_lanes_cpu.h"

TS_ISA_BEGIN

// Sets the bytes of the named positions; returns how many are left.
static int64_t mark_named(const ComplementParams& p, const int64_t* index, int64_t padded, uint8_t* named) {
  __builtin_memset(named, 0, static_cast<size_t>(p.N));
  for (int64_t i = p.N; i < padded; ++i) named[i] = 1;
  int64_t left = p.N;
  for (int64_t i = 0; i < p.K; ++i) {
    if (index[i] < 0) continue;
    left -= named[index[i]] == 0 ? 1 : 0;
    named[index[i]] = 1;
  }
  return left;
}

Status complement_level(const ComplementParams& p, ParallelForFn threads) {
  const ComplementLayout at = complement_layout(p);
  const Status positions = check_positions(p.index, p.index_stride, p.B, p.K, p.N);
  if (!positions.ok()) return positions;
  bool too_many[kComplementGroups] = {};
  const int64_t cost = (p.B / (at.groups + 1) + 1) * (p.N + 2 * p.K + 200);  // about 1 ns each
  parallel_for(threads, at.groups, 1 + 10000 / cost, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      uint8_t* const named = static_cast<uint8_t*>(p.workspace) + group * at.padded;
      for (int64_t b = group; b < p.B; b += at.groups) {
        too_many[group] |= mark_named(p, p.index + b * p.index_stride, at.padded, named) > p.capacity;
        int64_t* out = p.out + b * p.capacity;
        const int64_t* const stop = out + p.capacity;
        for (int64_t i = 0; i < p.N && out < stop; i += kLanes) out = append_positions(out, stop, i, ~nonzero_bytes(named + i) & 0xffffu);
        while (out < stop) *out++ = -1;
      }
    }
  });
  for (int64_t group = 0; group < at.groups; ++group) {
    if (too_many[group]) return Status::error("index must leave at most capacity positions in every row");
  }
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status complement_level(const ComplementParams& params, ParallelForFn threads))

Status complement_cpu(const ComplementParams& params, const ComplementPlan& plan, CpuLevel level, ParallelForFn threads) {
  if (params.B == 0) return Status::success();
  if (plan.workspace_bytes > 0 && !params.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, complement_level(params, threads))
}
}  // namespace tokensieve
#endif

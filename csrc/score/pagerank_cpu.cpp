// attention_pagerank on the CPU: query [B, H, N, D], key [B, Hkv, N, D] -> rank [B, H, N] float32: v <- v softmax(Q K^T), `iterations`
// times (AIM, arXiv 2412.03248).
//
// Algorithm. The strips of colsum_strip_cpu.h with v as row weights. The first pass finds the rows' normalisers on the way, so there is no
// pass for them alone; the others read them. Keys are packed once for all passes. Strips, parts and the order of their sums come from the
// shape alone: any number of threads, and every level, gives the same bits.
//
// Work: 2 B H N^2 D flops and B H N^2 exps a pass (half where causal). Bound by FMA. Memory as attention_scores, and 2 B H N floats.
#include "score/colsum_strip_cpu.h"
#include "score/pagerank_layout.h"

TS_ISA_BEGIN

struct Walk {
  const PagerankParams& p;
  const ScoreParams& rows;
  const PagerankLayout& at;
  float* work;
  int64_t wave;  // first pair of the wave
  bool first;    // pass
};

TS_INLINE float* sums_of(const Walk& w, int64_t head, int64_t part) {
  return w.work + w.at.columns.sums + (head * w.at.columns.parts + part) * w.at.columns.columns;
}

template <typename T>
static void pass_task(const Walk& w, int64_t task, float* slot) {
  const ColsumLayout& at = w.at.columns;
  const int64_t part = task % at.parts, in_wave = task / at.parts / at.group, pair = w.wave + in_wave;
  HeadRows rows = {};
  rows.b = pair / w.p.Hkv, rows.h = pair % w.p.Hkv * at.group + task / at.parts % at.group, rows.slot = slot;
  const int64_t head = rows.b * w.p.H + rows.h;
  rows.packed = w.work + at.packed + in_wave * at.packed_pair;
  rows.weights = w.work + w.at.rank + head * w.p.N;
  float* lse = w.work + w.at.lse + head * w.p.N;
  rows.lse_out = w.first ? lse : nullptr;
  rows.lse_in = w.first ? nullptr : lse;
  rows.columns = sums_of(w, head, part);
  for (int64_t n = 0; n < at.columns; n += kLanes) store(rows.columns + n, zero());
  for (int64_t block = part; block < at.blocks; block += at.parts) {
    strip<T>(w.rows, at, rows, block * kStripRows, smaller(kStripRows, w.p.N - block * kStripRows));
  }
}

static void add_parts(const Walk& w, int64_t head, float* rank) {
  for (int64_t n = 0; n < w.p.N; n += kLanes) {
    Vec x = load(sums_of(w, head, 0) + n);
    for (int64_t part = 1; part < w.at.columns.parts; ++part) x = add(x, load(sums_of(w, head, part) + n));
    store_upto(rank + n, x, w.p.N - n);
  }
}

template <typename T>
static void walk(const PagerankParams& p, ParallelForFn threads) {
  const ScoreParams rows = pagerank_rows(p);
  const PagerankLayout at = pagerank_layout(p);
  float* work = static_cast<float*>(p.workspace);
  const int64_t panels = (p.N + kPanelKeys - 1) / kPanelKeys, group = at.columns.group;
  for (int64_t wave = 0; wave < at.columns.pairs; wave += at.columns.wave) {
    const int64_t pairs = smaller(at.columns.wave, at.columns.pairs - wave);
    parallel_for(threads, pairs * panels, 1 + 65536 / (kPanelKeys * p.D + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* packed = work + at.columns.packed + i / panels * at.columns.packed_pair;
        pack_keys<T>(rows, at.columns, wave + i / panels, packed, i % panels, i % panels + 1);
      }
    });
    for (int64_t pass = 0; pass < p.iterations; ++pass) {
      const Walk w = {p, rows, at, work, wave, pass == 0};
      parallel_for(threads, pairs * group * at.columns.parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pass_task<T>(w, i, work + at.columns.slots + begin * at.columns.slot);
      });
      parallel_for(threads, pairs * group, 1 + 100000 / (p.N * at.columns.parts + 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = wave * group + i;  // pairs lie in the order of heads
          add_parts(w, head, (pass + 1 < p.iterations ? work + at.rank : p.rank) + head * p.N);
        }
      });
    }
  }
}

Status pagerank_level(const PagerankParams& p, ParallelForFn threads) {
  float* first = p.iterations > 0 ? static_cast<float*>(p.workspace) + pagerank_layout(p).rank : p.rank;
  for (int64_t head = 0; head < p.B * p.H; ++head) {
    const float* start = p.start ? p.start + head / p.H * p.N : nullptr;
    for (int64_t n = 0; n < p.N; ++n) first[head * p.N + n] = start ? start[n] : 1.0f / static_cast<float>(p.N);
  }
  if (p.iterations == 0) return Status::success();
  if (p.dtype == DType::kFloat32) {
    walk<float>(p, threads);
  } else if (p.dtype == DType::kFloat16) {
    walk<Half>(p, threads);
  } else {
    walk<BFloat>(p, threads);
  }
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status pagerank_level(const PagerankParams& params, ParallelForFn threads))

Status pagerank_cpu(const PagerankParams& params, const PagerankPlan& plan, CpuLevel level, ParallelForFn threads) {
  const PagerankParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("query and key must be float32, float16 or bfloat16");
  if (p.Hkv > 0 && p.H % p.Hkv != 0) return Status::error("the number of query heads must be a multiple of the number of key heads");
  if (p.iterations < 0) return Status::error("iterations must be at least 0");
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  if (p.B == 0 || p.H == 0 || p.N == 0) return Status::success();
  TS_CPU_SWITCH(level, pagerank_level(params, threads))
}
}  // namespace tokensieve
#endif

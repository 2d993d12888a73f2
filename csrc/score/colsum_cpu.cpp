// attention_scores of many query rows on the CPU: query [B, H, L, D], key [B, Hkv, N, D] (float32, float16, bfloat16) -> scores
// [B, H or 1, 1, R] float32 (or [B, H, L, R]), lse [B, H, L].
//
// Algorithm. Keys of a wave of key heads are packed into panels of 16 (AVX-512: 32), in float32. A task is one part of a query head's
// strips of 24 rows; it keeps its own column sums. A strip computes all its logits (register tiles of rows x panel), then row maxima, exps
// and row sums, then adds factor * exp to the columns: one product and one exp per element. The last step adds the parts, divides, and
// reduces the heads. Parts take every parts-th strip, so that causal ones are equally long. Cuts come from the shape alone and every sum
// has one order: any number of threads, and every level, gives the same bits.
//
// Work: 2 B H L N D flops (half of it where causal), B H L N exps. Strip of 24 x 2944 keys: 290 KB, in L2; a packed panel stays in L1 for
// 24 rows. Bound by FMA. Cycles of one AVX2 core (Zen 5, 32 flops each) at 577 x 64: products 22 of 29 million (their floor is 21), exps 5,
// packing and column sums 2; AVX-512 takes 17 in all. Memory: B H parts R floats, at most 8 MB of packed keys (or one key head), a strip
// per thread.
// A NaN logit makes its row NaN on the keys that the row sees. A row that sees nothing is 0, its lse -inf.
#include "score/colsum.h"
#include "score/colsum_strip_cpu.h"
#include "score/score_finish_cpu.h"

TS_ISA_BEGIN

static float* sums_of(const ScoreParams& p, const ColsumLayout& at, int64_t head, int64_t part) {  // head = b * H + h
  return static_cast<float*>(p.workspace) + at.sums + (head * at.parts + part) * at.columns;
}

template <typename T>
static void run_task(const ScoreParams& p, const ColsumLayout& at, int64_t wave, int64_t task, float* slot) {
  const int64_t part = task % at.parts, in_wave = task / at.parts / at.group, pair = wave * at.wave + in_wave;
  const int64_t b = pair / p.Hkv, h = pair % p.Hkv * at.group + task / at.parts % at.group, head = b * p.H + h;
  const bool weighted = p.row_weights && p.query_reduction != Reduction::kNone && p.query_reduction != Reduction::kMax;
  HeadRows rows = {};
  rows.b = b, rows.h = h, rows.slot = slot;
  rows.packed = static_cast<float*>(p.workspace) + at.packed + in_wave * at.packed_pair;
  rows.weights = weighted ? p.row_weights + b * p.L : nullptr;
  rows.lse_in = p.lse_in ? p.lse_in + head * p.L : nullptr;
  rows.lse_out = p.lse_out ? p.lse_out + head * p.L : nullptr;
  if (p.query_reduction == Reduction::kNone) {
    rows.scores = p.scores + head * p.L * (p.range_end - p.range_begin);
  } else {
    rows.columns = sums_of(p, at, head, part);
    for (int64_t n = 0; n < at.columns; n += kLanes) store(rows.columns + n, hidden_value(p));
  }
  for (int64_t block = part; block < at.blocks; block += at.parts) {
    strip<T>(p, at, rows, block * kStripRows, smaller(kStripRows, p.L - block * kStripRows));
  }
}

// Row reduction of a head: its parts in order.
TS_INLINE void add_parts(const ScoreParams& p, const ColsumLayout& at, const Slice& s, int64_t h, Vec* x) {
  for (int64_t part = 0; part < at.parts; ++part) {
    const float* sums = sums_of(p, at, s.b * p.H + h, part) + s.key - p.range_begin;  // whole vectors: rows are padded to 64
    for (int v = 0; v < kReduceVecs; ++v) {
      const Vec y = load(sums + v * kLanes);
      x[v] = part == 0 ? y : p.query_reduction == Reduction::kMax ? nan_max(x[v], y) : add(x[v], y);
    }
  }
}

template <typename T>
static void run_all_rows(const ScoreParams& p, const ColsumLayout& at, ParallelForFn threads) {
  float* work = static_cast<float*>(p.workspace);
  const int64_t panels = (at.key_end - at.key_begin + kPanelKeys - 1) / kPanelKeys;
  for (int64_t wave = 0; wave * at.wave < at.pairs; ++wave) {
    const int64_t pairs = smaller(at.wave, at.pairs - wave * at.wave);
    parallel_for(threads, pairs * panels, 1 + 65536 / (kPanelKeys * p.D + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i / panels;
        pack_keys<T>(p, at, wave * at.wave + pair, work + at.packed + pair * at.packed_pair, i % panels, i % panels + 1);
      }
    });
    parallel_for(threads, pairs * at.group * at.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run_task<T>(p, at, wave, i, work + at.slots + begin * at.slot);
    });
  }
  if (p.query_reduction == Reduction::kNone) return;
  const int64_t slices = colsum_ceil(p.range_end - p.range_begin, kReduceVecs * kLanes);
  parallel_for(threads, p.B * slices, 1 + 100000 / (64 * p.H * at.parts + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t key = p.range_begin + i % slices * kReduceVecs * kLanes;
      const Slice s = make_slice(p, i / slices, key, smaller(kReduceVecs * kLanes, p.range_end - key));
      finish_heads(p, s, [&](int64_t h, Vec* x) { add_parts(p, at, s, h, x); });
    }
  });
}

Status colsum_level(const ScoreParams& p, ParallelForFn threads) {
  const ColsumLayout at = colsum_layout(p);
  if (p.dtype == DType::kFloat32) {
    run_all_rows<float>(p, at, threads);
  } else if (p.dtype == DType::kFloat16) {
    run_all_rows<Half>(p, at, threads);
  } else {
    run_all_rows<BFloat>(p, at, threads);
  }
  return Status::success();
}

TS_ISA_END

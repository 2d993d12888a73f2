// cosine_match and cosine_scores on the CPU: a [B, M, C], b [B, N, C] (float32, float16, bfloat16) -> the T best columns of every row of
// a, or every similarity, or one value a row. Sources: ToMe (arXiv 2210.09461, section 3), DART (arXiv 2502.11494, section 3.3).
//
// Algorithm: a is packed into panels and scaled to norm 1, b is packed as it is; blocks of 144 x 144 dot products stay in L2, are scaled by
// 1 / |b| and reduced there, so the M x N matrix is never stored (kNone stores it, being asked to). With one block of rows (text queries,
// pivots) b is packed block by block in L2 and read from memory once. kMatch and kMax: a row is scanned 16 columns at a time for values
// above its worst kept one, which random data meets T * ln(N / T) times. Lists of different column ranges merge in order.
// One neighbour of many channels: int16 products first, exact ones of the candidates (cosine_filter_cpu.h).
//
// Work: M N C multiply-adds; M = N = 577, C = 64: 21 M, 0.3 ms on one AVX2 core. M = 16, N = 2880, C = 4096: bound by reading b (47 MB).
// Exact and deterministic: same bits on every level and number of threads; ties to the lowest index, NaN last.
#include "similarity/cosine_block_cpu.h"
#include "similarity/cosine_filter_cpu.h"

TS_ISA_BEGIN

namespace {

template <typename T>
void pack_a(const Task& t, int64_t g, int64_t panel) {
  const CosineParams& p = t.p;
  const T* row[kLanes];  // behind the last row, that one again
  for (int j = 0; j < kLanes; ++j) row[j] = a_row<T>(p, t.first_image + g, smaller(panel * kPanelRows + j, p.M - 1));
  float* const to = a_panels(t, g) + panel * dot_panel_floats(p.C);
  dots::scale_panel(to, p.C, dots::inverse_norm(dots::pack_panel(row, p.C, to)));
  if (!t.at.filter) return;
  const Vec error = rounded::round_panel(to, p.C, splat(1.0f), filter::a_items(t, g) + panel * filter::panel_items(p));
  store(filter::a_error(t, g) + panel * kPanelRows, error);
}

template <typename T>
void pack_b(const Task& t, int64_t g, int64_t panel) {
  const CosineParams& p = t.p;
  const T* row[kLanes];
  for (int j = 0; j < kLanes; ++j) row[j] = b_row<T>(p, t.first_image + g, smaller(panel * kPanelRows + j, p.N - 1));
  float* const to = b_panels(t, g) + panel * dot_panel_floats(p.C);
  const Vec inverse = dots::inverse_norm(dots::pack_panel(row, p.C, to));
  store(b_inverse(t, g) + panel * kPanelRows, inverse);
  if (!t.at.filter) return;
  const Vec error = rounded::round_panel(to, p.C, inverse, filter::b_items(t, g) + panel * filter::panel_items(p));
  store(filter::b_error(t, g) + panel * kPanelRows, error);
}

// Packs 128 channels of every panel of b in turn and multiplies.
template <typename T>
void multiply_unpacked(const Task& t, dots::Side a, Block& x) {
  alignas(64) float packed[kBlockPanels * dots::kDims * kLanes];
  const CosineParams& p = t.p;
  const int64_t panels = dot_ceil(x.columns, kPanelRows);
  Vec squares[kBlockPanels];
  for (int64_t i = 0; i < panels; ++i) squares[i] = zero();
  int64_t d = 0;
  do {
    const int64_t dims = smaller(dots::kDims, p.C - d);
    for (int64_t i = 0; i < panels; ++i) {
      const T* row[kLanes];
      for (int j = 0; j < kLanes; ++j) row[j] = b_row<T>(p, x.b, smaller(x.column + i * kPanelRows + j, p.N - 1));
      squares[i] = add(squares[i], dots::pack(row, d, dims, packed + i * dots::kDims * kLanes));
    }
    dots::block({a.data + d * kLanes, a.panel_step}, x.rows, {packed, dots::kDims * kLanes}, panels, dims, d == 0, false, x.dot, kDotBlock);
    d += dots::kDims;
  } while (d < p.C);
  for (int64_t i = 0; i < panels; ++i) store(x.inverse + i * kLanes, dots::inverse_norm(squares[i]));
}

template <typename T>
void multiply(const Task& t, int64_t g, Block& x) {
  const CosineParams& p = t.p;
  const int64_t panel = dot_panel_floats(p.C), panels = dot_ceil(x.columns, kPanelRows);
  const dots::Side a = {a_panels(t, g) + x.row / kPanelRows * panel, panel};
  if (t.at.pack_b) {
    dots::all_channels(a, x.rows, {b_panels(t, g) + x.column / kPanelRows * panel, panel}, panels, p.C, false, x.dot, kDotBlock);
    for (int64_t i = 0; i < panels * kLanes; i += kLanes) store(x.inverse + i, load(b_inverse(t, g) + x.column + i));
  } else {
    multiply_unpacked<T>(t, a, x);
  }
  for (int64_t i = 0; !p.largest && i < panels * kLanes; i += kLanes) store(x.inverse + i, mul(load(x.inverse + i), splat(-1.0f)));
  find_allowed(p, x);
}

// Puts a column into a descending list of `keep`; after its equals, which have lower indices.
TS_INLINE void insert(float* rank, float* index, int64_t keep, float value, float column) {
  int64_t at = keep - 1;
  for (; at > 0 && value > rank[at - 1]; --at) {
    rank[at] = rank[at - 1];
    index[at] = index[at - 1];
  }
  rank[at] = value;
  index[at] = column;
}

// A row's list in registers: 16 * kVecs places, descending. Without branches an insertion costs about 10 cycles; scalar code took 50 ns.
template <int kVecs>
struct List {
  Vec rank[kVecs], index[kVecs];

  TS_INLINE void put(Vec value, Vec column, List& x) {
#pragma GCC unroll 2
    for (int i = kVecs - 1; i >= 0; --i) {
      const Vec above = shift_up(x.rank[i], i > 0 ? x.rank[i - 1] : splat(kInfinity));
      const Vec above_index = shift_up(x.index[i], i > 0 ? x.index[i - 1] : zero());
      const Mask moved = greater(value, above), better = greater(value, x.rank[i]);
      x.rank[i] = select(moved, above, select(better, value, x.rank[i]));
      x.index[i] = select(moved, above_index, select(better, column, x.index[i]));
    }
  }
};

// Merges the columns of a block into the lists of its rows.
template <int kVecs>
void scan_lists(const Task& t, const Block& x, float* rank, float* index) {
  const int64_t keep = t.at.keep, panels = dot_ceil(x.columns, kPanelRows);
  for (int64_t r = 0; r < x.rows; ++r, rank += keep, index += keep) {
    List<kVecs> list;
    alignas(64) float ranks[kVecs * kLanes], lane[kLanes];
    for (int v = 0; v < kVecs; ++v) {
      list.rank[v] = load_upto(rank + v * kLanes, keep - v * kLanes);
      list.index[v] = load_upto(index + v * kLanes, keep - v * kLanes);
    }
    float worst = rank[keep - 1];
    for (int64_t i = 0; i < panels; ++i) {
      Vec value = mul(load(x.dot + r * kDotBlock + i * kLanes), load(x.inverse + i * kLanes));
      value = select(is_nan(value), splat(kNanRank), value);
      Mask better = greater(value, splat(worst)) & taken(t.p, x, x.row + r, i);
      if (!better) continue;
      store(lane, value);
      for (; better; better &= better - 1) {
        const int j = __builtin_ctz(better);
        List<kVecs>::put(splat(lane[j]), splat(as_index(x.column + i * kLanes + j)), list);
      }
      for (int v = 0; v < kVecs; ++v) store(ranks + v * kLanes, list.rank[v]);
      worst = ranks[keep - 1];
    }
    for (int v = 0; v < kVecs; ++v) {
      store_n(rank + v * kLanes, list.rank[v], keep - v * kLanes);
      store_n(index + v * kLanes, list.index[v], keep - v * kLanes);
    }
  }
}

// The same for one match a row: every lane keeps its own best, with the panel that it came from (a branch a panel: 3 times as slow).
void scan_best(const Task& t, const Block& x, float* rank, float* index) {
  const int64_t panels = dot_ceil(x.columns, kPanelRows);
  for (int64_t r = 0; r < x.rows; ++r) {
    Vec best = splat(-kInfinity), from = zero();
    for (int64_t i = 0; i < panels; ++i) {
      Vec value = mul(load(x.dot + r * kDotBlock + i * kLanes), load(x.inverse + i * kLanes));
      value = where_nan(value, splat(kNanRank), value);
      const Mask allowed = taken(t.p, x, x.row + r, i);
      if (allowed != first_lanes(kLanes)) value = select(allowed, value, splat(-kInfinity));
      from = where_greater(value, best, splat(static_cast<float>(i)), from);
      best = where_greater(value, best, value, best);
    }
    const float most = reduce_max(best);
    if (!(most > rank[r])) continue;
    float panel[kLanes];
    store(panel, from);
    int64_t lowest = x.columns;
    for (Mask equal = ~greater(splat(most), best) & first_lanes(kLanes); equal; equal &= equal - 1) {
      const int j = __builtin_ctz(equal);
      lowest = smaller(lowest, static_cast<int64_t>(panel[j]) * kLanes + j);
    }
    rank[r] = most;
    index[r] = as_index(x.column + lowest);
  }
}

void scan_block(const Task& t, const Block& x, float* rank, float* index) {
  if (t.at.keep == 1) {
    scan_best(t, x, rank, index);
  } else if (t.at.keep <= kLanes) {
    scan_lists<1>(t, x, rank, index);
  } else {
    scan_lists<2>(t, x, rank, index);
  }
}

void store_block(const Task& t, const Block& x) {
  const CosineParams& p = t.p;
  for (int64_t r = 0; r < x.rows; ++r) {
    float* const to = p.value + (x.b * p.M + x.row + r) * p.N + x.column;
    for (int64_t i = 0; i * kLanes < x.columns; ++i) {
      const Vec value = mul(load(x.dot + r * kDotBlock + i * kLanes), load(x.inverse + i * kLanes));
      store_n(to + i * kLanes, select(taken(p, x, x.row + r, i), value, zero()), x.columns - i * kLanes);
    }
  }
}

template <typename T>
void run_task(const Task& t, int64_t g, int64_t row_block, int64_t split) {
  const CosineParams& p = t.p;
  Block x;
  x.b = t.first_image + g;
  x.row = row_block * t.at.block_rows;
  x.rows = smaller(t.at.block_rows, p.M - x.row);
  const int64_t list = ((g * t.at.splits + split) * p.M + x.row) * t.at.keep;
  float* const rank = static_cast<float*>(p.workspace) + t.at.rank + list;
  float* const index = static_cast<float*>(p.workspace) + t.at.index + list;
  const bool stores = p.reduction == CosineReduction::kNone;
  for (int64_t i = 0; !stores && i < x.rows * t.at.keep; ++i) {
    rank[i] = -kInfinity;
    index[i] = as_index(-1);
  }
  const int64_t first = split * t.at.column_blocks / t.at.splits, last = (split + 1) * t.at.column_blocks / t.at.splits;
  x.column = first * kDotBlock;
  if (t.at.filter && filter::nearest<T>(t, g, x, smaller(last * kDotBlock, p.N) - x.column, rank, index)) return;
  for (int64_t c = first; c < last; ++c) {
    x.column = c * kDotBlock;
    x.columns = smaller(kDotBlock, p.N - x.column);
    multiply<T>(t, g, x);
    if (stores) {
      store_block(t, x);
    } else {
      scan_block(t, x, rank, index);
    }
  }
}

// Merges the lists of all splits into the first, in order, and emits it.
void finish_row(const Task& t, int64_t g, int64_t m) {
  const CosineParams& p = t.p;
  const int64_t keep = t.at.keep, step = p.M * keep, first = g * t.at.splits * step + m * keep;
  float* const rank = static_cast<float*>(p.workspace) + t.at.rank + first;
  float* const index = static_cast<float*>(p.workspace) + t.at.index + first;
  for (int64_t s = 1; s < t.at.splits; ++s) {
    for (int64_t i = 0; i < keep && rank[s * step + i] > rank[keep - 1]; ++i) {
      insert(rank, index, keep, rank[s * step + i], index[s * step + i]);
    }
  }
  const int64_t out = ((t.first_image + g) * p.M + m) * keep;
  for (int64_t i = 0; i < keep; ++i) {
    const float value = rank[i] == kNanRank ? __builtin_nanf("") : p.largest ? rank[i] : 0.0f - rank[i];
    const int32_t column = static_cast<int32_t>(bits_of_float(index[i]));
    p.value[out + i] = column < 0 ? 0.0f : value;
    if (p.reduction == CosineReduction::kMatch) p.index[out + i] = column;
  }
}

template <typename T>
void run_images(const Task& t, ParallelForFn threads) {
  const CosineParams& p = t.p;
  const int64_t a_count = dot_ceil(p.M, kPanelRows), b_count = dot_ceil(p.N, kPanelRows), pack_grain = 1 + 4000 / (p.C + 1);
  parallel_for(threads, t.images * a_count, pack_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_a<T>(t, i / a_count, i % a_count);
  });
  if (t.at.pack_b) {
    parallel_for(threads, t.images * b_count, pack_grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_b<T>(t, i / b_count, i % b_count);
    });
  }
  const int64_t tasks = t.at.row_blocks * t.at.splits;
  const int64_t cost = smaller(p.M, t.at.block_rows) * (p.N / t.at.splits) * (p.C + 16);  // about 16 a nanosecond
  parallel_tasks(threads, t.images * tasks, 1 + 400000 / (cost + 1),
                 [&](int64_t i) { run_task<T>(t, i / tasks, i % tasks / t.at.splits, i % t.at.splits); });
  if (p.reduction == CosineReduction::kNone) return;
  parallel_for(threads, t.images * p.M, 1 + 20000 / (10 + t.at.splits * t.at.keep), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) finish_row(t, i / p.M, i % p.M);
  });
}

template <typename T>
void run(const CosineParams& p, const CosineLayout& at, ParallelForFn threads) {
  for (int64_t b = 0; b < p.B; b += at.images) {
    const Task t = {p, at, b, smaller(at.images, p.B - b)};
    if (at.sums) {
      sums::run<T>(t, threads);
    } else {
      run_images<T>(t, threads);
    }
  }
}

}  // namespace

Status cosine_level(const CosineParams& p, ParallelForFn threads) {
  const CosineLayout at = cosine_layout(p);
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
TS_CPU_LEVELS(Status cosine_level(const CosineParams& params, ParallelForFn threads))

Status cosine_cpu(const CosineParams& params, const CosinePlan& plan, CpuLevel level, ParallelForFn threads) {
  const CosineParams& p = params;
  if (p.dtype == DType::kBool) return Status::error("a and b must be float32, float16 or bfloat16");
  if (p.N >= int64_t{1} << 31) return Status::error("N must be below 2^31");
  if (p.T < 1 || p.T > kMaxNeighbours) return Status::error("k must be in [1, 32]");
  if (p.reduction != CosineReduction::kMatch && !p.largest) return Status::error("only kMatch looks for the lowest similarity");
  if (p.B == 0 || p.M == 0) return Status::success();
  if (plan.workspace_bytes > 0 && !p.workspace) return Status::error("workspace is missing");
  TS_CPU_SWITCH(level, cosine_level(params, threads))
}
}  // namespace tokensieve
#endif

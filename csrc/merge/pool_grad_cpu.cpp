// Gradient of pool_grid on the CPU: grad [B, R, C] contiguous -> that of every token [B, N, C] and (kSoftmax) of every score [B, N].
//
// Algorithm: windows that tile the grid are taken one after the other, each writes its tokens. Otherwise token by token, a gather over the
//   outputs whose windows hold it (neighbours on each axis), so a value has one writer. kMax asks in each window whether an earlier token
//   has the same value; kSoftmax has the windows' weights in the workspace.
// Work: bytes (N + R) C; kMax and kSoftmax read x and out too. Bound by memory.
// Deterministic: float32, outputs in ascending raster order; sums over channels in 16 lanes and then the fixed tree.
#include <cstring>

#include "core/simd_narrow.h"
#include "merge/pool_args.h"

TS_ISA_BEGIN

using pool::Range;

void pool_weights_level(const PoolParams& p, ParallelForFn threads);  // pool_cpu.cpp

// A token and the outputs around it.
struct Place {
  int64_t at[3];
  Range outputs[3];
};

TS_INLINE Place place_of(const PoolParams& p, int64_t n) {
  Place place;
  for (int axis = 2; axis >= 0; --axis) {
    place.at[axis] = n % p.axes[axis].in, n /= p.axes[axis].in;
    place.outputs[axis] = pool::outputs_of(p.axes[axis], p.kind, p.adaptive, place.at[axis]);
  }
  return place;
}

constexpr int kCovers = 64;       // outputs around a token that one pass over the channels adds; more take several passes
constexpr int64_t kChunk = 1024;  // channels whose running sums are kept meanwhile: 4 KB of stack

TS_INLINE int64_t size_of(const Range& r) { return r.end - r.begin; }

// An output around a token: its row, its window, the token's place in it and its weight.
struct Cover {
  int64_t row, slot;
  Range box[3];
  float weight;
};

// One axis of an output around a token: its window there, and (kBilinear) the token's weight.
struct Side {
  Range box;
  float weight;
};

TS_INLINE Side side_of(const PoolParams& p, const Place& place, int axis, int64_t o) {
  const PoolAxis& a = p.axes[axis];
  const float weight = p.kind == PoolKind::kBilinear ? pool::bilinear_weight(a, o, place.at[axis]) : 1.0f;
  return {pool::tokens_of(a, p.kind, p.adaptive, o), weight};
}

TS_INLINE Cover cover_of(const PoolParams& p, int64_t b, const Place& place, int64_t row, const Side& t, const Side& y, const Side& x) {
  Cover c = {row, 0, {t.box, y.box, x.box}, t.weight * y.weight * x.weight};
  c.slot = ((place.at[0] - t.box.begin) * size_of(y.box) + place.at[1] - y.box.begin) * size_of(x.box) + place.at[2] - x.box.begin;
  if (p.kind == PoolKind::kMean) c.weight = 1.0f / static_cast<float>(size_of(t.box) * size_of(y.box) * size_of(x.box));
  if (p.kind == PoolKind::kSoftmax) {
    c.weight = static_cast<const float*>(p.workspace)[(b * pool::outputs(p) + row) * pool::window(p) + c.slot];
  }
  return c;
}

// Calls f(covers, count, first, last) for the outputs around the token in raster order, at most 64 at a time and at least once.
template <typename F>
TS_INLINE void each_group(const PoolParams& p, int64_t b, const Place& place, F&& f) {
  constexpr int64_t kKept = 8;  // sides of the last axis that are not made anew for every row: a side is 4 divisions
  Cover covers[kCovers];
  Side kept[kKept];
  int count = 0;
  bool first = true;
  const Range &of_t = place.outputs[0], &of_y = place.outputs[1], &of_x = place.outputs[2];
  for (int64_t i = 0; i < smaller(kKept, size_of(of_x)); ++i) kept[i] = side_of(p, place, 2, of_x.begin + i);
  for (int64_t t = of_t.begin; t < of_t.end; ++t) {
    const Side side_t = side_of(p, place, 0, t);
    for (int64_t y = of_y.begin; y < of_y.end; ++y) {
      const Side side_y = side_of(p, place, 1, y);
      for (int64_t x = of_x.begin; x < of_x.end; ++x) {
        if (count == kCovers) {
          f(covers, count, first, false);
          count = 0, first = false;
        }
        const Side side_x = x - of_x.begin < kKept ? kept[x - of_x.begin] : side_of(p, place, 2, x);
        covers[count] = cover_of(p, b, place, (t * p.axes[1].out + y) * p.axes[2].out + x, side_t, side_y, side_x);
        if (p.kind != PoolKind::kBilinear || covers[count].weight != 0.0f) ++count;
      }
    }
  }
  f(covers, count, first, true);
}

// The lanes of `open` where no token before the place, in the raster order of the window, equals `best`.
template <typename T>
TS_INLINE Mask first_equal(const PoolParams& p, const T* x, const Place& place, const Range* box, Vec best, Mask open, int64_t left) {
  for (int64_t t = box[0].begin; t <= place.at[0] && open != 0; ++t) {
    const int64_t last_y = t < place.at[0] ? box[1].end - 1 : place.at[1];
    for (int64_t y = box[1].begin; y <= last_y && open != 0; ++y) {
      const int64_t end = t == place.at[0] && y == place.at[1] ? place.at[2] : box[2].end;
      for (int64_t i = box[2].begin; i < end && open != 0; ++i) {
        const Vec value = load_upto(x + ((t * p.axes[1].in + y) * p.axes[2].in + i) * p.stride_n, left);
        open &= greater(value, best) | greater(best, value) | (is_nan(value) ^ is_nan(best));
      }
    }
  }
  return open;
}

// One batch row's tensors.
template <typename T>
struct Rows {
  const T *x, *grad, *out;
  T* to;
};

// The usual case, one group of outputs: 64 channels at a time in registers. Returns the first channel that is left.
template <typename T>
TS_INLINE int64_t add_whole(const PoolParams& p, const Rows<T>& rows, int64_t n, const Cover* covers, int count, int64_t begin,
                            int64_t end) {
  int64_t c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < count; ++i) {
      const T* const grad = rows.grad + covers[i].row * p.C + c;
      const Vec weight = splat(covers[i].weight);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = fma(weight, load(grad + v * kLanes), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(rows.to + n * p.C + c + v * kLanes, sum[v]);
  }
  return c;
}

template <typename T, bool kMax>
static void add_covers(const PoolParams& p, const Rows<T>& rows, int64_t n, const Place& place, const Cover* covers, int count,
                       int64_t begin, int64_t end, const float* before, float* sums) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t left = end - c;
    Vec sum = before == nullptr ? zero() : load_upto(before + c - begin, left), value = zero();
    if constexpr (kMax) value = load_upto(rows.x + n * p.stride_n + c, left);
    for (int i = 0; i < count; ++i) {
      const Vec grad = load_upto(rows.grad + covers[i].row * p.C + c, left);
      if constexpr (kMax) {
        const Vec best = load_upto(rows.out + covers[i].row * p.C + c, left);
        const Mask differs = greater(value, best) | greater(best, value) | (is_nan(value) ^ is_nan(best));
        const Mask wins = first_equal(p, rows.x + c, place, covers[i].box, best, ~differs & first_lanes(left), left);
        sum = select(wins, add(sum, grad), sum);
      } else {
        sum = fma(splat(covers[i].weight), grad, sum);
      }
    }
    if (sums != nullptr) {
      store_upto(sums + c - begin, sum, left);
    } else {
      store_upto(rows.to + n * p.C + c, sum, left);
    }
  }
}

template <typename T, bool kMax>
static void summed_token(const PoolParams& p, const Rows<T>& rows, int64_t b, int64_t n, const Place& place) {
  alignas(64) float sums[kChunk];
  for (int64_t begin = 0; begin < p.C; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, p.C);
    each_group(p, b, place, [&](const Cover* covers, int count, bool first, bool last) {
      const int64_t from = !kMax && first && last ? add_whole(p, rows, n, covers, count, begin, end) : begin;
      add_covers<T, kMax>(p, rows, n, place, covers, count, from, end, first ? nullptr : sums, last ? nullptr : sums);
    });
  }
}

// Sum over the windows of weight / temperature * grad . (x - out).
template <typename T>
static float score_grad(const PoolParams& p, const Rows<T>& rows, int64_t b, int64_t n, const Place& place) {
  const T* const x = rows.x + n * p.stride_n;
  float total = 0.0f;
  each_group(p, b, place, [&](const Cover* covers, int count, bool, bool) {
    for (int i = 0; i < count; ++i) {
      const T *const grad = rows.grad + covers[i].row * p.C, *const out = rows.out + covers[i].row * p.C;
      Vec sum = zero();
      for (int64_t c = 0; c < p.C; c += kLanes) {
        const int64_t left = p.C - c;
        sum = fma(load_upto(grad + c, left), sub(load_upto(x + c, left), load_upto(out + c, left)), sum);
      }
      total = total + covers[i].weight / p.temperature * reduce_add(sum);
    }
  });
  return total;
}

// Windows that do not overlap give a token one output at most: then the outputs are taken one after the other, and grad is read once.
TS_INLINE bool tiles(const PoolParams& p) {
  bool apart = p.kind == PoolKind::kMean || p.kind == PoolKind::kMax || p.kind == PoolKind::kStack;
  for (const PoolAxis& a : p.axes) apart &= a.out == 1 || (p.adaptive ? a.span % a.step == 0 : a.step >= a.span);
  return apart;
}

// Some tokens are in no window.
TS_INLINE bool leaves_tokens(const PoolParams& p) {
  bool all = true;
  for (const PoolAxis& a : p.axes) all &= p.adaptive || (a.out - 1) * a.step + a.span == a.in;
  for (const PoolAxis& a : p.axes) all &= p.adaptive || a.out == 1 || a.step == a.span;
  return !all;
}

// Calls f(token, its place in the window) in raster order.
template <typename F>
TS_INLINE void each_token(const PoolParams& p, const Range (&box)[3], F&& f) {
  int64_t slot = 0;
  for (int64_t t = box[0].begin; t < box[0].end; ++t) {
    for (int64_t y = box[1].begin; y < box[1].end; ++y) {
      const int64_t row = (t * p.axes[1].in + y) * p.axes[2].in;
      for (int64_t x = box[2].begin; x < box[2].end; ++x) f(row + x, slot++);
    }
  }
}

template <typename T>
static void tile_max(const PoolParams& p, const Rows<T>& rows, int64_t r, const Range (&box)[3]) {
  for (int64_t c = 0; c < p.C; c += kLanes) {
    const int64_t left = p.C - c;
    const Vec grad = load_upto(rows.grad + r * p.C + c, left), best = load_upto(rows.out + r * p.C + c, left);
    Mask open = 0xffffu;
    each_token(p, box, [&](int64_t n, int64_t) {
      const Vec value = load_upto(rows.x + n * p.stride_n + c, left);
      const Mask wins = open & ~(greater(value, best) | greater(best, value) | (is_nan(value) ^ is_nan(best)));
      store_upto(rows.to + n * p.C + c, select(wins, grad, zero()), left);
      open &= ~wins;
    });
  }
}

template <typename T>
static void tile_grad(const PoolParams& p, const Rows<T>& rows, int64_t r) {
  const int64_t o[3] = {r / p.axes[2].out / p.axes[1].out, r / p.axes[2].out % p.axes[1].out, r % p.axes[2].out};
  Range box[3];
  for (int axis = 0; axis < 3; ++axis) box[axis] = pool::tokens_of(p.axes[axis], p.kind, p.adaptive, o[axis]);
  const int64_t count = size_of(box[0]) * size_of(box[1]) * size_of(box[2]);
  if (p.kind == PoolKind::kMax) return tile_max(p, rows, r, box);
  if (p.kind == PoolKind::kStack) {
    const T* const grad = rows.grad + r * count * p.C;
    const int64_t wide = size_of(box[2]);
    each_token(p, box, [&](int64_t n, int64_t slot) {
      if (slot % wide == 0) memcpy(rows.to + n * p.C, grad + slot * p.C, static_cast<size_t>(wide * p.C) * sizeof(T));
    });
    return;
  }
  const Vec share = splat(1.0f / static_cast<float>(count));
  const T* const grad = rows.grad + r * p.C;
  each_token(p, box, [&](int64_t n, int64_t) {
    T* const to = rows.to + n * p.C;
    for (int64_t c = 0; c < p.C; c += kLanes) store_upto(to + c, mul(share, load_upto(grad + c, p.C - c)), p.C - c);
  });
}

template <typename T>
TS_INLINE Rows<T> rows_of(const PoolParams& p, int64_t b) {
  const int64_t wide = pool::outputs(p) * p.C;
  Rows<T> rows = {};
  rows.grad = static_cast<const T*>(p.grad) + b * wide * pool::stacked(p);
  if (p.x != nullptr) rows.x = static_cast<const T*>(p.x) + b * p.stride_b;
  if (p.out != nullptr) rows.out = static_cast<const T*>(p.out) + b * wide;
  if (p.x_grad != nullptr) rows.to = static_cast<T*>(p.x_grad) + b * pool::tokens(p) * p.C;
  return rows;
}

template <typename T>
static void grad_token(const PoolParams& p, int64_t b, int64_t n) {
  const Place place = place_of(p, n);
  const Rows<T> rows = rows_of<T>(p, b);
  if (p.scores_grad != nullptr) p.scores_grad[b * pool::tokens(p) + n] = score_grad<T>(p, rows, b, n, place);
  if (p.x_grad == nullptr) return;
  if (p.kind == PoolKind::kMax) {
    summed_token<T, true>(p, rows, b, n, place);
  } else {
    summed_token<T, false>(p, rows, b, n, place);
  }
}

template <typename T>
static void grad_unit(const PoolParams& p, bool tiled, int64_t units, int64_t i) {
  if (tiled) {
    tile_grad(p, rows_of<T>(p, i / units), i % units);
  } else {
    grad_token<T>(p, i / units, i % units);
  }
}

Status pool_grad_level(const PoolParams& p, ParallelForFn threads) {
  if (p.kind == PoolKind::kSoftmax) pool_weights_level(p, threads);
  const int64_t N = pool::tokens(p), R = pool::outputs(p), row = p.C * dtype_bytes(p.dtype);
  const bool tiled = tiles(p) && p.x_grad != nullptr;
  if (tiled && leaves_tokens(p)) memset(p.x_grad, 0, static_cast<size_t>(p.B * N * row));
  const int64_t units = tiled ? R : N, bytes = larger(1, (N + R) * row / units);  // of a unit: an output row or a token
  parallel_for(threads, p.B * units, larger(1, (64 << 10) / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (p.dtype == DType::kFloat32) {
        grad_unit<float>(p, tiled, units, i);
      } else if (p.dtype == DType::kFloat16) {
        grad_unit<Half>(p, tiled, units, i);
      } else {
        grad_unit<BFloat>(p, tiled, units, i);
      }
    }
  });
  return Status::success();
}

TS_ISA_END

// Gradient of pool_grid on the CPU: grad [B, R, C] contiguous -> that of every token [B, N, C] and (kSoftmax) of every score [B, N].
//
// Algorithm: token by token, a gather over the outputs whose windows hold it (neighbours on each axis), so a value has one writer.
//   kMax asks in each window whether an earlier token has the same value; kSoftmax has the windows' weights in the workspace.
// Work: bytes (N + R) C; kMax and kSoftmax read x and out too. Bound by memory.
// Deterministic: float32, outputs in ascending raster order; sums over channels in 16 lanes and then the fixed tree.
#include <cstring>

#include "core/simd_narrow.h"
#include "merge/pool_args.h"

TS_ISA_BEGIN

using pool::Range;

void pool_weights_level(const PoolParams& p, ParallelForFn threads);  // pool_cpu.cpp

template <typename T>
TS_INLINE Vec columns_upto(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, left);
}

template <typename T>
TS_INLINE void put_upto(T* p, Vec x, int64_t left) {
  if (left >= kLanes) {
    store(p, x);
  } else {
    store_n(p, x, left);
  }
}

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

TS_INLINE float weight_of(const PoolParams& p, int64_t b, const Place& place, const int64_t (&o)[3], const Cover& c) {
  switch (p.kind) {
    case PoolKind::kMean:
      return 1.0f / static_cast<float>(size_of(c.box[0]) * size_of(c.box[1]) * size_of(c.box[2]));
    case PoolKind::kBilinear: {
      const float of_t = pool::bilinear_weight(p.axes[0], o[0], place.at[0]), of_y = pool::bilinear_weight(p.axes[1], o[1], place.at[1]);
      return of_t * of_y * pool::bilinear_weight(p.axes[2], o[2], place.at[2]);
    }
    case PoolKind::kSoftmax:
      return static_cast<const float*>(p.workspace)[(b * pool::outputs(p) + c.row) * pool::window(p) + c.slot];
    default:
      return 1.0f;
  }
}

// Calls f(covers, count, first, last) for the outputs around the token in raster order, at most 64 at a time and at least once.
template <typename F>
TS_INLINE void each_group(const PoolParams& p, int64_t b, const Place& place, F&& f) {
  Cover covers[kCovers];
  int count = 0;
  bool first = true;
  int64_t o[3];
  for (o[0] = place.outputs[0].begin; o[0] < place.outputs[0].end; ++o[0]) {
    for (o[1] = place.outputs[1].begin; o[1] < place.outputs[1].end; ++o[1]) {
      for (o[2] = place.outputs[2].begin; o[2] < place.outputs[2].end; ++o[2]) {
        if (count == kCovers) {
          f(covers, count, first, false);
          count = 0, first = false;
        }
        Cover& c = covers[count];
        for (int axis = 0; axis < 3; ++axis) c.box[axis] = pool::tokens_of(p.axes[axis], p.kind, p.adaptive, o[axis]);
        c.row = (o[0] * p.axes[1].out + o[1]) * p.axes[2].out + o[2];
        c.slot = ((place.at[0] - c.box[0].begin) * size_of(c.box[1]) + place.at[1] - c.box[1].begin) * size_of(c.box[2]) + place.at[2] -
                 c.box[2].begin;
        c.weight = weight_of(p, b, place, o, c);
        if (p.kind != PoolKind::kBilinear || c.weight != 0.0f) ++count;
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
        const Vec value = columns_upto(x + ((t * p.axes[1].in + y) * p.axes[2].in + i) * p.stride_n, left);
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

template <typename T, bool kMax>
static void add_covers(const PoolParams& p, const Rows<T>& rows, int64_t n, const Place& place, const Cover* covers, int count,
                       int64_t begin, int64_t end, const float* before, float* sums) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t left = end - c;
    Vec sum = before == nullptr ? zero() : load_upto(before + c - begin, left), value = zero();
    if constexpr (kMax) value = columns_upto(rows.x + n * p.stride_n + c, left);
    for (int i = 0; i < count; ++i) {
      const Vec grad = columns_upto(rows.grad + covers[i].row * p.C + c, left);
      if constexpr (kMax) {
        const Vec best = columns_upto(rows.out + covers[i].row * p.C + c, left);
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
      put_upto(rows.to + n * p.C + c, sum, left);
    }
  }
}

template <typename T, bool kMax>
static void summed_token(const PoolParams& p, const Rows<T>& rows, int64_t b, int64_t n, const Place& place) {
  alignas(64) float sums[kChunk];
  for (int64_t begin = 0; begin < p.C; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, p.C);
    each_group(p, b, place, [&](const Cover* covers, int count, bool first, bool last) {
      add_covers<T, kMax>(p, rows, n, place, covers, count, begin, end, first ? nullptr : sums, last ? nullptr : sums);
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
        sum = fma(columns_upto(grad + c, left), sub(columns_upto(x + c, left), columns_upto(out + c, left)), sum);
      }
      total = total + covers[i].weight / p.temperature * reduce_add(sum);
    }
  });
  return total;
}

// kStack: windows never overlap, so a token has one place at most.
template <typename T>
static void stack_token(const PoolParams& p, const Rows<T>& rows, int64_t b, int64_t n, const Place& place) {
  each_group(p, b, place, [&](const Cover* covers, int count, bool, bool) {
    const size_t bytes = static_cast<size_t>(p.C) * sizeof(T);
    if (count == 0) {
      memset(rows.to + n * p.C, 0, bytes);
    } else {
      memcpy(rows.to + n * p.C, rows.grad + (covers[0].row * pool::window(p) + covers[0].slot) * p.C, bytes);
    }
  });
}

template <typename T>
static void grad_token(const PoolParams& p, int64_t b, int64_t n) {
  const Place place = place_of(p, n);
  const int64_t N = pool::tokens(p), wide = pool::outputs(p) * p.C;
  Rows<T> rows = {};
  rows.grad = static_cast<const T*>(p.grad) + b * wide * pool::stacked(p);
  if (p.x != nullptr) rows.x = static_cast<const T*>(p.x) + b * p.stride_b;
  if (p.out != nullptr) rows.out = static_cast<const T*>(p.out) + b * wide;
  if (p.scores_grad != nullptr) p.scores_grad[b * N + n] = score_grad<T>(p, rows, b, n, place);
  if (p.x_grad == nullptr) return;
  rows.to = static_cast<T*>(p.x_grad) + b * N * p.C;
  if (p.kind == PoolKind::kMax) {
    summed_token<T, true>(p, rows, b, n, place);
  } else if (p.kind == PoolKind::kStack) {
    stack_token<T>(p, rows, b, n, place);
  } else {
    summed_token<T, false>(p, rows, b, n, place);
  }
}

Status pool_grad_level(const PoolParams& p, ParallelForFn threads) {
  if (p.kind == PoolKind::kSoftmax) pool_weights_level(p, threads);
  const int64_t N = pool::tokens(p), bytes = larger(1, (pool::outputs(p) / N + 1) * p.C * dtype_bytes(p.dtype));  // of a token
  parallel_for(threads, p.B * N, larger(1, (64 << 10) / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (p.dtype == DType::kFloat32) {
        grad_token<float>(p, i / N, i % N);
      } else if (p.dtype == DType::kFloat16) {
        grad_token<Half>(p, i / N, i % N);
      } else {
        grad_token<BFloat>(p, i / N, i % N);
      }
    }
  });
  return Status::success();
}

TS_ISA_END

// Gradient of merge_tokens on the CPU: grad [B, R, M, W] contiguous -> that of every token [B, N, M, W], and of every weight [B, N].
//
// Algorithm: the lists of merge_cpu.cpp again. Sums and means go token by token, grad[row] * weight / divisor; amax and MLERP go row by row,
//   because a row's tokens share a winner or norms.
// Work: bytes (2 N + R) C; weights read x and out too. Bound by memory. Deterministic: one writer a value, sums over channels in 16 lanes
//   and then the fixed tree. amax: the lowest token id among equal values takes the gradient.
#include <cstring>

#include "merge/merge_rows_cpu.h"

TS_ISA_BEGIN

// One tensor's gradients of one batch row.
template <typename T>
struct Grads {
  const MergeTensor& x;
  int64_t b, N, R, width, row;  // width of a segment and of a token, in elements

  Grads(const MergeParams& p, const MergeTensor& tensor, int64_t batch) : x(tensor), b(batch), N(p.N), R(p.R) {
    width = x.segment_bytes / static_cast<int64_t>(sizeof(T)), row = width * x.segments;
  }
  const T* grad(int64_t r) const { return static_cast<const T*>(x.grad) + (b * R + r) * row; }
  const T* out(int64_t r) const { return static_cast<const T*>(x.out) + (b * R + r) * row; }
  T* to(int64_t n) const { return static_cast<T*>(x.dst) + (b * N + n) * row; }
  const T* value(int64_t n, int64_t m) const { return token_at<T>(x, b, n, m); }
};

template <typename T>
static void scaled_row(const Grads<T>& g, int64_t n, int64_t r, float factor) {
  T* const to = g.to(n);
  const T* const grad = g.grad(r);
  if (factor == 1.0f) {
    memcpy(to, grad, static_cast<size_t>(g.row) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < g.row; i += kLanes) store_upto(to + i, mul(splat(factor), load_upto(grad + i, g.row - i)), g.row - i);
}

// Sum over the channels of grad * (x - out), or of grad * x.
template <typename T>
static float weight_dot(const MergeParams& p, const Grads<T>& g, int64_t n, int64_t r, bool centred) {
  if (p.from != nullptr) n = p.from[g.b * p.from_stride + n];
  Vec sum = zero();
  for (int64_t m = 0; m < g.x.segments; ++m) {
    const T *const from = g.value(n, m), *const grad = g.grad(r) + m * g.width, *const out = centred ? g.out(r) + m * g.width : nullptr;
    for (int64_t i = 0; i < g.width; i += kLanes) {
      const int64_t left = g.width - i;
      Vec value = load_upto(from + i, left);
      if (centred) value = sub(value, load_upto(out + i, left));
      sum = fma(load_upto(grad + i, left), value, sum);
    }
  }
  return reduce_add(sum);
}

// Sum and mean: token by token.
template <typename T>
static void linear_token(const MergeParams& p, const Grads<T>& g, const RowLists& lists, int64_t n) {
  const int32_t r = lists.row_of[n];
  const bool mean = p.mode != MergeMode::kSum, single = r < p.R && lists.start[r + 1] - lists.start[r] == 1;
  const bool dead = r == p.R || (mean && lists.divisor[r] == 0.0f && !(single && p.mode == MergeMode::kWeighted));
  if (g.x.dst != nullptr) {
    float factor = p.weights != nullptr ? p.weights[g.b * p.N + n] : 1.0f;
    if (single && p.mode == MergeMode::kWeighted) {
      factor = 1.0f;
    } else if (mean && !dead) {
      factor = factor / lists.divisor[r];
    }
    if (dead) {
      memset(g.to(n), 0, static_cast<size_t>(g.row) * sizeof(T));
    } else {
      scaled_row(g, n, r, factor);
    }
  }
  if (p.weight_grad == nullptr) return;
  float dot = dead ? 0.0f : weight_dot(p, g, n, r, mean);
  if (mean && !dead) dot = dot / lists.divisor[r];
  p.weight_grad[g.b * p.N + n] = p.total_grad != nullptr && r < p.R ? dot + p.total_grad[g.b * p.R + r] : dot;
}

// amax: column by column the first token, in ascending order, that equals the result.
template <typename T>
static void amax_row(const Grads<T>& g, const RowLists& lists, int64_t r) {
  const int32_t begin = lists.start[r], end = lists.start[r + 1];
  int32_t lower = begin;  // the own token is first in the list; here it takes its place by id
  while (lower + 1 < end && lists.token[lower + 1] < lists.token[begin]) ++lower;
  for (int64_t m = 0; m < g.x.segments; ++m) {
    for (int64_t i = 0; i < g.width; i += kLanes) {
      const int64_t left = g.width - i, at = m * g.width + i;
      const Vec grad = load_upto(g.grad(r) + at, left), best = load_upto(g.out(r) + at, left);
      Mask open = 0xffffu;
      for (int32_t j = begin; j < end; ++j) {
        const int32_t n = lists.token[j < lower ? j + 1 : j == lower ? begin : j];
        const Vec value = load_upto(g.value(n, m) + i, left);
        const Mask differs = greater(value, best) | greater(best, value) | (is_nan(value) ^ is_nan(best));
        const Mask wins = open & ~differs & 0xffffu;
        store_upto(g.to(n) + at, select(wins, grad, zero()), left);
        open &= ~wins;
      }
    }
  }
}

// MLERP: y = mean * scale, scale = largest / own. With m the mean: the gradient of scale is s = grad . m, of largest s / own, of own
// -s * largest / own^2, and a norm's gradient is token / norm.
template <typename T>
static void mlerp_row(const Grads<T>& g, const RowLists& lists, int64_t r) {
  const int32_t begin = lists.start[r], count = lists.start[r + 1] - begin;
  const int32_t* const token = lists.token + begin;
  if (count == 1) return scaled_row(g, token[0], r, 1.0f);
  const Norms norms = norms_of<T>(g.x, g.b, token, count);
  const float share = norms.scale() / static_cast<float>(count);
  float of_largest = 0.0f, of_own = 0.0f;  // factors of the two tokens
  if (norms.at != token[0] && norms.own > 0.0f) {
    Vec sum = zero();
    for (int32_t j = 0; j < count; ++j) {
      for (int64_t m = 0; m < g.x.segments; ++m) {
        for (int64_t i = 0; i < g.width; i += kLanes) {
          const Vec grad = load_upto(g.grad(r) + m * g.width + i, g.width - i);
          sum = fma(grad, load_upto(g.value(token[j], m) + i, g.width - i), sum);
        }
      }
    }
    const float s = reduce_add(sum) / static_cast<float>(count);
    of_largest = s / norms.own / norms.largest;
    of_own = -s * (norms.largest / norms.own) / norms.own / norms.own;
  }
  for (int32_t j = 0; j < count; ++j) {
    const float factor = j == 0 ? of_own : token[j] == norms.at ? of_largest : 0.0f;
    for (int64_t m = 0; m < g.x.segments; ++m) {
      for (int64_t i = 0; i < g.width; i += kLanes) {
        const int64_t left = g.width - i, at = m * g.width + i;
        Vec value = mul(splat(share), load_upto(g.grad(r) + at, left));
        if (factor != 0.0f) value = fma(splat(factor), load_upto(g.value(token[j], m) + i, left), value);
        store_upto(g.to(token[j]) + at, value, left);
      }
    }
  }
}

// Unit i of a batch row: a token (sums, means), or an output row and at last the tokens without one (amax, MLERP).
template <typename T>
static void grad_unit(const MergeParams& p, const MergeTensor& x, const RowLists& lists, int64_t b, int64_t i) {
  const Grads<T> g(p, x, b);
  if (p.mode != MergeMode::kAmax && p.mode != MergeMode::kMlerp) return linear_token(p, g, lists, i);
  if (i == p.R) {
    for (int32_t j = lists.start[p.R]; j < lists.start[p.R + 1]; ++j) {
      memset(g.to(lists.token[j]), 0, static_cast<size_t>(g.row) * sizeof(T));
    }
  } else if (lists.start[i] == lists.start[i + 1]) {
    return;
  } else if (p.mode == MergeMode::kAmax) {
    amax_row(g, lists, i);
  } else {
    mlerp_row(g, lists, i);
  }
}

Status merge_grad_level(const MergeParams& p, ParallelForFn threads) {
  parallel_for(threads, p.B, larger(1, 4096 / (p.N + p.R + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      build_lists(p, b);
      fill_divisors(p, b);
    }
  });
  const int64_t units = p.mode == MergeMode::kAmax || p.mode == MergeMode::kMlerp ? p.R + 1 : p.N;
  for (int t = 0; t < p.num_tensors; ++t) {
    const MergeTensor& x = p.tensors[t];
    const int64_t bytes = larger(1, (p.N + p.R) * x.segments * x.segment_bytes / larger(1, units));
    parallel_for(threads, p.B * units, larger(1, (64 << 10) / bytes), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const RowLists lists = row_lists(p, i / units);
        if (x.type == MergeType::kFloat32) {
          grad_unit<float>(p, x, lists, i / units, i % units);
        } else if (x.type == MergeType::kFloat16) {
          grad_unit<Half>(p, x, lists, i / units, i % units);
        } else {
          grad_unit<BFloat>(p, x, lists, i / units, i % units);
        }
      }
    });
  }
  return Status::success();
}

TS_ISA_END

// pool_grid on the CPU: x [B, N, C] strided, tokens in raster order of a 3-axis grid -> [B, R, C] contiguous (kStack: [B, R, window * C]).
//
// Algorithm: output rows one after the other; 64 channels at a time stay in registers while the tokens of the window pass, so an output row
//   is written once and overlapping windows read their tokens from the cache. Softmax weights of a window are made once, into the workspace.
// Work: about one fused multiply-add a token of a window and channel; bytes (N + R) C. 24 x 24 x 4096 floats to 12 x 12: 11.8 MB.
//   Bound by memory: windows that tile the grid read x once, from start to end of each row.
// Deterministic: float32, ascending raster order, whatever the number of threads; mean = sum / count; a NaN is the largest.
// Limits: windows below 2^31 tokens.
#include <cstring>

#include "core/simd_narrow.h"
#include "merge/pool_args.h"

TS_ISA_BEGIN

using pool::Range;

constexpr int kVecs = 4;  // 64 channels in registers

// The window of one output: ranges of tokens on the three axes.
struct Box {
  Range t, y, x;
  int64_t count() const { return (t.end - t.begin) * (y.end - y.begin) * (x.end - x.begin); }
};

TS_INLINE Box box_of(const PoolParams& p, const int64_t (&o)[3]) {
  return {pool::tokens_of(p.axes[0], p.kind, p.adaptive, o[0]), pool::tokens_of(p.axes[1], p.kind, p.adaptive, o[1]),
          pool::tokens_of(p.axes[2], p.kind, p.adaptive, o[2])};
}

TS_INLINE void output_position(const PoolParams& p, int64_t r, int64_t (&o)[3]) {
  o[2] = r % p.axes[2].out, r /= p.axes[2].out;
  o[1] = r % p.axes[1].out, o[0] = r / p.axes[1].out;
}

// Calls f(first token, number of tokens, weights that were passed before) for every row of the window.
template <typename F>
TS_INLINE void each_row(const PoolParams& p, const Box& box, F&& f) {
  const int64_t wide = box.x.end - box.x.begin;
  int64_t passed = 0;
  for (int64_t t = box.t.begin; t < box.t.end; ++t) {
    for (int64_t y = box.y.begin; y < box.y.end; ++y, passed += wide) {
      f((t * p.axes[1].in + y) * p.axes[2].in + box.x.begin, wide, passed);
    }
  }
}

template <bool kTail, typename T>
TS_INLINE Vec columns(const T* p, int64_t left) {
  if constexpr (kTail) return load_n(p, left);
  return load(p);
}

// kCount vectors of channels of one output row.
template <typename T, int kCount, bool kTail, bool kMax, bool kWeighted>
TS_INLINE void pool_columns(const PoolParams& p, const Box& box, const T* x, const float* weights, Vec count, T* out, int64_t left) {
  Vec sum[kCount];
  for (int v = 0; v < kCount; ++v) sum[v] = kMax ? splat(-kInfinity) : zero();
  each_row(p, box, [&](int64_t first, int64_t wide, int64_t passed) {
    const T* from = x + first * p.stride_n;
    for (int64_t i = 0; i < wide; ++i, from += p.stride_n) {
      const Vec weight = kWeighted ? splat(weights[passed + i]) : count;
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        const Vec value = columns<kTail>(from + v * kLanes, left);
        if constexpr (kMax) {
          sum[v] = nan_max(sum[v], value);
        } else if constexpr (kWeighted) {
          sum[v] = fma(weight, value, sum[v]);
        } else {
          sum[v] = add(sum[v], value);
        }
      }
    }
  });
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    if constexpr (!kMax && !kWeighted) sum[v] = div(sum[v], count);
    if constexpr (kTail) {
      store_n(out, sum[v], left);
    } else {
      store(out + v * kLanes, sum[v]);
    }
  }
}

constexpr int kFew = 8;  // tokens of a small window, whose addresses are made once for all channels: a fifth of a bfloat16 output

// Whole blocks of 64 channels of a small window. Returns the first channel that is left.
template <typename T, bool kMax, bool kWeighted>
TS_INLINE int64_t pool_few(const PoolParams& p, const Box& box, const T* x, const float* weights, Vec count, T* out) {
  const T* from[kFew];
  int tokens = 0;
  each_row(p, box, [&](int64_t first, int64_t wide, int64_t) {
    for (int64_t i = 0; i < wide; ++i) from[tokens++] = x + (first + i) * p.stride_n;
  });
  int64_t c = 0;
  for (; c + kVecs * kLanes <= p.C; c += kVecs * kLanes) {
    Vec sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = kMax ? splat(-kInfinity) : zero();
    for (int i = 0; i < tokens; ++i) {
      const Vec weight = kWeighted ? splat(weights[i]) : count;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec value = load(from[i] + c + v * kLanes);
        sum[v] = kMax ? nan_max(sum[v], value) : kWeighted ? fma(weight, value, sum[v]) : add(sum[v], value);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(out + c + v * kLanes, kMax || kWeighted ? sum[v] : div(sum[v], count));
  }
  return c;
}

template <typename T, bool kMax, bool kWeighted>
static void pool_row(const PoolParams& p, const Box& box, const T* x, const float* weights, T* out) {
  const Vec count = splat(static_cast<float>(box.count()));
  int64_t c = box.count() <= kFew ? pool_few<T, kMax, kWeighted>(p, box, x, weights, count, out) : 0;
  for (; c + kVecs * kLanes <= p.C; c += kVecs * kLanes) {
    pool_columns<T, kVecs, false, kMax, kWeighted>(p, box, x + c, weights, count, out + c, kLanes);
  }
  for (; c + kLanes <= p.C; c += kLanes) pool_columns<T, 1, false, kMax, kWeighted>(p, box, x + c, weights, count, out + c, kLanes);
  if (c < p.C) pool_columns<T, 1, true, kMax, kWeighted>(p, box, x + c, weights, count, out + c, p.C - c);
}

template <typename T>
static void stack_row(const PoolParams& p, const Box& box, const T* x, T* out) {
  each_row(p, box, [&](int64_t first, int64_t wide, int64_t) {
    const T* const from = x + first * p.stride_n;
    if (p.stride_n == p.C) {
      memcpy(out, from, static_cast<size_t>(wide * p.C) * sizeof(T));
    } else {
      for (int64_t i = 0; i < wide; ++i) memcpy(out + i * p.C, from + i * p.stride_n, static_cast<size_t>(p.C) * sizeof(T));
    }
    out += wide * p.C;
  });
}

// The weights of a window's tokens in raster order. Softmax: a NaN, or infinities that leave nothing finite, makes the window NaN.
static void softmax_weights(const PoolParams& p, const Box& box, const float* scores, float* weights) {
  float most = -kInfinity;
  each_row(p, box, [&](int64_t first, int64_t wide, int64_t passed) {
    for (int64_t i = 0; i < wide; ++i) {
      const float s = scores[first + i] / p.temperature;
      weights[passed + i] = s;
      most = s != s || s > most ? s : most;
    }
  });
  const int64_t count = box.count();
  Vec lanes = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec e = exp(sub(load_upto(weights + i, count - i), splat(most)));
    if (count - i < kLanes) e = select(first_lanes(count - i), e, zero());
    store_upto(weights + i, e, count - i);
    lanes = add(lanes, e);
  }
  const Vec sum = splat(reduce_add(lanes));
  for (int64_t i = 0; i < count; i += kLanes) store_upto(weights + i, div(load_upto(weights + i, count - i), sum), count - i);
}

// 2 x 2 x 2 taps at most. Weights of the outer axes multiply first.
TS_INLINE void bilinear_weights(const PoolParams& p, const Box& box, const int64_t (&o)[3], float* weights) {
  for (int64_t t = box.t.begin; t < box.t.end; ++t) {
    const float of_t = pool::bilinear_weight(p.axes[0], o[0], t);
    for (int64_t y = box.y.begin; y < box.y.end; ++y) {
      const float of_y = of_t * pool::bilinear_weight(p.axes[1], o[1], y);
      for (int64_t x = box.x.begin; x < box.x.end; ++x) *weights++ = of_y * pool::bilinear_weight(p.axes[2], o[2], x);
    }
  }
}

template <typename T>
static void output_row(const PoolParams& p, int64_t b, int64_t r) {
  const int64_t R = pool::outputs(p), wide = p.C * pool::stacked(p);
  const T* const x = static_cast<const T*>(p.x) + b * p.stride_b;
  T* const out = static_cast<T*>(p.out) + (b * R + r) * wide;
  int64_t o[3];
  output_position(p, r, o);
  const Box box = box_of(p, o);
  float taps[8];
  switch (p.kind) {
    case PoolKind::kMean:
      return pool_row<T, false, false>(p, box, x, nullptr, out);
    case PoolKind::kMax:
      return pool_row<T, true, false>(p, box, x, nullptr, out);
    case PoolKind::kBilinear:
      bilinear_weights(p, box, o, taps);
      return pool_row<T, false, true>(p, box, x, taps, out);
    case PoolKind::kSoftmax: {
      float* const weights = static_cast<float*>(p.workspace) + (b * R + r) * pool::window(p);
      softmax_weights(p, box, p.scores + b * pool::tokens(p), weights);
      return pool_row<T, false, true>(p, box, x, weights, out);
    }
    case PoolKind::kStack:
      return stack_row(p, box, x, out);
  }
}

// The softmax weights alone, [B, R, window]: the gradient begins with them.
void pool_weights_level(const PoolParams& p, ParallelForFn threads) {
  const int64_t R = pool::outputs(p), window = pool::window(p);
  parallel_for(threads, p.B * R, larger(1, 16384 / window), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      int64_t o[3];
      output_position(p, i % R, o);
      softmax_weights(p, box_of(p, o), p.scores + i / R * pool::tokens(p), static_cast<float*>(p.workspace) + i * window);
    }
  });
}

Status pool_level(const PoolParams& p, ParallelForFn threads) {
  const int64_t R = pool::outputs(p);
  if (p.B == 0 || p.C == 0) return Status::success();
  const int64_t bytes = (pool::tokens(p) / R + 1) * p.C * dtype_bytes(p.dtype);  // of an output row
  parallel_for(threads, p.B * R, larger(1, (64 << 10) / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (p.dtype == DType::kFloat32) {
        output_row<float>(p, i / R, i % R);
      } else if (p.dtype == DType::kFloat16) {
        output_row<Half>(p, i / R, i % R);
      } else {
        output_row<BFloat>(p, i / R, i % R);
      }
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status pool_level(const PoolParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status pool_grad_level(const PoolParams& params, ParallelForFn threads))
namespace baseline {
Status pool_grad_level(const PoolParams& params, ParallelForFn threads);
}

Status pool_cpu(const PoolParams& params, const PoolPlan&, CpuLevel level,
                ParallelForFn threads){TS_CPU_SWITCH(level, pool_level(params, threads))}

Status pool_grad_cpu(const PoolParams& params, const PoolPlan&, CpuLevel level, ParallelForFn threads) {
  TS_CPU_SWITCH(level, pool_grad_level(params, threads))
}
}  // namespace tokensieve
#endif

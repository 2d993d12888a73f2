// kMean and kSum of cosine_cpu: sum over n of a_hat . b_hat[n] = a_hat . (sum of b_hat[n]), one pass over b and one over a.
// Fixed order: lanes run over the channels, rows of b add up in chunks of consecutive rows, chunks add up in order.
#pragma once

#include "similarity/cosine_cpu_layout.h"
#include "similarity/dot_tile_cpu.h"

TS_ISA_BEGIN

namespace sums {

struct Task {
  const CosineParams& p;
  const CosineLayout& at;
  int64_t first_image;
  int64_t images;
};

template <typename T>
TS_INLINE Vec load_tail(const T* from, int64_t n) {
  return n >= kLanes ? load(from) : load_n(from, n);
}

template <typename T, typename U>
TS_INLINE float dot(const T* a, const U* b, int64_t C) {
  Vec total = zero();
  for (int64_t d = 0; d < C; d += kLanes) total = fma(load_tail(a + d, C - d), load_tail(b + d, C - d), total);
  return reduce_add(total);
}

TS_INLINE float inverse_norm(float squares) {
  float lane[kLanes];
  store(lane, dots::inverse_norm(splat(squares)));
  return lane[0];
}

TS_INLINE bool allowed(const CosineParams& p, int64_t b, int64_t n) {
  return n < p.N && (!p.candidates || p.candidates[b * p.candidates_stride + n]);
}

TS_INLINE float* chunk_sum(const Task& t, int64_t g, int64_t chunk) {
  return static_cast<float*>(t.p.workspace) + t.at.sum + (g * t.at.chunks + chunk) * dot_round_up(t.p.C, 16);
}

TS_INLINE int32_t* chunk_counts(const Task& t, int64_t g) {
  return reinterpret_cast<int32_t*>(static_cast<float*>(t.p.workspace) + t.at.count) + g * dot_round_up(t.at.chunks, 16);
}

template <typename T>
static void sum_chunk(const Task& t, int64_t g, int64_t chunk) {
  const CosineParams& p = t.p;
  const int64_t b = t.first_image + g;
  float* const to = chunk_sum(t, g, chunk);
  for (int64_t d = 0; d < p.C; d += kLanes) store(to + d, zero());
  int32_t count = 0;
  for (int64_t n = chunk * t.at.rows; n < smaller((chunk + 1) * t.at.rows, p.N); ++n) {
    if (!allowed(p, b, n)) continue;
    ++count;
    const T* const row = static_cast<const T*>(p.b) + b * p.b_stride[0] + n * p.b_stride[1];
    const Vec inverse = splat(inverse_norm(dot(row, row, p.C)));
    for (int64_t d = 0; d < p.C; d += kLanes) store(to + d, fma(load_tail(row + d, p.C - d), inverse, load(to + d)));
  }
  chunk_counts(t, g)[chunk] = count;
}

static void add_chunks(const Task& t, int64_t g) {  // into the first
  for (int64_t chunk = 1; chunk < t.at.chunks; ++chunk) {
    float *const to = chunk_sum(t, g, 0), *const from = chunk_sum(t, g, chunk);
    for (int64_t d = 0; d < t.p.C; d += kLanes) store(to + d, add(load(to + d), load(from + d)));
    chunk_counts(t, g)[0] += chunk_counts(t, g)[chunk];
  }
}

template <typename T>
static void finish_row(const Task& t, int64_t g, int64_t m) {
  const CosineParams& p = t.p;
  const int64_t b = t.first_image + g;
  const T* const a = static_cast<const T*>(p.a) + b * p.a_stride[0] + m * p.a_stride[1];
  int64_t count = t.at.chunks > 0 ? chunk_counts(t, g)[0] : 0;
  float value = 0.0f;
  const bool self = p.exclude_self && allowed(p, b, m);
  if (count > (self ? 1 : 0)) {
    const float inverse = inverse_norm(dot(a, a, p.C));
    value = dot(a, chunk_sum(t, g, 0), p.C) * inverse;
    if (self) {
      const T* const other = static_cast<const T*>(p.b) + b * p.b_stride[0] + m * p.b_stride[1];
      value = value - dot(a, other, p.C) * inverse * inverse_norm(dot(other, other, p.C));
      --count;
    }
    if (p.reduction == CosineReduction::kMean) value = value / static_cast<float>(count);
  }
  p.value[b * p.M + m] = value;
}

template <typename T>
static void run(const Task& t, ParallelForFn threads) {
  const CosineParams& p = t.p;
  parallel_for(threads, t.images * t.at.chunks, 1 + 50000 / (t.at.rows * (p.C + 20)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum_chunk<T>(t, i / t.at.chunks, i % t.at.chunks);
  });
  parallel_for(threads, t.images, 1 + 50000 / (t.at.chunks * p.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) add_chunks(t, g);
  });
  parallel_for(threads, t.images * p.M, 1 + 50000 / (p.C + 20), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) finish_row<T>(t, i / p.M, i % p.M);
  });
}

}  // namespace sums

TS_ISA_END

// The k nearest tokens and the nearest denser one, from a row of squared distances that products gave. Those are off by up to doubt (a + b),
// which is more than a distance between tokens that are nearly alike and far from the mean: two passes over the row find every token that may
// be among the nearest, and differences decide.
#pragma once

#include "core/simd.h"

TS_ISA_BEGIN

namespace near {

template <typename T>
struct Tokens {
  const T* data;
  int64_t stride, C;

  // |x_i - x_j|^2, infinite where it is no number.
  float difference(int64_t i, int64_t j) const {
    const T *const a = data + i * stride, *const b = data + j * stride;
    Vec sum = zero();
    int64_t d = 0;
    for (; d + kLanes <= C; d += kLanes) {
      const Vec x = sub(load(a + d), load(b + d));
      sum = fma(x, x, sum);
    }
    if (d < C) {
      const Vec x = sub(load_n(a + d, C - d), load_n(b + d, C - d));
      sum = fma(x, x, sum);
    }
    const float total = reduce_add(sum);
    return total == total ? total : kInfinity;
  }
};

struct Row {
  const float *distances, *squares;  // of token i from all tokens; a . a of all tokens
  float own, doubt;                  // of token i; as a share of own + square
  int64_t i, n;

  Vec off(int64_t j) const { return mul(splat(doubt), add(splat(own), load(squares + j))); }
};

TS_INLINE Vec farthest(Vec distance, Vec off) { return where_greater(splat(kInfinity), distance, add(distance, off), splat(kInfinity)); }
TS_INLINE Vec closest(Vec distance, Vec off) { return where_greater(splat(kInfinity), distance, sub(distance, off), splat(kInfinity)); }

// Largest on top; a key is a squared distance, then the token.
TS_INLINE uint64_t key_of(float distance, int64_t token) {
  return static_cast<uint64_t>(bits_of_float(distance)) << 32 | static_cast<uint32_t>(token);
}
TS_INLINE float distance_of(uint64_t key) { return float_of_bits(static_cast<uint32_t>(key >> 32)); }

TS_INLINE void sift_down(uint64_t* heap, int64_t n, uint64_t key) {
  int64_t i = 0;
  for (int64_t child = 1; child < n; child = 2 * i + 1) {
    if (child + 1 < n && heap[child + 1] > heap[child]) ++child;
    if (heap[child] <= key) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = key;
}

struct Heap {  // the smallest `size` of the keys it met
  uint64_t* keys;
  int64_t size, have = 0;

  float limit() const { return have == size ? distance_of(keys[0]) : kInfinity; }
  void meet(uint64_t key) {
    if (have == size) {
      if (key < keys[0]) sift_down(keys, size, key);
      return;
    }
    int64_t i = have++;
    for (; i > 0 && keys[(i - 1) / 2] < key; i = (i - 1) / 2) keys[i] = keys[(i - 1) / 2];
    keys[i] = key;
  }
};

// The real tokens among j ... j + 15, without the row's own.
TS_INLINE Mask others(const Row& row, const uint32_t* real, int64_t j) {
  return real[j / kLanes] & ~(j == row.i / kLanes * kLanes ? 1u << row.i % kLanes : 0u);
}

// The k real tokens that are nearest to the row's, which is none of them: keys in ascending order. Returns how many there are.
template <typename T>
static int64_t smallest(const Tokens<T>& tokens, const Row& row, const uint32_t* real, int64_t k, uint64_t* keys) {
  if (k == 0) return 0;
  Heap bounds = {keys, k};
  for (int64_t j = 0; j < row.n; j += kLanes) {
    const Vec far = farthest(load(row.distances + j), row.off(j));
    Mask closer = others(row, real, j);
    if (bounds.have == k) closer &= greater(splat(bounds.limit()), far);
    if (!closer) continue;
    float value[kLanes];
    store(value, far);
    for (; closer; closer &= closer - 1) bounds.meet(key_of(value[__builtin_ctz(closer)], 0));
  }
  const float bound = bounds.limit();
  Heap heap = {keys, k};
  for (int64_t j = 0; j < row.n; j += kLanes) {
    const Vec low = closest(load(row.distances + j), row.off(j));
    Mask near = others(row, real, j) & ~greater(low, splat(bound));
    if (heap.have == k) near &= greater(splat(heap.limit()), low);  // of tokens infinitely far any will do
    for (; near; near &= near - 1) {
      const int64_t token = j + __builtin_ctz(near);
      if (heap.have == k && distance_of(keys[0]) == 0.0f) break;
      heap.meet(key_of(tokens.difference(row.i, token), token));
    }
  }
  for (int64_t left = heap.have - 1; left > 0; --left) {
    const uint64_t last = keys[left];
    keys[left] = keys[0];
    sift_down(keys, left, last);
  }
  return heap.have;
}

// Distances of tokens j ... j + 15 that are denser than the row's, infinite of others. `first_leads`: of equal densities.
TS_INLINE Vec denser(const Row& row, const float* density, Vec own, int64_t j, bool first_leads) {
  const Vec d = load(row.distances + j), other = load(density + j);
  const int64_t own_vector = row.i / kLanes * kLanes;
  if (first_leads && j < own_vector) return where_greater(own, other, splat(kInfinity), d);
  const Vec x = where_greater(other, own, d, splat(kInfinity));
  if (!first_leads || j > own_vector) return x;
  return select(first_lanes(row.i - own_vector) & ~greater(own, other), d, x);
}

// The squared distance to the nearest token that is denser than the row's, infinite if there is none.
template <typename T>
static float nearest_denser(const Tokens<T>& tokens, const Row& row, const float* density, bool first_leads) {
  const Vec own = max(splat(density[row.i]), zero());
  Vec least = splat(kInfinity);
  for (int64_t j = 0; j < row.n; j += kLanes) least = min(farthest(denser(row, density, own, j, first_leads), row.off(j)), least);
  const float bound = -reduce_max(sub(zero(), least));
  float best = kInfinity;
  for (int64_t j = 0; bound < kInfinity && best > 0.0f && j < row.n; j += kLanes) {
    const Vec low = closest(denser(row, density, own, j, first_leads), row.off(j));
    for (Mask near = ~greater(low, splat(best < bound ? best : bound)) & first_lanes(kLanes); near; near &= near - 1) {
      const float distance = tokens.difference(row.i, j + __builtin_ctz(near));
      best = distance < best ? distance : best;
    }
  }
  return best;
}

}  // namespace near

TS_ISA_END

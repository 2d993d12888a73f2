// Stable sort of (key, position) pairs, in the level's namespace: std::sort would be one copy for all levels.
#pragma once

#include "core/simd.h"

TS_ISA_BEGIN

constexpr int64_t kInsertionSort = 40;  // up to here insertion beats four radix passes

struct Pairs {
  uint32_t* key;  // inverted: ascending order is the order we want
  uint32_t* position;
};

static void insertion_sort(Pairs x, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const uint32_t key = x.key[i], position = x.position[i];
    int64_t j = i;
    for (; j > 0 && x.key[j - 1] > key; --j) {
      x.key[j] = x.key[j - 1];
      x.position[j] = x.position[j - 1];
    }
    x.key[j] = key;
    x.position[j] = position;
  }
}

// Stable, 4 digits of 8 bits; digits that all keys share are skipped. Returns which buffer holds the result.
static Pairs radix_sort(Pairs x, Pairs other, int64_t count) {
  uint32_t start[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < 4; ++digit) ++start[digit][x.key[i] >> (8 * digit) & 255];
  }
  for (int digit = 0; digit < 4; ++digit) {
    if (start[digit][x.key[0] >> (8 * digit) & 255] == static_cast<uint32_t>(count)) continue;
    uint32_t total = 0;
    for (int v = 0; v < 256; ++v) {
      const uint32_t here = start[digit][v];
      start[digit][v] = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t to = start[digit][x.key[i] >> (8 * digit) & 255]++;
      other.key[to] = x.key[i];
      other.position[to] = x.position[i];
    }
    const Pairs swap = x;
    x = other;
    other = swap;
  }
  return x;
}

TS_ISA_END

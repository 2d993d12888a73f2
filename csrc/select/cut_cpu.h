// The k-th largest of a row of keys, by bisection on the value of a key.
#pragma once

#include "select/keys_cpu.h"

TS_ISA_BEGIN

TS_INLINE int64_t count_above(const int32_t* keys, int64_t count, int32_t threshold) {
  int32_t above = 0;
  for (int64_t i = 0; i < count; ++i) above += keys[i] > threshold ? 1 : 0;
  return above;
}

struct Cut {
  int32_t threshold;  // keys above it are selected ...
  int64_t ties;       // ... and the first `ties` keys equal to it
};

// The k largest of `count` keys (a multiple of 16, padded with kExcluded), `eligible` of which are not excluded; 0 < k <= eligible.
static Cut find_cut(const int32_t* keys, int64_t count, int64_t eligible, int64_t k, int32_t* spare) {
  uint32_t least = UINT32_MAX;
  int32_t high = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {  // unsigned with kExcluded on top: the smallest key that counts
    const uint32_t key = static_cast<uint32_t>(keys[i]) + 0x7fffffffu;
    least = key < least ? key : least;
    high = keys[i] > high ? keys[i] : high;
  }
  // above(t) = number of keys > t. Invariant: above(high) < k <= above(low).
  int32_t low = static_cast<int32_t>(least - 0x7fffffffu) - 1;
  int64_t above_low = eligible, above_high = 0;
  while (above_low != k) {
    if (static_cast<int64_t>(high) - low == 1) return {high, k - above_high};  // one value left: ties
    const int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high) >> 1);
    const int64_t above_middle = count_above(keys, count, middle);
    if (above_middle >= k) {
      low = middle;
      above_low = above_middle;
    } else {
      high = middle;
      above_high = above_middle;
    }
    if (count > 256 && (above_low - above_high) * 4 < count) {  // pack the keys in (low, high]; in place after the first time
      int64_t left = 0;
      for (int64_t i = 0; i < count; i += kLanes) {
        left += append_keys(spare + left, keys + i, above(keys + i, low) & ~above(keys + i, high));
      }
      k -= above_high;
      above_low -= above_high;
      above_high = 0;
      count = (left + kLanes - 1) / kLanes * kLanes;
      for (int64_t i = left; i < count; ++i) spare[i] = kExcluded;
      keys = spare;
    }
  }
  return {low, 0};
}

TS_ISA_END

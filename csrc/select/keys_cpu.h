// Scores as ordered int32 keys, the order of core/order.h: what the selections on the CPU compare.
#pragma once

#include "core/order.h"
#include "select/topk_lanes_cpu.h"

TS_ISA_BEGIN

constexpr int32_t kExcluded = INT32_MIN;    // not a candidate; also the padding behind the row
constexpr int32_t kNanKey = INT32_MIN + 1;  // below -inf, which is INT32_MIN + 0x007fffff
constexpr int32_t kAlwaysKey = INT32_MAX;   // above +inf, which is 0x7f800000

TS_INLINE int32_t key_of(int32_t bits) {  // = int32(ordered_bits(bits) ^ 0x80000000), written so that it vectorises
  int32_t key = bits ^ ((bits >> 31) & INT32_MAX);
  key = bits == INT32_MIN ? 0 : key;
  return (bits & INT32_MAX) > 0x7f800000 ? kNanKey : key;
}

TS_INLINE void make_keys(const void* scores, DType dtype, int64_t count, int32_t* keys) {
  if (dtype == DType::kFloat32) {
    const int32_t* bits = static_cast<const int32_t*>(scores);
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(bits[i]);
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* bits = static_cast<const uint16_t*>(scores);
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(static_cast<int32_t>(static_cast<uint32_t>(bits[i]) << 16));
  } else {
    const Half* half = static_cast<const Half*>(scores);
    for (int64_t i = 0; i < count; i += kLanes) {  // the scratch is padded to whole vectors
      const Vec x = count - i >= kLanes ? load(half + i) : load_n(half + i, count - i);
      float lane[kLanes];
      store(lane, x);
      for (int j = 0; j < kLanes; ++j) keys[i + j] = key_of(static_cast<int32_t>(bits_of_float(lane[j])));
    }
  }
}

TS_INLINE int32_t least_above(const int32_t* keys, int64_t count, int32_t threshold) {
  int32_t least = INT32_MAX;
  for (int64_t i = 0; i < count; ++i) least = keys[i] > threshold && keys[i] < least ? keys[i] : least;
  return least;
}

TS_ISA_END

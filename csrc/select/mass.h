// Fixed-point mass of a score and the share of a total: integers, so that every back end and every order of summation agree.
#pragma once

#include <cstdint>

#include "core/order.h"
#include "select/count.h"

namespace tokensieve {
namespace select {

// Static: an inline function would be one copy for all instruction levels, perhaps the AVX-512 one (it has an uint64 conversion of its own).

constexpr uint32_t kInfBits = 0x7f800000u;

// Bits below the largest score's exponent: 24 of the mantissa and 16 more, less where N such masses would not fit 62 bits.
TS_HOST_DEVICE static constexpr int mass_shift(int64_t N) {
  int shift = 38;
  for (int64_t n = 1; n < N; n *= 2) --shift;
  return shift < 16 ? shift : 16;
}

// `bits` of a positive score (0 < bits <= infinity), `largest` of the row's largest one.
TS_HOST_DEVICE static inline uint64_t mass_of(uint32_t bits, uint32_t largest, int shift) {
  if (largest == kInfBits) return bits == kInfBits ? 1u : 0u;
  const uint32_t exponent = bits >> 23 != 0 ? bits >> 23 : 1u, top = largest >> 23 != 0 ? largest >> 23 : 1u;
  const uint64_t mantissa = (bits & 0x7fffffu) | (bits >> 23 != 0 ? 0x800000u : 0u);
  const uint32_t down = top - exponent;
  return (mantissa << shift) >> (down < 63u ? down : 63u);
}

// floor(share * total), and whether anything was cut off. share is a double in [0, 1]; the product has up to 115 bits.
TS_HOST_DEVICE static inline uint64_t share_of(double share, uint64_t total, bool* inexact) {
  *inexact = false;
  if (!(share > 0.0) || total == 0) return 0;
  if (share >= 1.0) return total;
  int down = 0;  // share = mantissa / 2^down with 2^52 <= mantissa < 2^53
  while (share < 4503599627370496.0 && down < 1100) {
    share *= 2.0;
    ++down;
  }
  const uint64_t mantissa = static_cast<uint64_t>(share);
  const uint64_t low = (mantissa & 0xffffffffu) * (total & 0xffffffffu), high = (mantissa >> 32) * (total >> 32);
  const uint64_t mid1 = (mantissa >> 32) * (total & 0xffffffffu), mid2 = (mantissa & 0xffffffffu) * (total >> 32);
  const uint64_t carry = (low >> 32) + (mid1 & 0xffffffffu) + (mid2 & 0xffffffffu);
  const uint64_t product[2] = {(carry << 32) | (low & 0xffffffffu), high + (mid1 >> 32) + (mid2 >> 32) + (carry >> 32)};
  if (down >= 128) {
    *inexact = true;
    return 0;
  }
  if (down >= 64) {
    const int rest = down - 64;
    *inexact = product[0] != 0 || (rest > 0 && (product[1] & ((uint64_t{1} << rest) - 1)) != 0);
    return product[1] >> rest;
  }
  *inexact = (product[0] & ((uint64_t{1} << down) - 1)) != 0;
  return product[0] >> down | product[1] << (64 - down);  // 0 < down < 64: share < 1
}

// What the shortest prefix has to reach: 0 = nothing, total + 1 = cannot be reached.
TS_HOST_DEVICE static inline uint64_t mass_target(CountRule rule, double share, uint64_t total) {
  bool inexact;
  const uint64_t floor = share_of(share, total, &inexact);
  return rule == CountRule::kReach ? floor + (inexact ? 1 : 0) : floor + 1;
}

// The count of a row from that of its shortest prefix (kReach, kBelow) or of the tokens beyond tau. `always` of `eligible` tokens come first.
TS_HOST_DEVICE static inline int64_t limited_count(const CountParams& p, int64_t count, int64_t always, int64_t eligible) {
  count = (count > always ? count : always) + p.extra;
  count = count < p.max_k ? count : p.max_k;
  count = count > p.min_k ? count : p.min_k;
  return count < eligible ? count : eligible;
}

TS_HOST_DEVICE static inline void store_count(const CountParams& p, int64_t b, int64_t count) {
  p.counts[b] = count;
  p.take[b] = count < p.capacity ? count : p.capacity;
  p.overflow[b] = count > p.capacity;
}

}  // namespace select
}  // namespace tokensieve

// The one order every back end selects by: larger score first, then the lower index; NaN ranks below -inf; -0.0 equals +0.0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TS_HOST_DEVICE __host__ __device__
#else
#define TS_HOST_DEVICE
#endif

namespace tokensieve {

// Bits of a float32 -> uint32 whose unsigned order is the order of the floats. 0 is NaN; -inf is 0x007fffff, so it stays above NaN.
TS_HOST_DEVICE constexpr uint32_t ordered_bits(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;  // NaN
  if (bits == 0x80000000u) bits = 0;                 // -0.0
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

// Unique 64-bit key: two tokens never compare equal, so "the k largest keys" is one set, whatever the schedule.
TS_HOST_DEVICE constexpr uint64_t selection_key(uint32_t ordered, uint32_t index) {
  return (static_cast<uint64_t>(ordered) << 32) | static_cast<uint32_t>(~index);
}

}  // namespace tokensieve

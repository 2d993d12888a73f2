// Scratch of complement_cpu; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include "select/complement.h"

namespace tokensieve {

constexpr int64_t kComplementGroups = 64;  // rows b, b + groups, ... share one scratch area, so scratch does not grow with B

struct ComplementLayout {
  int64_t groups = 0;
  int64_t padded = 0;  // bytes of a row: N, a multiple of 16
};

static inline ComplementLayout complement_layout(const ComplementParams& p) {
  ComplementLayout at;
  at.groups = p.B < kComplementGroups ? p.B : kComplementGroups;
  at.padded = (p.N + 15) / 16 * 16;
  return at;
}

}  // namespace tokensieve

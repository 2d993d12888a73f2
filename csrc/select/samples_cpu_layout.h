// Scratch of samples_cpu; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include "select/samples.h"

namespace tokensieve {

constexpr int64_t kSamplesGroups = 64;  // rows b, b + groups, ... share one scratch area, so scratch does not grow with B

struct SamplesLayout {
  int64_t groups = 0;
  int64_t padded = 0;  // N, a multiple of 16
  int64_t ints = 0;    // per group: keys, (key, position) twice, cdf, marks (a byte each)
};

static inline SamplesLayout samples_layout(const SamplesParams& p) {
  SamplesLayout at;
  at.groups = p.rows.B < kSamplesGroups ? p.rows.B : kSamplesGroups;
  at.padded = (p.rows.N + 15) / 16 * 16;
  at.ints = 6 * at.padded + at.padded / 4;
  at.ints = (at.ints + 15) / 16 * 16;
  return at;
}

}  // namespace tokensieve

// Facts that plan, launcher and kernel of select_samples share. Internal to the room.
#pragma once

#include "select/topk_args.h"

namespace tokensieve {
namespace select {

constexpr int64_t kSamplesStaticShared = 1024;  // the kernel's own arrays, rounded up

// A row's sorted keys, later (cdf, position), and a mark for each.
constexpr int64_t samples_row_bytes(int64_t N) { return sort_capacity(N) * 8 + (sort_capacity(N) + 31) / 32 * 8; }

}  // namespace select
}  // namespace tokensieve

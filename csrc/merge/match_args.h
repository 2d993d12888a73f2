// Reading the lists of bipartite_match: what both back ends share. Internal to the room.
#pragma once

#include "core/order.h"
#include "merge/match.h"

namespace tokensieve {
namespace match {

TS_HOST_DEVICE constexpr int64_t source_id(const MatchParams& p, int64_t b, int64_t i) {
  return p.sources ? p.sources[b * p.sources_stride + i] : p.source_first + 2 * i;
}
TS_HOST_DEVICE constexpr int64_t target_id(const MatchParams& p, int64_t b, int64_t j) {
  return p.targets ? p.targets[b * p.targets_stride + j] : p.target_first + 2 * j;
}
TS_HOST_DEVICE constexpr int64_t keep_id(const MatchParams& p, int64_t b, int64_t i) { return p.keep ? p.keep[b * p.keep_stride + i] : i; }

// Whether a token may be one side of a pair.
TS_HOST_DEVICE constexpr bool takes_part(const MatchParams& p, int64_t b, int64_t id) {
  return id >= 0 && id < p.N && (!p.candidates || p.candidates[b * p.candidates_stride + id] != 0);
}

}  // namespace match
}  // namespace tokensieve

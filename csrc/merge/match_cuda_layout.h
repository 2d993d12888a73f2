// Workspace and limits that plan, launcher and kernels of bipartite_match on CUDA share. Internal to the room.
#pragma once

#include "merge/match.h"

namespace tokensieve {
namespace match {

constexpr int64_t kSide = 64;           // sources and targets of a tile
constexpr int64_t kRankers = 128;       // sources that a block ranks at once, one a thread
constexpr int64_t kFusedSources = 512;  // an image's last block ranks so many: 4 a thread, about 2 us
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct CudaLayout {
  int64_t row_tiles = 0, column_tiles = 0, rank_blocks = 0;  // of an image; at least one block, for the rows of keep and targets
  // Offsets in bytes.
  int64_t mean = 0;    // float [B][N][D]: mean over the heads, H > 1
  int64_t value = 0;   // float [splits][B][S]: best similarity in a share of the targets; -4 for NaN, -inf for none
  int64_t column = 0;  // int32, the same shape: its target's place in the list, -1 for none
  int64_t rank = 0;    // int32 [B][S]: place of a source among all
  int64_t bytes = 0;
};

inline CudaLayout cuda_layout(const MatchParams& p, int64_t splits) {
  CudaLayout at;
  const auto take = [&](int64_t bytes) {
    const int64_t from = at.bytes;
    at.bytes += ceil_div(bytes, 256) * 256;
    return from;
  };
  at.row_tiles = p.S > 0 ? ceil_div(p.S, kSide) : 1;
  at.column_tiles = ceil_div(p.T, kSide);
  at.rank_blocks = p.S > 0 ? ceil_div(p.S, kRankers) : 1;
  at.mean = take(p.H == 1 ? 0 : p.B * p.N * p.D * 4);
  at.value = take(splits * p.B * p.S * 4);
  at.column = take(splits * p.B * p.S * 4);
  at.rank = take(p.B * p.S * 4);
  return at;
}

}  // namespace match
}  // namespace tokensieve

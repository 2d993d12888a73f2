// Workspace and limits that plan, launcher and kernels of the cosine ops on CUDA share. Internal to the room.
#pragma once

#include "similarity/cosine.h"

namespace tokensieve {
namespace cosine {

constexpr int64_t kSide = 64;  // rows and columns of a tile
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline bool sums_rows(const CosineParams& p) { return p.reduction == CosineReduction::kMean || p.reduction == CosineReduction::kSum; }
inline int64_t keep_of(const CosineParams& p) {
  return p.reduction == CosineReduction::kMatch ? p.T : p.reduction == CosineReduction::kMax ? 1 : 0;
}

struct Layout {
  int64_t padded_m = 0, padded_n = 0;    // rows of a and of b, rounded up to a tile
  int64_t part = 0, channel_blocks = 0;  // kMean, kSum: channels of 16 bytes; blocks of 128 such parts
  int64_t padded_c = 0;
  // Offsets in bytes.
  int64_t inverse_a = 0;  // float [B][padded_m]: 1 / norm, 0 for a row of norm 0
  int64_t inverse_b = 0;  // float [B][padded_n]: the same; -1 where there is no candidate
  int64_t rank = 0;       // float [splits][B][M][keep], splits > 1
  int64_t index = 0;      // int32, the same shape
  int64_t partial = 0;    // float [B][splits][padded_c]: sums of unit rows of b (kMean, kSum)
  int64_t counts = 0;     // int32 [B][splits]: candidates among them
  int64_t sum = 0;        // float [B][padded_c]
  int64_t count = 0;      // int32 [B]
  int64_t bytes = 0;
};

inline Layout layout(const CosineParams& p, int64_t splits) {
  Layout at;
  const auto take = [&](int64_t bytes) {
    const int64_t from = at.bytes;
    at.bytes += ceil_div(bytes, 256) * 256;
    return from;
  };
  const bool sums = sums_rows(p);
  at.padded_m = ceil_div(p.M, kSide) * kSide;
  at.padded_n = ceil_div(p.N, kSide) * kSide;
  at.part = 16 / dtype_bytes(p.dtype);
  at.channel_blocks = p.C > 0 ? ceil_div(p.C, 128 * at.part) : 1;
  at.padded_c = ceil_div(p.C, at.part) * at.part;
  at.inverse_a = take(p.B * at.padded_m * 4);
  at.inverse_b = take(p.B * at.padded_n * 4);
  const int64_t lists = splits > 1 ? splits * p.B * p.M * keep_of(p) * 4 : 0;
  at.rank = take(lists);
  at.index = take(lists);
  at.partial = take(sums ? p.B * splits * at.padded_c * 4 : 0);
  at.counts = take(sums ? p.B * splits * 4 : 0);
  at.sum = take(sums ? p.B * at.padded_c * 4 : 0);
  at.count = take(sums ? p.B * 4 : 0);
  return at;
}

}  // namespace cosine
}  // namespace tokensieve

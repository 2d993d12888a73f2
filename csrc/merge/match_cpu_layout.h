// Workspace of match_cpu; plan and kernel read the same numbers. Static functions: every object file has its own copy.
#pragma once

#include "merge/match.h"
#include "similarity/cosine.h"

namespace tokensieve {

// The scoring half: cosine_match of the sources against the targets, each row read in place.
static inline CosineParams match_cosine(const MatchParams& p) {
  CosineParams c;
  c.B = p.B, c.M = p.S, c.N = p.T, c.C = p.D;
  c.dtype = p.H == 1 ? p.dtype : DType::kFloat32;
  const int64_t batch = p.H == 1 ? p.metric_stride[0] : p.N * p.D, row = p.H == 1 ? p.metric_stride[2] : p.D;
  c.a_stride[0] = c.b_stride[0] = batch;
  c.a_stride[1] = p.sources ? row : 2 * row;
  c.b_stride[1] = p.targets ? row : 2 * row;
  c.a_rows = p.sources, c.a_rows_stride = p.sources_stride;
  c.b_rows = p.targets, c.b_rows_stride = p.targets_stride;
  return c;
}

struct MatchLayout {
  // Offsets in bytes, multiples of 64.
  int64_t mean = 0;     // float [B][N][D]: mean over the heads, H > 1
  int64_t value = 0;    // float [B][S]: best similarity
  int64_t column = 0;   // int64 [B][S]: its target's place in the list
  int64_t allowed = 0;  // bool [B][T]: targets that take part (explicit targets or candidates)
  int64_t sort = 0;     // uint32 [B][4][S]
  int64_t cosine = 0;
  int64_t bytes = 0;
};

static inline MatchLayout match_layout(const MatchParams& p) {
  MatchLayout at;
  const auto take = [&](int64_t bytes) {
    const int64_t from = at.bytes;
    at.bytes += (bytes + 63) / 64 * 64;
    return from;
  };
  at.mean = take(p.H == 1 ? 0 : p.B * p.N * p.D * 4);
  at.value = take(p.B * p.S * 4);
  at.column = take(p.B * p.S * 8);
  at.allowed = take(p.targets || p.candidates ? p.B * p.T : 0);
  at.sort = take(p.B * p.S * 16);
  at.cosine = take(cosine_plan_cpu(match_cosine(p)).workspace_bytes);
  return at;
}

}  // namespace tokensieve

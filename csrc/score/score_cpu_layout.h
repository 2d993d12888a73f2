// How score_cpu cuts its work and its workspace; plan and kernel read the same numbers. Static functions: every object file has its own
// copy.
#pragma once

#include "score/colsum_layout.h"
#include "score/score.h"

namespace tokensieve {

struct ScoreLayout {
  int64_t group = 1;                      // query heads per key head
  int64_t key_begin = 0, key_end = 0;     // keys that are read
  int64_t chunk = 0, num_chunks = 0;      // keys per task (a multiple of 32), tasks per key head
  int64_t pass_rows = 1, num_passes = 0;  // query rows (of L) per pass over the keys, passes
  // Offsets in floats from the 64-byte aligned workspace; sizes hold B.
  int64_t query = 0;    // [B, H, pass_rows, D]: queries in float32 (only when they are not)
  int64_t mass = 0;     // [B, Hkv, num_chunks, group * pass_rows, chunk]: exp(logit - chunk maximum)
  int64_t maximum = 0;  // [B, H, pass_rows, num_chunks]
  int64_t sum = 0;      // [B, H, pass_rows, num_chunks]
  int64_t factor = 0;   // [B, num_chunks, H, pass_rows]: what turns mass into a weighted probability
  int64_t rows = 0;     // [B, H, R]: row reduction so far (only with several passes)
  int64_t floats = 0;   // all of it
};

static inline int64_t score_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline ScoreLayout score_layout(const ScoreParams& p) {
  ScoreLayout at;
  at.group = p.Hkv > 0 && p.H > 0 ? p.H / p.Hkv : 1;
  const bool range_only = p.normalize == Normalize::kRange || p.lse_in != nullptr;
  at.key_begin = range_only ? p.range_begin : 0;
  at.key_end = range_only ? p.range_end : p.N;
  const int64_t keys = at.key_end - at.key_begin;
  // 256 keys: one task reads 128 KB of float32 keys at D = 128 and keeps 1 KB of mass per row in L1.
  at.num_chunks = score_ceil(keys, 256);
  at.chunk = at.num_chunks > 0 ? score_ceil(score_ceil(keys, at.num_chunks), 32) * 32 : 32;
  // Rows of a pass: as many as keep the mass no larger than the keys themselves, within [16, 64].
  int64_t rows = p.D * dtype_bytes(p.dtype) / 4;
  rows = rows < 16 ? 16 : rows > 64 ? 64 : rows;
  at.pass_rows = rows / at.group > 1 ? rows / at.group : 1;
  if (at.pass_rows > p.L) at.pass_rows = p.L > 0 ? p.L : 1;
  at.num_passes = score_ceil(p.L, at.pass_rows);
  const int64_t rows_all = p.B * p.H * at.pass_rows;
  const bool keep_rows = at.num_passes > 1 && p.query_reduction != Reduction::kNone;
  const int64_t sizes[6] = {p.dtype == DType::kFloat32 ? 0 : rows_all * p.D,
                            rows_all * at.num_chunks * at.chunk,
                            rows_all * at.num_chunks,
                            rows_all * at.num_chunks,
                            rows_all * at.num_chunks,
                            keep_rows ? p.B * p.H * (p.range_end - p.range_begin) : 0};
  int64_t* const offsets[6] = {&at.query, &at.mass, &at.maximum, &at.sum, &at.factor, &at.rows};
  for (int i = 0; i < 6; ++i) {
    *offsets[i] = at.floats;
    at.floats += score_ceil(sizes[i], 16) * 16;
  }
  return at;
}

// Floats of workspace of an algorithm (tests force one).
static inline int64_t score_cpu_floats(const ScoreParams& p, ScoreAlgo algo) {
  return algo == ScoreAlgo::kCpuStrip ? colsum_layout(p).floats : score_layout(p).floats;
}

}  // namespace tokensieve

// How the all-row kernels (colsum_cpu.cpp, pagerank_cpu.cpp) cut their work and their workspace; plan and kernel read the same numbers.
// Static functions: every object file has its own copy.
#pragma once

#include "score/score.h"

namespace tokensieve {

constexpr int64_t kStripRows = 24;   // query rows whose logits are held at once: a multiple of every level's tile (2, 6, 8)
constexpr int64_t kStripSlack = 96;  // floats behind a strip's row: the end of a panel (32), a slice of columns (64)
// Packed keys of a wave: 8 MB, or one key head. They are read once for 24 rows, so they should stay in the last-level cache.
constexpr int64_t kPackedFloats = int64_t{1} << 21;
constexpr int64_t kWaveTasks = 64;  // parallel tasks of a wave, at least, where there are rows for them

struct ColsumLayout {
  int64_t group = 1;                   // query heads per key head
  int64_t key_begin = 0, key_end = 0;  // keys that are read
  int64_t pairs = 0;                   // batch items x key heads
  int64_t wave = 1;                    // pairs whose keys are packed at a time
  int64_t blocks = 0, parts = 1;       // strips of a head; part i of a head takes strips i, i + parts, ...
  int64_t strip_stride = 0;            // floats from one row of a strip to the next
  int64_t columns = 0;                 // floats of a column sum: R, rounded up
  // Offsets in floats from the 64-byte aligned workspace.
  int64_t packed = 0, packed_pair = 0;  // [wave][keys / panel, D rounded up to 16, panel]
  int64_t sums = 0;                     // [B, H, parts, columns]
  int64_t slots = 0, slot = 0;          // [tasks of a wave]: a strip and its query rows in float32; touched once per thread
  int64_t floats = 0;
};

static inline int64_t colsum_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline ColsumLayout colsum_layout(const ScoreParams& p) {
  ColsumLayout at;
  at.group = p.Hkv > 0 && p.H > 0 ? p.H / p.Hkv : 1;
  const bool range_only = p.normalize == Normalize::kRange || p.lse_in != nullptr;
  at.key_begin = range_only ? p.range_begin : 0;
  at.key_end = range_only ? p.range_end : p.N;
  const int64_t keys = at.key_end - at.key_begin;
  at.pairs = p.B * p.Hkv;
  at.blocks = colsum_ceil(p.L, kStripRows);
  at.packed_pair = colsum_ceil(keys, 32) * 32 * colsum_ceil(p.D, 16) * 16;
  at.wave = at.packed_pair > 0 ? kPackedFloats / at.packed_pair : at.pairs;
  if (at.wave > 2 * kWaveTasks) at.wave = 2 * kWaveTasks;
  if (at.wave > at.pairs) at.wave = at.pairs;
  if (at.wave < 1) at.wave = 1;
  at.wave = at.pairs > 0 ? colsum_ceil(at.pairs, colsum_ceil(at.pairs, at.wave)) : 1;  // waves of equal size
  at.parts = colsum_ceil(kWaveTasks, at.wave * at.group);
  if (at.parts > at.blocks) at.parts = at.blocks > 0 ? at.blocks : 1;
  at.strip_stride = colsum_ceil(keys, 16) * 16 + kStripSlack;
  at.columns = colsum_ceil(p.range_end - p.range_begin, 64) * 64;
  at.slot = kStripRows * (at.strip_stride + (p.dtype == DType::kFloat32 ? 0 : colsum_ceil(p.D, 16) * 16));
  at.sums = at.wave * at.packed_pair;
  at.slots = at.sums + p.B * p.H * at.parts * at.columns;
  at.floats = at.slots + at.wave * at.group * at.parts * at.slot;
  return at;
}

}  // namespace tokensieve

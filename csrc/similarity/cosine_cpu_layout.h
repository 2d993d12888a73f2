// How cosine_cpu cuts its work and its workspace; plan and kernel read the same numbers. Static functions: every object file has its own
// copy.
#pragma once

#include "similarity/cosine.h"
#include "similarity/panels_cpu.h"

namespace tokensieve {

struct CosineLayout {
  bool sums = false;             // kMean, kSum: no products
  int64_t row_blocks = 0;        // of kDotBlock rows of a
  int64_t column_blocks = 0;     // of kDotBlock rows of b
  int64_t splits = 1;            // tasks that share the column blocks of one row block
  bool pack_b = false;           // b is packed beforehand, because several row blocks read it
  int64_t keep = 1;              // neighbours per row: T, or 1 for kMax
  int64_t chunks = 0, rows = 0;  // kMean, kSum: chunks of b, rows in each
  int64_t images = 0;            // worked on together
  // Offsets in floats from the 64-byte aligned workspace; every size is a multiple of 16 and holds `images`.
  int64_t a = 0;        // [ceil(M / 16)][C rounded up to 16][16], scaled to norm 1
  int64_t b = 0;        // [ceil(N / 16)][C rounded up to 16][16] as it is (pack_b)
  int64_t inverse = 0;  // [N, padded]: 1 / norm of b (pack_b)
  int64_t rank = 0;     // [splits][M][keep]
  int64_t index = 0;    // [splits][M][keep], bits of int32
  int64_t sum = 0;      // [chunks][C, padded]: sums of unit rows of b
  int64_t count = 0;    // [chunks, padded] int32: candidates in a chunk
  int64_t floats = 0;   // all of it
};

static inline CosineLayout cosine_layout(const CosineParams& p) {
  CosineLayout at;
  at.sums = p.reduction == CosineReduction::kMean || p.reduction == CosineReduction::kSum;
  at.row_blocks = dot_ceil(p.M, kDotBlock);
  at.column_blocks = dot_ceil(p.N, kDotBlock);
  at.keep = p.reduction == CosineReduction::kMatch ? p.T : 1;
  // 32 tasks keep 16 threads busy to the end; every split fills its own lists, which long ones should not do often.
  const int64_t wanted = dot_ceil(at.keep > 2 ? 8 : 32, p.B * at.row_blocks > 0 ? p.B * at.row_blocks : 1);
  at.splits = wanted < at.column_blocks ? wanted : at.column_blocks > 0 ? at.column_blocks : 1;
  at.pack_b = at.row_blocks > 1;
  at.rows = dot_ceil(p.N, 64) < 64 ? 64 : dot_ceil(p.N, 64);  // up to 64 chunks of at least 64 rows
  at.chunks = at.sums ? dot_ceil(p.N, at.rows) : 0;
  const bool lists = !at.sums && p.reduction != CosineReduction::kNone;
  const int64_t panel = dot_panel_floats(p.C), list = lists ? dot_round_up(at.splits * p.M * at.keep, 16) : 0;
  const int64_t sizes[7] = {at.sums ? 0 : dot_ceil(p.M, kPanelRows) * panel,
                            !at.sums && at.pack_b ? dot_ceil(p.N, kPanelRows) * panel : 0,
                            !at.sums && at.pack_b ? dot_round_up(p.N, 16) : 0,
                            list,
                            list,
                            at.chunks * dot_round_up(p.C, 16),
                            dot_round_up(at.chunks, 16)};
  int64_t* const offsets[7] = {&at.a, &at.b, &at.inverse, &at.rank, &at.index, &at.sum, &at.count};
  int64_t one = 0;
  for (const int64_t size : sizes) one += size;
  at.images = images_at_once(p.B, one);
  for (int i = 0; i < 7; ++i) {
    *offsets[i] = at.floats;
    at.floats += at.images * sizes[i];
  }
  return at;
}

}  // namespace tokensieve

// How cosine_cpu cuts its work and its workspace; plan and kernel read the same numbers. Static functions: every object file has its own
// copy.
#pragma once

#include "similarity/cosine.h"
#include "similarity/panels_cpu.h"

namespace tokensieve {

struct CosineLayout {
  bool sums = false;             // kMean, kSum: no products
  int64_t block_rows = 0;        // rows of a in a task
  int64_t row_blocks = 0;        // of block_rows rows of a
  int64_t column_blocks = 0;     // of kDotBlock rows of b
  int64_t splits = 1;            // tasks that share the column blocks of one row block
  bool filter = false;           // int16 products first (cosine_filter_cpu.h)
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
  // filter: rows as int16, two channels an item, [panels][C rounded up to 16, / 2][16]; norms of what rounding took
  int64_t a_items = 0, b_items = 0, a_error = 0, b_error = 0;
  int64_t floats = 0;  // all of it
};

// Exact products of the candidates take 0.4 ns a row and channel (two rounds of packing), int16 products save 0.0045 ns a pair and channel:
// it pays above 90 columns. Above 16384 channels the sums of the rounding errors would need a proof of their own.
static inline bool cosine_filters(const CosineParams& p) {
  const bool best = (p.reduction == CosineReduction::kMatch && p.T == 1 && p.largest) || p.reduction == CosineReduction::kMax;
  return best && p.M >= 64 && p.N >= 192 && p.C >= 256 && p.C <= 16384;
}

static inline CosineLayout cosine_layout(const CosineParams& p) {
  CosineLayout at;
  at.sums = p.reduction == CosineReduction::kMean || p.reduction == CosineReduction::kSum;
  at.filter = cosine_filters(p);
  // The filter wants few splits, because each lists candidates of its own: 729 x 1152 spent a quarter of its time on those of three.
  at.block_rows = at.filter ? 48 : kDotBlock;
  at.row_blocks = dot_ceil(p.M, at.block_rows);
  at.column_blocks = dot_ceil(p.N, kDotBlock);
  at.keep = p.reduction == CosineReduction::kMatch ? p.T : 1;
  // 32 tasks keep 16 threads busy to the end; every split fills its own lists, which long ones should not do often.
  const int64_t wanted = dot_ceil(at.keep > 2 || at.filter ? 8 : 32, p.B * at.row_blocks > 0 ? p.B * at.row_blocks : 1);
  at.splits = wanted < at.column_blocks ? wanted : at.column_blocks > 0 ? at.column_blocks : 1;
  at.pack_b = at.row_blocks > 1 || at.filter;
  at.rows = dot_ceil(p.N, 64) < 64 ? 64 : dot_ceil(p.N, 64);  // up to 64 chunks of at least 64 rows
  at.chunks = at.sums ? dot_ceil(p.N, at.rows) : 0;
  const bool products = !at.sums, lists = products && p.reduction != CosineReduction::kNone;
  const int64_t a_panels = dot_ceil(p.M, kPanelRows), b_panels = dot_ceil(p.N, kPanelRows), panel = dot_panel_floats(p.C);
  const int64_t list = lists ? at.splits * p.M * at.keep : 0;
  const auto place = [&](int64_t images) {
    Offsets offsets = {images};
    at.a = offsets.take(products ? a_panels * panel : 0);
    at.b = offsets.take(products && at.pack_b ? b_panels * panel : 0);
    at.inverse = offsets.take(products && at.pack_b ? p.N : 0);
    at.rank = offsets.take(list);
    at.index = offsets.take(list);
    at.sum = offsets.take(at.chunks * dot_round_up(p.C, 16));
    at.count = offsets.take(at.chunks);
    at.a_items = offsets.take(at.filter ? a_panels * panel / 2 : 0);
    at.b_items = offsets.take(at.filter ? b_panels * panel / 2 : 0);
    at.a_error = offsets.take(at.filter ? p.M : 0);
    at.b_error = offsets.take(at.filter ? p.N : 0);
    at.images = images;
    at.floats = offsets.floats;
  };
  place(1);
  place(images_at_once(p.B, at.floats));
  return at;
}

}  // namespace tokensieve

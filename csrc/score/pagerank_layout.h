// attention_pagerank as passes of the all-row kernel: its ScoreParams, and the workspace behind that of colsum_layout.h. Static functions:
// every object file has its own copy.
#pragma once

#include "score/colsum_layout.h"
#include "score/pagerank.h"

namespace tokensieve {

struct PagerankLayout {
  ColsumLayout columns;
  int64_t lse = 0;   // [B, H, N]: written by the first pass, read by the others
  int64_t rank = 0;  // [B, H, N]: v, the weights of the rows
  int64_t floats = 0;
};

// Column sums over all rows and keys; the mask hides keys as a bool bias does.
static inline ScoreParams pagerank_rows(const PagerankParams& p) {
  ScoreParams s;
  s.query = p.query, s.key = p.key, s.workspace = p.workspace;
  s.B = p.B, s.H = p.H, s.Hkv = p.Hkv, s.L = p.N, s.N = p.N, s.D = p.D;
  for (int i = 0; i < 3; ++i) s.query_stride[i] = p.query_stride[i], s.key_stride[i] = p.key_stride[i];
  s.bias = p.mask, s.bias_dtype = DType::kBool;
  s.bias_stride[0] = p.mask_stride, s.bias_stride[3] = 1;
  s.range_end = p.N;
  s.scale = p.scale, s.causal = p.causal, s.dtype = p.dtype;
  s.query_reduction = Reduction::kSum, s.head_reduction = Reduction::kNone;
  return s;
}

static inline PagerankLayout pagerank_layout(const PagerankParams& p) {
  PagerankLayout at;
  at.columns = colsum_layout(pagerank_rows(p));
  const int64_t vector = colsum_ceil(p.B * p.H * p.N, 16) * 16;
  at.lse = at.columns.floats;
  at.rank = at.lse + vector;
  at.floats = at.rank + vector;
  return at;
}

}  // namespace tokensieve

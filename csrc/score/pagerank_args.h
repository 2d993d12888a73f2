// attention_pagerank on CUDA in terms of the sweeps of colsum_kernel.cuh. Internal to the room.
#pragma once

#include "score/colsum_args.h"
#include "score/pagerank.h"

namespace tokensieve {
namespace pagerank {

// An iteration is attention_scores of all rows, summed with weights v, heads kept; the mask is a bias of every row's normaliser.
inline ScoreParams score_params(const PagerankParams& r) {
  ScoreParams p;
  p.query = r.query, p.key = r.key, p.bias = r.mask, p.workspace = r.workspace, p.semaphores = r.semaphores;
  p.B = r.B, p.H = r.H, p.Hkv = r.Hkv, p.L = r.N, p.N = r.N, p.D = r.D;
  for (int i = 0; i < 3; ++i) p.query_stride[i] = r.query_stride[i], p.key_stride[i] = r.key_stride[i];
  p.bias_stride[0] = r.mask_stride, p.bias_stride[3] = 1;
  p.range_end = r.N;
  p.scale = r.scale;
  p.causal = r.causal;
  p.query_reduction = Reduction::kSum;
  p.head_reduction = Reduction::kNone;
  p.dtype = r.dtype;
  p.bias_dtype = DType::kBool;
  return p;
}

}  // namespace pagerank
}  // namespace tokensieve

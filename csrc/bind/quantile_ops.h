// score_quantiles, once for both back ends.
#pragma once

#include <vector>

#include "bind/select_ops.h"
#include "select/quantiles.h"

namespace tokensieve::bind {

template <typename Backend>
Tensor score_quantiles(const Tensor& scores, const std::vector<double>& q, const OptionalTensor& candidates) {
  const char* op = "score_quantiles";
  typename Backend::Guard guard(scores);
  QuantilesParams p;
  p.rows = selection_rows(op, scores, candidates, std::nullopt, 0);
  if (q.size() > kMaxQuantiles) fail(op, "q must hold at most 16 numbers, got ", q.size());
  for (const double value : q) {
    if (!(value >= 0.0 && value <= 1.0)) fail(op, "q must be in [0, 1], got ", value);
    p.q[p.Q++] = static_cast<float>(value);
  }
  Tensor out = allocate_like(scores, {p.rows.B, p.Q}, aoti_torch_dtype_float32());
  p.out = static_cast<float*>(out.mutable_data_ptr());
  raise(op, Backend::quantiles(p, scores));
  return out;
}

}  // namespace tokensieve::bind

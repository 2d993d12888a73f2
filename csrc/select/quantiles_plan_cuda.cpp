// Plan of quantiles_cuda: the shape of select_topk's kernel for the same rows.
#include "select/quantiles.h"

namespace tokensieve {

QuantilesPlan quantiles_plan_cuda(const QuantilesParams& p, const DeviceInfo& device) {
  QuantilesPlan plan;
  TopkParams rows = p.rows;
  rows.K = 0;
  plan.rows = topk_plan_cuda(rows, device);
  plan.rows.bytes_moved *= p.Q;
  plan.rows.bytes_moved += p.rows.B * p.Q * 4;
  return plan;
}

}  // namespace tokensieve

// Plan of quantiles_cpu: scratch for the keys of a row and for those that can still hold an order statistic.
#include "select/quantiles.h"

namespace tokensieve {

QuantilesPlan quantiles_plan_cpu(const QuantilesParams& p) {
  QuantilesPlan plan;
  TopkParams rows = p.rows;
  rows.K = 0;
  plan.rows = topk_plan_cpu(rows);
  plan.workspace_bytes = plan.rows.workspace_bytes;
  return plan;
}

}  // namespace tokensieve

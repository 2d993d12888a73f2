// allocate_budget, once for both back ends.
#pragma once

#include <tuple>

#include "bind/arguments.h"
#include "select/budget.h"

namespace tokensieve::bind {

template <typename Backend>
std::tuple<Tensor, Tensor> allocate_budget(const Tensor& weights, const std::optional<int64_t>& total, const OptionalTensor& total_rows,
                                           const std::optional<int64_t>& cap, const OptionalTensor& cap_parts,
                                           const std::optional<double>& ratio, int64_t mode, int64_t remainder, double temperature,
                                           double epsilon) {
  const char* op = "allocate_budget";
  typename Backend::Guard guard(weights);
  check_rank(op, "weights", weights, 2, "(B, P)");
  if (weights.scalar_type() != ScalarType::Float && weights.scalar_type() != ScalarType::Double) {
    fail(op, "weights must be float32 or float64");
  }
  if (!weights.is_contiguous()) fail(op, "weights must be contiguous");
  if (mode < 0 || mode > 3 || remainder < 0 || remainder > 1) fail(op, "mode and remainder must be codes in [0, 3] and [0, 1]");
  BudgetParams p;
  p.B = weights.size(0), p.P = weights.size(1);
  p.wide = weights.scalar_type() == ScalarType::Double;
  p.weights = weights.const_data_ptr();
  const bool adjusted = mode == static_cast<int64_t>(BudgetMode::kAdjusted);
  if ((total || total_rows) == adjusted || ratio.has_value() != adjusted) fail(op, "mode 'adjusted' takes ratio, the others take total");
  if (total.value_or(0) < 0 || cap.value_or(0) < 0) fail(op, "total and cap must not be negative");
  p.total = total.value_or(0), p.cap = cap.value_or(-1);
  p.total_rows = static_cast<const int64_t*>(checked_dense(op, "total", total_rows, weights, ScalarType::Long, {p.B}));
  p.cap_parts = static_cast<const int64_t*>(checked_dense(op, "cap", cap_parts, weights, ScalarType::Long, {p.B, p.P}));
  p.mode = static_cast<BudgetMode>(mode);
  p.remainder = static_cast<BudgetRemainder>(remainder);
  p.ratio = ratio.value_or(1.0), p.temperature = temperature, p.epsilon = epsilon;
  Tensor budget = allocate_like(weights, {p.B, p.P}, aoti_torch_dtype_int64());
  Tensor shares = allocate_like(weights, {p.B, p.P}, raw_dtype(weights));
  p.budget = static_cast<int64_t*>(budget.mutable_data_ptr());
  p.shares = shares.mutable_data_ptr();
  raise(op, Backend::budget(p, weights));
  return {budget, shares};
}

}  // namespace tokensieve::bind

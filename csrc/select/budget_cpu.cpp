// allocate_budget on the CPU: weights [B, P] -> budget int64 [B, P]; see budget.h for the rules, budget_row.h for the steps.
// One task a row; a handful of parts, so nothing here is vectorised. Deterministic: the CUDA kernel gives the same bits.
#include "core/simd.h"
#include "select/budget_row.h"

TS_ISA_BEGIN

struct BudgetGroup {
  template <typename Body>
  void each(int64_t n, Body&& body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <typename Body>
  void once(Body&& body) const {
    body();
  }
  template <typename F>
  static F product(F a, F b) {
    return a * b;
  }
  static double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
};

template <typename F>
static void budget_rows(const BudgetParams& p, int64_t begin, int64_t end) {
  F share[kMaxBudgetParts], part[kMaxBudgetParts], scalar[4];
  int64_t integer[2];
  BudgetGroup group;
  for (int64_t b = begin; b < end; ++b) {
    const select::BudgetRow<F, BudgetGroup> row = {p, b, group, share, part, scalar, integer};
    row.run();
  }
}

Status budget_level(const BudgetParams& p, ParallelForFn threads) {
  parallel_for(threads, p.B, 64, [&](int64_t begin, int64_t end) {
    if (p.wide) {
      budget_rows<double>(p, begin, end);
    } else {
      budget_rows<float>(p, begin, end);
    }
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status budget_level(const BudgetParams& params, ParallelForFn threads))

Status budget_cpu(const BudgetParams& params, CpuLevel level, ParallelForFn threads) {
  if (const char* why = select::budget_refusal(params)) return Status::error(why);
  if (params.P == 0) return Status::success();
  TS_CPU_SWITCH(level, budget_level(params, threads))
}
}  // namespace tokensieve
#endif

// One row of allocate_budget, the same source for both back ends, so that both give the same bits. A Group runs it: each() is a loop over
// the parts (CUDA: all threads of a block, then a barrier), once() a step of one thread (then a barrier), product() and fma() round once.
// Only templates over Group: an instruction level's Group is a type of its own, so no level's code can stand in for another's.
#pragma once

#include "select/budget.h"

#if defined(__CUDACC__)
#define TS_ROW __device__
#else
#define TS_ROW
#endif

namespace tokensieve {
namespace select {

// exp of x <= 0 in double, error below 1 ulp; below -708 it is 0. x = n ln 2 + r, Taylor to r^13 / 13! (next term: 4e-18).
template <typename Group>
TS_ROW double exp_of_negative(double x) {
  if (!(x >= -708.0)) return x < -708.0 ? 0.0 : x;
  const double biased = Group::fma(x, 1.4426950408889634, 6755399441055744.0);  // 1.5 * 2^52: rounds to an integer
  const double n = biased - 6755399441055744.0;
  double r = Group::fma(n, -0.693147180369123816490, x);
  r = Group::fma(n, -1.90821492927058770002e-10, r);
  double factorial = 6227020800.0, y = 1.0 / 6227020800.0;
  for (int k = 13; k >= 1; --k) {
    factorial /= k;
    y = Group::fma(y, r, 1.0 / factorial);
  }
  const uint64_t bits = static_cast<uint64_t>(1023 + static_cast<int64_t>(n)) << 52;
  double power;
  __builtin_memcpy(&power, &bits, 8);
  return y * power;
}

template <typename F>
TS_ROW int64_t whole_tokens(F x, int64_t cap) {
  if (!(x > F(0))) return 0;
  if (x >= static_cast<F>(cap)) return cap;
  return static_cast<int64_t>(x);
}

// State of a row. `share` and `part` are F [P], in shared memory on a GPU.
template <typename F, typename Group>
struct BudgetRow {
  const BudgetParams& p;
  int64_t b;
  Group& group;
  F *share, *part;
  F* scalar;         // 4 values that one thread leaves for all
  int64_t* integer;  // 2 more

  TS_ROW int64_t total() const {
    const int64_t t = p.total_rows != nullptr ? p.total_rows[b] : p.total;
    return t > 0 ? t : 0;
  }
  TS_ROW int64_t cap(int64_t i) const {
    const int64_t most = p.cap_parts != nullptr ? p.cap_parts[b * p.P + i] : p.cap;
    return most >= 0 ? most : p.cap_parts != nullptr ? 0 : total();
  }
  TS_ROW F sum(const F* x) const {
    F s = F(0);
    for (int64_t i = 0; i < p.P; ++i) s += x[i];
    return s;
  }

  TS_ROW void proportional() const {
    group.once([&] { scalar[0] = sum(share); });
    group.each(p.P, [&](int64_t i) { share[i] /= scalar[0]; });
  }

  TS_ROW void softmax() const {
    group.once([&] {
      F top = share[0];
      for (int64_t i = 1; i < p.P; ++i) top = share[i] > top ? share[i] : top;
      scalar[0] = top;
    });
    group.each(p.P, [&](int64_t i) {
      share[i] = static_cast<F>(exp_of_negative<Group>(static_cast<double>((share[i] - scalar[0]) / static_cast<F>(p.temperature))));
    });
    group.once([&] { scalar[1] = sum(share) + static_cast<F>(p.epsilon); });
    group.each(p.P, [&](int64_t i) { share[i] /= scalar[1]; });
  }

  TS_ROW void adjust() const {
    group.once([&] { scalar[0] = sum(share) / static_cast<F>(p.P); });
    group.each(p.P, [&](int64_t i) {
      const F s = Group::product(static_cast<F>(p.ratio), F(1) + share[i] - scalar[0]);
      share[i] = s < F(1) || s != s ? s : F(1);
    });
  }

  TS_ROW F limit(int64_t i) const { return static_cast<F>(cap(i)) / static_cast<F>(total()); }

  TS_ROW void redistribute() const {
    group.once([&] {
      F excess = F(0);
      for (int64_t i = 0; i < p.P; ++i) {
        const F c = limit(i);
        if (share[i] > c) excess += share[i] - c, share[i] = c;
      }
      scalar[0] = excess;
      scalar[1] = sum(share);
    });
    group.each(p.P, [&](int64_t i) { part[i] = share[i] / scalar[1]; });
    group.once([&] {
      F excess = scalar[0];
      for (int64_t i = 0; i < p.P && scalar[0] > F(0); ++i) {
        const F c = limit(i);
        if (!(share[i] < c)) continue;
        F s = share[i] + Group::product(part[i], excess);
        if (s > c) excess += s - c, s = c;
        share[i] = s;
      }
    });
  }

  TS_ROW F quota(int64_t i) const { return Group::product(share[i], static_cast<F>(p.mode == BudgetMode::kAdjusted ? cap(i) : total())); }

  // Leftover tokens: whole rounds over the parts below their cap first, then one token each to the largest fractions.
  TS_ROW void hand_out() const {
    int64_t* const n = p.budget + b * p.P;
    group.once([&] {
      int64_t left = total(), room = 0;
      for (int64_t i = 0; i < p.P; ++i) left -= n[i], room += cap(i) - n[i];
      left = left < room ? left : room;
      while (left > 0) {
        int64_t open = 0, least = left;
        for (int64_t i = 0; i < p.P; ++i) {
          const int64_t space = cap(i) - n[i];
          if (space > 0) ++open, least = space < least ? space : least;
        }
        if (left < open) break;
        const int64_t step = left / open < least ? left / open : least;
        for (int64_t i = 0; i < p.P; ++i) n[i] += n[i] < cap(i) ? step : 0;
        left -= step * open;
      }
      integer[0] = left;
    });
    group.each(p.P, [&](int64_t i) {
      const F q = quota(i), fraction = q > F(0) ? q - static_cast<F>(static_cast<int64_t>(q)) : F(0);
      part[i] = n[i] < cap(i) ? fraction : F(-1);  // a full part is in nobody's way
    });
    group.each(p.P, [&](int64_t i) {
      if (part[i] < F(0) || integer[0] == 0) return;
      int64_t ahead = 0;
      for (int64_t j = 0; j < p.P; ++j) ahead += part[j] > part[i] || (part[j] == part[i] && j < i) ? 1 : 0;
      if (ahead < integer[0]) ++n[i];
    });
  }

  TS_ROW void run() const {
    const F* const weights = static_cast<const F*>(p.weights) + b * p.P;
    group.each(p.P, [&](int64_t i) { share[i] = weights[i]; });
    if (p.mode == BudgetMode::kProportional || p.mode == BudgetMode::kCapped) {
      proportional();
    } else {
      softmax();
    }
    if (p.mode == BudgetMode::kCapped) redistribute();
    if (p.mode == BudgetMode::kAdjusted) adjust();
    F* const shares = static_cast<F*>(p.shares) + b * p.P;
    group.each(p.P, [&](int64_t i) {
      shares[i] = share[i];
      p.budget[b * p.P + i] = whole_tokens(quota(i), cap(i));
    });
    if (p.remainder == BudgetRemainder::kLargest) hand_out();
  }
};

// What both back ends refuse; null if nothing.
inline const char* budget_refusal(const BudgetParams& p) {
  if (p.P > kMaxBudgetParts) return "at most 4096 parts";
  if (!(p.temperature > 0.0)) return "temperature must be positive";
  const bool no_cap = p.cap_parts == nullptr && p.cap < 0;
  if (no_cap && (p.mode == BudgetMode::kCapped || p.mode == BudgetMode::kAdjusted)) return "this mode needs a cap";
  if (p.mode == BudgetMode::kAdjusted && p.remainder != BudgetRemainder::kDrop) return "this mode has no total to hand out";
  return nullptr;
}

}  // namespace select
}  // namespace tokensieve

#undef TS_ROW

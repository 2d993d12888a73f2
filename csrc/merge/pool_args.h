// Which tokens an output position of pool_grid covers, and which positions cover a token. Integers only, the same on both back ends.
// All static: the CPU kernels compile them once per instruction level, and the linker must not merge these copies.
#pragma once

#include "merge/pool.h"

namespace tokensieve {
namespace pool {

template <typename Int>
struct RangeOf {
  Int begin = 0, end = 0;
};
using Range = RangeOf<int64_t>;
// Of an axis: int64_t on the CPU, int in kernels, where a division of 64 bits costs 40 instructions.
template <typename Int>
using Number = typename PoolAxisOf<Int>::Number;

template <typename Int>
static constexpr Int floor_div(Int a, Int b) {  // b > 0
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

template <typename Int>
static constexpr Int ceil_div(Int a, Int b) {
  return -floor_div(-a, b);
}

// kBilinear: source position (o + 1/2) in / out - 1/2, at least 0, as a whole token and a rest in units of 1 / (2 out).
template <typename Int>
struct Tap {
  Int token = 0, rest = 0;
};

template <typename Int>
static constexpr Tap<Int> bilinear_tap(const PoolAxisOf<Int>& a, Number<Int> o) {
  const Int at = (2 * o + 1) * a.in - a.out;
  if (at <= 0) return {0, 0};
  const Int token = at / (2 * a.out);
  return token >= a.in - 1 ? Tap<Int>{a.in - 1, 0} : Tap<Int>{token, at - token * 2 * a.out};
}

// The weight of token i in output o, 0 where o does not cover i. The position is rounded to float32 as in F.interpolate (the side's ratio,
// then the position; the product in between is exact in double), so that weights are torch's bits.
template <typename Int>
static constexpr float bilinear_weight(const PoolAxisOf<Int>& a, Number<Int> o, Number<Int> i) {
  const Tap<Int> tap = bilinear_tap(a, o);
  if (tap.rest == 0) return i == tap.token ? 1.0f : 0.0f;
  const float ratio = static_cast<float>(a.in) / static_cast<float>(a.out);
  const float upper = static_cast<float>(static_cast<double>(ratio) * (static_cast<double>(o) + 0.5) - 0.5) - static_cast<float>(tap.token);
  const float inside = upper < 0.0f ? 0.0f : upper > 1.0f ? 1.0f : upper;
  return i == tap.token ? 1.0f - inside : i == tap.token + 1 ? inside : 0.0f;
}

// Tokens that output o covers: [begin, end). Never empty.
template <typename Int>
static constexpr RangeOf<Int> tokens_of(const PoolAxisOf<Int>& a, PoolKind kind, bool adaptive, Number<Int> o) {
  if (kind == PoolKind::kBilinear) {
    const Tap<Int> tap = bilinear_tap(a, o);
    return {tap.token, tap.token + (tap.rest > 0 ? 2 : 1)};
  }
  if (!adaptive) return {o * a.step, o * a.step + a.span};
  const Int part = o / a.step, u = o - part * a.step;
  return {part * a.span + u * a.span / a.step, part * a.span + ceil_div((u + 1) * a.span, a.step)};
}

template <typename Int>
static constexpr Int clamp(Int x, Number<Int> low, Number<Int> high) {
  return x < low ? low : x > high ? high : x;
}

// The first output of kBilinear whose whole token is at least i.
template <typename Int>
static constexpr Int bilinear_first(const PoolAxisOf<Int>& a, Number<Int> i) {
  return i <= 0 ? 0 : clamp(ceil_div(2 * a.out * i + a.out - a.in, 2 * a.in), 0, a.out);
}

// Outputs that may cover token i: [begin, end), perhaps empty. Of kBilinear some have weight 0.
template <typename Int>
static constexpr RangeOf<Int> outputs_of(const PoolAxisOf<Int>& a, PoolKind kind, bool adaptive, Number<Int> i) {
  if (kind == PoolKind::kBilinear) return {bilinear_first(a, i - 1), i >= a.in - 1 ? a.out : bilinear_first(a, i + 1)};
  if (!adaptive) return {clamp(ceil_div(i - a.span + 1, a.step), 0, a.out), clamp(i / a.step + 1, 0, a.out)};
  const Int part = i / a.span, u = i - part * a.span;
  return {part * a.step + u * a.step / a.span, part * a.step + ceil_div((u + 1) * a.step, a.span)};
}

// The most tokens that an output covers.
static constexpr int64_t largest_window(const PoolAxis& a, PoolKind kind, bool adaptive) {
  if (kind == PoolKind::kBilinear) return 2;
  if (!adaptive) return a.span;
  int64_t most = 0;
  for (int64_t u = 0; u < a.step; ++u) {
    const Range r = tokens_of(a, kind, true, u);
    most = r.end - r.begin > most ? r.end - r.begin : most;
  }
  return most;
}

static constexpr int64_t tokens(const PoolParams& p) { return p.axes[0].in * p.axes[1].in * p.axes[2].in; }
static constexpr int64_t outputs(const PoolParams& p) { return p.axes[0].out * p.axes[1].out * p.axes[2].out; }
static constexpr int64_t window(const PoolParams& p) {
  return largest_window(p.axes[0], p.kind, p.adaptive) * largest_window(p.axes[1], p.kind, p.adaptive) *
         largest_window(p.axes[2], p.kind, p.adaptive);
}
static constexpr int64_t stacked(const PoolParams& p) { return p.kind == PoolKind::kStack ? window(p) : 1; }

// Rows of a packed sequence after pooling.
static constexpr int64_t rows(const RunsParams& p) { return p.S - p.images * (p.length - p.length / p.stride); }

// means_cpu: tokens whose column sums are alive, and channels of a task. 1 KB runs of float32 read a page four times; with 128 channels and
// eight times the first-level TLB missed at every run, and a call took 1.3 times as long.
constexpr int kMeansRun = 8;
static constexpr int64_t means_width(const MeansParams& p) { return p.C > 0 && p.C < 256 ? p.C : 256; }

}  // namespace pool
}  // namespace tokensieve

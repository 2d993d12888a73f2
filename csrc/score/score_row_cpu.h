// What a row sees, and its logits: visibility, bias, activation. Shared by the few-row and the all-row kernel of score_cpu.
#pragma once

#include "core/simd.h"
#include "score/score.h"

TS_ISA_BEGIN

// Number of leading keys that row l of batch b may see; 0 for an unused row.
TS_INLINE int64_t visible_keys(const ScoreParams& p, int64_t b, int64_t l) {
  int64_t end = p.N;
  if (p.query_positions) {
    end = p.query_positions[b * p.L + l] + 1;
  } else if (p.causal) {
    end = p.N - p.L + l + 1;
  }
  return end < 0 ? 0 : smaller(end, p.N);
}

struct BiasRow {
  const void* data = nullptr;  // of key 0 of the chunk; null = none
  DType dtype = DType::kFloat32;
  int64_t step = 1;  // 0 = one value for all keys
};

template <typename T>
TS_INLINE Vec bias_sixteen(const void* data, int64_t step, int64_t i, int64_t n) {
  const T* x = static_cast<const T*>(data);
  if (step == 0) return splat(to_float(x[0]));
  return n >= kLanes ? load(x + i) : load_n(x + i, n);
}

TS_INLINE Vec float_bias(const BiasRow& bias, int64_t i, int64_t n) {
  if (bias.dtype == DType::kFloat32) return bias_sixteen<float>(bias.data, bias.step, i, n);
  if (bias.dtype == DType::kFloat16) return bias_sixteen<Half>(bias.data, bias.step, i, n);
  return bias_sixteen<BFloat>(bias.data, bias.step, i, n);
}

TS_INLINE Mask flagged_lanes(const BiasRow& bias, int64_t i, int64_t n) {  // of a bool bias
  const uint8_t* flag = static_cast<const uint8_t*>(bias.data);
  Mask visible = first_lanes(n);
  if (bias.step == 0) return flag[0] ? visible : 0;
  if (n >= kLanes) return visible & nonzero_bytes(flag + i);
  for (int64_t j = 0; j < n; ++j) visible &= ~(static_cast<Mask>(flag[i + j] == 0) << j);
  return visible;
}

// s = scale * dot + bias for keys [i, i + n); lanes that are not visible get -inf.
TS_INLINE Vec logits(Vec dot, Vec scale, const BiasRow& bias, int64_t i, int64_t n) {
  if (!bias.data) return select(first_lanes(n), mul(dot, scale), splat(-kInfinity));
  if (bias.dtype == DType::kBool) return select(flagged_lanes(bias, i, n), mul(dot, scale), splat(-kInfinity));
  return select(first_lanes(n), fma(dot, scale, float_bias(bias, i, n)), splat(-kInfinity));
}

TS_INLINE BiasRow bias_row(const ScoreParams& p, int64_t b, int64_t h, int64_t l, int64_t key) {
  BiasRow bias;
  if (!p.bias) return bias;
  const int64_t first = b * p.bias_stride[0] + h * p.bias_stride[1] + l * p.bias_stride[2] + key * p.bias_stride[3];
  bias.data = static_cast<const char*>(p.bias) + first * dtype_bytes(p.bias_dtype);
  bias.dtype = p.bias_dtype;
  bias.step = p.bias_stride[3];
  return bias;
}

TS_INLINE Mask above_minus_infinity(Vec x) { return greater(x, splat(-kInfinity)) | is_nan(x); }

TS_INLINE Vec sigmoid(Vec x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(zero(), x)))); }

// Value of an invisible key: 0, but "max" over rows of logits must not see it.
TS_INLINE Vec hidden_value(const ScoreParams& p) {
  return splat(p.activation == Activation::kLogit && p.query_reduction == Reduction::kMax ? -kInfinity : 0.0f);
}

TS_INLINE Vec activated(const ScoreParams& p, Vec s) {  // kLogit, kSigmoid
  return select(above_minus_infinity(s), p.activation == Activation::kSigmoid ? sigmoid(s) : s, hidden_value(p));
}

TS_INLINE float row_weight(const ScoreParams& p, int64_t b, int64_t l) {
  const bool weighted = p.row_weights && p.query_reduction != Reduction::kNone && p.query_reduction != Reduction::kMax;
  return weighted ? p.row_weights[b * p.L + l] : 1.0f;
}

// A row that is NaN is so on the keys that it sees and 0 on the others. A float bias hides nothing from it: NaN - inf is NaN, as in torch.
[[maybe_unused]] static void nan_row(float* mass, int64_t visible, const BiasRow& bias) {
  for (int64_t i = 0; i < visible; i += kLanes) {
    const int64_t n = visible - i;
    const Mask seen = bias.data && bias.dtype == DType::kBool ? flagged_lanes(bias, i, n) : first_lanes(n);
    store(mass + i, select(seen, splat(__builtin_nanf("")), zero()));
  }
}

// Turns the dot products of one row and some keys into mass, in place. `visible` of the `count` keys are looked at, the others get mass 0.
[[maybe_unused]] static void mass_of_row(float* mass, int64_t visible, int64_t count, float scale_value, const BiasRow& bias,
                                         const float* lse, float* maximum, float* sum) {
  const Vec scale = splat(scale_value);
  Vec top = splat(-kInfinity), total = zero();
  if (lse && !(*lse > -kInfinity) && *lse == *lse) visible = 0;     // -inf: the caller's row sees nothing
  const int64_t whole = bias.data ? 0 : visible / kLanes * kLanes;  // keys without a mask
  if (!lse) {
    for (int64_t i = 0; i < whole; i += kLanes) top = max(mul(load(mass + i), scale), top);  // passes NaN by; the sum below meets it
  }
  for (int64_t i = whole; i < visible; i += kLanes) {
    const Vec s = logits(load(mass + i), scale, bias, i, visible - i);
    top = max(s, top);
    store(mass + i, s);
  }
  *maximum = reduce_max(top);
  const Vec shift = splat(lse ? *lse : *maximum > -kInfinity ? *maximum : 0.0f);
  const Vec most = splat(88.8f);  // a given lse may be anything: from 128 ln 2 on exp_of_mass gives inf
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec e = exp_of_mass(min(most, sub(mul(load(mass + i), scale), shift)));
    total = add(total, e);
    store(mass + i, e);
  }
  for (int64_t i = whole; i < visible; i += kLanes) {
    const Vec e = select(first_lanes(visible - i), exp_of_mass(min(most, sub(load(mass + i), shift))), zero());
    total = add(total, e);
    store(mass + i, e);
  }
  *sum = reduce_add(total);
  if (lse && *lse != *lse) nan_row(mass, visible, bias);
  for (int64_t i = (visible + kLanes - 1) / kLanes * kLanes; i < count; i += kLanes) store(mass + i, zero());
}

// Natural log-sum-exp of a row from its maximum and the sum of exp(s - maximum); -inf where nothing was seen.
TS_INLINE float row_lse(float maximum, float sum) {
  return sum == 0.0f ? -kInfinity : sum != sum ? sum : static_cast<float>(static_cast<double>(maximum) + log(sum));
}

// kLogit, kSigmoid: the chunk keeps the values themselves; maximum and sum only serve the lse.
[[maybe_unused]] static void values_of_row(const ScoreParams& p, float* mass, int64_t visible, int64_t count, const BiasRow& bias,
                                           float* maximum, float* sum) {
  const Vec scale = splat(p.scale);
  Vec top = splat(-kInfinity), total = zero();
  for (int64_t i = 0; i < visible; i += kLanes) {
    const Vec s = logits(load(mass + i), scale, bias, i, visible - i);
    top = max(s, top);
    store(mass + i, s);
  }
  *maximum = reduce_max(top);
  const Vec shift = splat(*maximum > -kInfinity ? *maximum : 0.0f);
  for (int64_t i = 0; i < visible; i += kLanes) {
    const Vec s = load(mass + i);
    total = add(total, exp(sub(s, shift)));
    store(mass + i, activated(p, s));
  }
  *sum = reduce_add(total);
  for (int64_t i = (visible + kLanes - 1) / kLanes * kLanes; i < count; i += kLanes) store(mass + i, hidden_value(p));
}

TS_ISA_END

// One virtual vector of 16 floats for the CPU kernels: 1 AVX-512 register, 2 AVX2 registers, or 4 short vectors (SSE2, NEON) elsewhere.
//
// Every level computes the same bits: fma() rounds once everywhere (without the instruction: in double, rounded to odd), sums over the
// lanes use one tree (i + i+8, + i+4, + i+2, + i+1), and exp() is one polynomial (error below 2 ulp). No libm, no -ffast-math.
// Everything is always_inline in the level's own namespace, so the linker can never merge two levels' copies of a function.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/dtype.h"

#if defined(TS_ISA)

#if TS_ISA_LEVEL > 0 || defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define TS_INLINE static inline __attribute__((always_inline))

TS_ISA_BEGIN

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
using Mask = uint32_t;  // bit i = lane i, 16 used

constexpr int kLanes = 16;
constexpr float kInfinity = __builtin_inff();

TS_INLINE Mask first_lanes(int64_t n) { return n >= kLanes ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u; }
TS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

TS_INLINE float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

TS_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

TS_INLINE float to_float(float x) { return x; }
TS_INLINE float to_float(BFloat x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
TS_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: 2^-14 + m * 2^-24, less 2^-14; only normal floats, so a flush-denormals mode cannot change it.
  return float_of_bits(sign | bits_of_float(float_of_bits(0x38800000u | (magnitude << 13)) - float_of_bits(0x38800000u)));
}

#if TS_ISA_LEVEL == 2  // ------------------------------------------------------------------------------------ AVX-512

struct Vec {
  __m512 v;
};

TS_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
TS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
TS_INLINE Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
TS_INLINE Vec widen_bfloat(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
TS_INLINE Vec load(const BFloat* p) { return widen_bfloat(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TS_INLINE Vec load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n)), p)}; }
TS_INLINE Vec load_n(const Half* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(n)), p))};
}
TS_INLINE Vec load_n(const BFloat* p, int64_t n) {
  return widen_bfloat(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(n)), p));
}
TS_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
TS_INLINE void store_n(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(n)), x.v); }
TS_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
TS_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TS_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
TS_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
TS_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
TS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // a > b ? a : b, so a NaN in a gives b
TS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // a < b ? a : b, so a NaN in a gives b
TS_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
TS_INLINE Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
TS_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(static_cast<__mmask16>(m), b.v, a.v)}; }
TS_INLINE Vec where_greater(Vec a, Vec b, Vec x, Vec y) { return select(greater(a, b), x, y); }
TS_INLINE Vec where_nan(Vec a, Vec x, Vec y) { return select(is_nan(a), x, y); }
TS_INLINE Vec shift_up(Vec x, Vec below) {  // lane 0 = below's lane 15, lane i = x's lane i - 1; bits move as they are
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(x.v), _mm512_castps_si512(below.v), 15))};
}
TS_INLINE Vec scale_by_power_of_two(Vec x, Vec biased) {  // x * 2^n, n in the low bits of `biased` (1.5 * 2^23 + n)
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(_mm512_castps_si512(biased.v), 23)))};
}
TS_INLINE Vec power_of_two(Vec biased) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased.v), 23))}; }
TS_INLINE Mask nonzero_bytes(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(x, x);
}
TS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Lane j of the result = the tree sum of x[j].
TS_INLINE Vec reduce_rows(const Vec* x) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // the last steps interleave, so position i takes row 4 * (i % 4) + i / 4
    const int first = 2 * i, second = 2 * i + 1;
    const __m512 u = x[4 * (first % 4) + first / 4].v, w = x[4 * (second % 4) + second / 4].v;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u, w, 0x44), _mm512_shuffle_f32x4(u, w, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d u = _mm512_castps_pd(b[2 * i]), w = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, w)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, w)));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd))};
}

TS_INLINE void transpose(Vec* x) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v);
    a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d u = _mm512_castps_pd(a[4 * i + j]), w = _mm512_castps_pd(a[4 * i + 2 + j]);
      b[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(u, w));
      b[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(u, w));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 u = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), w = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    const __m512 y = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd), z = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    x[i].v = _mm512_shuffle_f32x4(u, w, 0x88);
    x[8 + i].v = _mm512_shuffle_f32x4(u, w, 0xdd);
    x[4 + i].v = _mm512_shuffle_f32x4(y, z, 0x88);
    x[12 + i].v = _mm512_shuffle_f32x4(y, z, 0xdd);
  }
}

#elif TS_ISA_LEVEL == 1  // ------------------------------------------------------------------------------------ AVX2

struct Vec {
  __m256 lo, hi;
};

TS_INLINE __m256i lane_mask(Mask m) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m)), bit), bit);
}
TS_INLINE Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TS_INLINE __m256 widen(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
TS_INLINE __m256 widen(const BFloat* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
template <typename T>
TS_INLINE Vec load(const T* p) {
  return {widen(p), widen(p + 8)};
}
TS_INLINE Vec load_n(const float* p, int64_t n) {
  const Mask m = first_lanes(n);
  return {_mm256_maskload_ps(p, lane_mask(m)), _mm256_maskload_ps(p + 8, lane_mask(m >> 8))};
}
template <typename T>
TS_INLINE Vec load_n(const T* p, int64_t n) {
  T part[kLanes] = {};
  if (n >= 8) __builtin_memcpy(part, p, 16);  // the usual tail: D = 72 is 4 * 16 + 8
  for (int64_t i = n >= 8 ? 8 : 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
TS_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
TS_INLINE void store_n(float* p, Vec x, int64_t n) {
  const Mask m = first_lanes(n);
  _mm256_maskstore_ps(p, lane_mask(m), x.lo);
  _mm256_maskstore_ps(p + 8, lane_mask(m >> 8), x.hi);
}
TS_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TS_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TS_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TS_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TS_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
TS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
TS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TS_INLINE Mask pack_mask(__m256 lo, __m256 hi) {
  return static_cast<Mask>(_mm256_movemask_ps(lo)) | static_cast<Mask>(_mm256_movemask_ps(hi)) << 8;
}
TS_INLINE Mask greater(Vec a, Vec b) { return pack_mask(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)); }
TS_INLINE Mask is_nan(Vec a) { return pack_mask(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)); }
TS_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(lane_mask(m))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(lane_mask(m >> 8)))};
}
// a > b ? x : y and a is NaN ? x : y in each lane; a Mask in between would cost 6 instructions more.
TS_INLINE Vec where_greater(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
TS_INLINE Vec where_nan(Vec a, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}
TS_INLINE __m256 shift_up_eight(__m256 x, __m256 below) {
  const __m256i middle = _mm256_castps_si256(_mm256_permute2f128_ps(below, x, 0x21));  // below's upper half, x's lower half
  return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(x), middle, 12));
}
TS_INLINE Vec shift_up(Vec x, Vec below) { return {shift_up_eight(x.lo, below.hi), shift_up_eight(x.hi, x.lo)}; }
TS_INLINE __m256 shift_exponent(__m256 x, __m256 biased) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(biased), 23)));
}
TS_INLINE Vec scale_by_power_of_two(Vec x, Vec biased) { return {shift_exponent(x.lo, biased.lo), shift_exponent(x.hi, biased.hi)}; }
TS_INLINE __m256 bits_to_exponent(__m256 biased) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23)); }
TS_INLINE Vec power_of_two(Vec biased) { return {bits_to_exponent(biased.lo), bits_to_exponent(biased.hi)}; }
TS_INLINE Mask nonzero_bytes(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return static_cast<Mask>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128()))) ^ 0xffffu;
}
TS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

TS_INLINE __m256 reduce_eight(const Vec* x) {
  __m256 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // the last steps interleave, so position i takes row 4 * (i % 2) + i / 2
    const Vec u = x[4 * (i % 2) + i / 2];
    a[i] = _mm256_add_ps(u.lo, u.hi);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_add_ps(_mm256_permute2f128_ps(a[2 * i], a[2 * i + 1], 0x20), _mm256_permute2f128_ps(a[2 * i], a[2 * i + 1], 0x31));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d u = _mm256_castps_pd(b[2 * i]), w = _mm256_castps_pd(b[2 * i + 1]);
    c[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(u, w)), _mm256_castpd_ps(_mm256_unpackhi_pd(u, w)));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(c[0], c[1], 0x88), _mm256_shuffle_ps(c[0], c[1], 0xdd));
}
TS_INLINE Vec reduce_rows(const Vec* x) { return {reduce_eight(x), reduce_eight(x + 8)}; }

TS_INLINE void transpose_eight(__m256* x) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d u = _mm256_castps_pd(a[4 * i + j]), w = _mm256_castps_pd(a[4 * i + 2 + j]);
      b[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(u, w));
      b[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(u, w));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    x[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}
TS_INLINE void transpose(Vec* x) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {  // 8 x 8 blocks; the two halves of the rows swap places at the end
    __m256 lo[8], hi[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      lo[i] = x[8 * half + i].lo;
      hi[i] = x[8 * half + i].hi;
    }
    transpose_eight(lo);
    transpose_eight(hi);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[8 * half + i] = {lo[i], hi[i]};
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256 keep = x[i].hi;
    x[i].hi = x[8 + i].lo;
    x[8 + i].lo = keep;
  }
}

#else  // ------------------------------------------------------------------------------------ portable: SSE2, NEON, anything
#include "core/simd_portable.h"
#endif

// ---- on top of the level's primitives ----------------------------------------------------------------------------------------

TS_INLINE Vec zero() { return splat(0.0f); }
template <typename T>
TS_INLINE Vec load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}
template <typename T>
TS_INLINE void store_upto(T* p, Vec x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else if (n > 0) {
    store_n(p, x, n);
  }
}
TS_INLINE Vec nan_max(Vec a, Vec b) { return where_nan(a, a, where_greater(a, b, a, b)); }  // either NaN gives NaN

#if TS_ISA_LEVEL > 0
TS_INLINE float reduce_add(Vec x) {  // in registers: 4 additions; through memory it took a tenth of a softmax row of 577
#if TS_ISA_LEVEL == 2
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

TS_INLINE float reduce_max(Vec x) {  // of lanes without NaN
#if TS_ISA_LEVEL == 2
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
TS_INLINE float reduce_add(Vec x) {
  float lane[kLanes];
  store(lane, x);
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] = lane[i] + lane[i + step];
  }
  return lane[0];
}

TS_INLINE float reduce_max(Vec x) {  // of lanes without NaN
  float lane[kLanes];
  store(lane, x);
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  }
  return lane[0];
}
#endif

// exp: x = n ln 2 + r, |r| <= 0.35, degree 6 (Cephes coefficients). Below -87.3365 (2^-126) 0, above 88.7228 inf, NaN stays NaN.
TS_INLINE Vec exp(Vec x) {
  const Vec biased = fma(x, splat(1.44269504088896341f), splat(12582912.0f));  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const Vec n = sub(biased, splat(12582912.0f));
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), splat(1.0f));
  y = scale_by_power_of_two(y, biased);
  y = where_greater(splat(-87.3365f), x, zero(), y);
  y = where_greater(x, splat(88.7228f), splat(kInfinity), y);
  return where_nan(x, x, y);
}

// exp of softmax logits less their maximum, in 12 operations instead of 19: x <= 0 (or below 88.9) or NaN, which stays NaN; relative error
// below 2e-7 + 2e-8 |x|. 2^(x log2 e) = 2^n 2^r, |r| <= 0.5, minimax polynomial of degree 5 (1e-7). 2^n is made of the sum's low bits,
// n + 127: at n = -127, where x is cut off, they are 0 and so is the product.
TS_INLINE Vec exp_of_mass(Vec x) {
  x = max(splat(-88.03f), x);
  const Vec biased = fma(x, splat(1.44269504088896341f), splat(12583039.0f));  // 1.5 * 2^23 + 127
  const Vec r = fma(x, splat(1.44269504088896341f), sub(splat(12583039.0f), biased));
  Vec y = splat(1.326472731307149e-3f);
  y = fma(y, r, splat(9.671512991189957e-3f));
  y = fma(y, r, splat(5.550733581185341e-2f));
  y = fma(y, r, splat(2.402224242687225e-1f));
  y = fma(y, r, splat(6.931470036506653e-1f));
  return mul(fma(y, r, splat(1.0f)), power_of_two(biased));
}

// Natural log of a positive finite float, in double: atanh series on the mantissa, |t| <= 0.172, error below 1e-12.
TS_INLINE double log(float x) {
  double value = x;
  uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
  __builtin_memcpy(&value, &bits, 8);
  if (value > 1.4142135623730951) {
    value *= 0.5;
    exponent += 1;
  }
  const double t = (value - 1.0) / (value + 1.0), t2 = t * t;
  double series = 0.0;
  for (int i = 15; i >= 1; i -= 2) series = series * t2 + 1.0 / i;
  return 2.0 * t * series + static_cast<double>(exponent) * 0.69314718055994530942;
}

TS_ISA_END

#endif  // TS_ISA

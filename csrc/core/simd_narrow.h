// Vec -> float16 and bfloat16 in memory, rounded to nearest even, NaN stays a (quiet) NaN: the same bits at every level.
#pragma once

#include "core/simd.h"

#if defined(TS_ISA)
TS_ISA_BEGIN

TS_INLINE BFloat to_bfloat(float x) {
  const uint32_t bits = bits_of_float(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded)};
}

TS_INLINE Half to_half(float x) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t r;
  if (magnitude > 0x7f800000u) {
    r = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536: infinity, as rounding makes of 65520 and above
    r = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal
    const uint32_t rebased = magnitude - 0x38000000u;
    r = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  } else {  // beside 0.5 the last bit of a float is 2^-24, a subnormal half's unit
    r = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | r)};
}

#if TS_ISA_LEVEL == 2
TS_INLINE void store(BFloat* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), upper, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
#elif TS_ISA_LEVEL == 1
TS_INLINE __m256i to_bfloat_eight(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), nan);
}
TS_INLINE void store(BFloat* p, Vec x) {
  const __m256i packed = _mm256_packus_epi32(to_bfloat_eight(x.lo), to_bfloat_eight(x.hi));  // within halves: lo, hi, lo, hi
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
#else
TS_INLINE void store(BFloat* p, Vec x) {
  float lane[kLanes];
  store(lane, x);
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat(lane[i]);  // integer steps only: the compiler makes vectors of them
}
#endif

TS_INLINE void store(Half* p, Vec x) {
#if TS_ISA_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif TS_ISA_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  float lane[kLanes];
  store(lane, x);
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(lane[i]);
#endif
}

template <typename T>
TS_INLINE void store_n(T* p, Vec x, int64_t n) {
  T part[kLanes];
  store(part, x);
  for (int64_t i = 0; i < n && i < kLanes; ++i) p[i] = part[i];
}

TS_ISA_END
#endif

// 16 ordered keys (int32) at a time: which are above a threshold, and packing the chosen ones without branches.
// AVX2 packs through a table of 256 x 8 bytes (the positions of the set bits); AVX-512 has compress. Both write whole vectors.
#pragma once

#include "core/simd.h"

TS_ISA_BEGIN

#if TS_ISA_LEVEL == 2

TS_INLINE Mask above(const int32_t* keys, int32_t threshold) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(threshold));
}

// Appends the keys of the lanes in `mask`; 16 lanes may be written.
TS_INLINE int64_t append_keys(int32_t* out, const int32_t* keys, Mask mask) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(keys)));
  return __builtin_popcount(mask);
}

TS_INLINE int64_t append_eight(int64_t* out, int64_t first, Mask mask) {
  const __m512i lanes = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), lanes));
  return __builtin_popcount(mask);
}

#elif TS_ISA_LEVEL == 1

struct SetBits {
  uint64_t row[256];  // byte i of row m: position of the i-th set bit of m
};
constexpr SetBits make_set_bits() {
  SetBits table = {};
  for (int m = 0; m < 256; ++m) {
    int at = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (m >> bit & 1) table.row[m] |= static_cast<uint64_t>(bit) << (8 * at++);
    }
  }
  return table;
}
static constexpr SetBits kSetBits = make_set_bits();

TS_INLINE Mask above(const int32_t* keys, int32_t threshold) {
  const __m256i t = _mm256_set1_epi32(threshold);
  const __m256i* x = reinterpret_cast<const __m256i*>(keys);
  return pack_mask(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_loadu_si256(x), t)),
                   _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_loadu_si256(x + 1), t)));
}

TS_INLINE int64_t append_keys(int32_t* out, const int32_t* keys, Mask mask) {
  int64_t count = 0;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Mask m = mask >> (8 * half) & 0xffu;
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kSetBits.row[m])));
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * half));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + count), _mm256_permutevar8x32_epi32(x, order));
    count += __builtin_popcount(m);
  }
  return count;
}

TS_INLINE int64_t append_eight(int64_t* out, int64_t first, Mask mask) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kSetBits.row[mask]));
  const __m256i base = _mm256_set1_epi64x(first);
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_add_epi64(base, _mm256_cvtepu8_epi64(bits)));
  _mm256_storeu_si256(to + 1, _mm256_add_epi64(base, _mm256_cvtepu8_epi64(_mm_srli_si128(bits, 4))));
  return __builtin_popcount(mask);
}

#else

TS_INLINE Mask above(const int32_t* keys, int32_t threshold) {
  Mask mask = 0;
#if defined(__SSE2__)
  const __m128i t = _mm_set1_epi32(threshold);
  for (int i = 0; i < 4; ++i) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + 4 * i));
    mask |= static_cast<Mask>(_mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(x, t)))) << (4 * i);
  }
#else
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<Mask>(keys[i] > threshold) << i;
#endif
  return mask;
}

TS_INLINE int64_t append_keys(int32_t* out, const int32_t* keys, Mask mask) {
  int64_t count = 0;
  for (; mask; mask &= mask - 1) out[count++] = keys[__builtin_ctz(mask)];
  return count;
}

TS_INLINE int64_t append_eight(int64_t* out, int64_t first, Mask mask) {
  int64_t count = 0;
  for (; mask; mask &= mask - 1) out[count++] = first + __builtin_ctz(mask);
  return count;
}

#endif

// Appends first + lane of every lane in `mask`, never past `end`.
TS_INLINE int64_t* append_positions(int64_t* out, const int64_t* end, int64_t first, Mask mask) {
  if (end - out >= kLanes) {
    out += append_eight(out, first, mask & 0xffu);
    return out + append_eight(out, first + 8, mask >> 8);
  }
  for (; mask && out < end; mask &= mask - 1) *out++ = first + __builtin_ctz(mask);
  return out;
}

TS_ISA_END

// The portable body of core/simd.h (included there, inside the level's namespace): 4 short vectors of GCC and Clang.
// x86 without FMA emulates it exactly; aarch64 has the instruction, and the compiler turns the lane loop into fmla.

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));

struct Vec {
  Float4 x[4];
};

#define TS_EACH for (int i = 0; i < 4; ++i)

TS_INLINE Vec splat(float x) {
  const Float4 f = {x, x, x, x};
  return {{f, f, f, f}};
}
template <typename T>
TS_INLINE Vec load_n(const T* p, int64_t n) {
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) lane[i] = to_float(p[i]);
  Vec r;
  __builtin_memcpy(&r, lane, sizeof r);
  return r;
}
template <typename T>
TS_INLINE Vec load(const T* p) {
  return load_n(p, kLanes);
}
TS_INLINE Vec load(const float* p) {
  Vec r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
TS_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
TS_INLINE void store_n(float* p, Vec x, int64_t n) {
  float lane[kLanes];
  store(lane, x);
  for (int64_t i = 0; i < n && i < kLanes; ++i) p[i] = lane[i];
}
TS_INLINE Vec add(Vec a, Vec b) {
  TS_EACH a.x[i] += b.x[i];
  return a;
}
TS_INLINE Vec sub(Vec a, Vec b) {
  TS_EACH a.x[i] -= b.x[i];
  return a;
}
TS_INLINE Vec mul(Vec a, Vec b) {
  TS_EACH a.x[i] *= b.x[i];
  return a;
}
TS_INLINE Vec div(Vec a, Vec b) {
  TS_EACH a.x[i] /= b.x[i];
  return a;
}
TS_INLINE Vec sqrt(Vec a) {
#if defined(__SSE2__)
  TS_EACH a.x[i] = (Float4)_mm_sqrt_ps((__m128)a.x[i]);
#else
  TS_EACH {
    for (int j = 0; j < 4; ++j) a.x[i][j] = __builtin_sqrtf(a.x[i][j]);
  }
#endif
  return a;
}
TS_INLINE Float4 choose(Int4 m, Float4 a, Float4 b) {
  Int4 x, y;
  __builtin_memcpy(&x, &a, 16);
  __builtin_memcpy(&y, &b, 16);
  x = (m & x) | (~m & y);
  __builtin_memcpy(&a, &x, 16);
  return a;
}
TS_INLINE Vec max(Vec a, Vec b) {  // a > b ? a : b
  TS_EACH a.x[i] = choose(a.x[i] > b.x[i], a.x[i], b.x[i]);
  return a;
}
TS_INLINE Vec min(Vec a, Vec b) {  // a < b ? a : b
  TS_EACH a.x[i] = choose(a.x[i] < b.x[i], a.x[i], b.x[i]);
  return a;
}
TS_INLINE Mask lane_bits(const Int4* m) {
  Mask bits = 0;
#if defined(__SSE2__)
  TS_EACH bits |= static_cast<Mask>(_mm_movemask_ps((__m128)m[i])) << (4 * i);
#else
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<Mask>(m[i / 4][i % 4] & 1) << i;
#endif
  return bits;
}
TS_INLINE Mask greater(Vec a, Vec b) {
  Int4 m[4];
  TS_EACH m[i] = a.x[i] > b.x[i];
  return lane_bits(m);
}
TS_INLINE Mask is_nan(Vec a) {
  Int4 m[4];
  TS_EACH m[i] = a.x[i] != a.x[i];
  return lane_bits(m);
}
TS_INLINE Vec select(Mask m, Vec a, Vec b) {
  TS_EACH {
    const Int4 bit = {1 << (4 * i), 2 << (4 * i), 4 << (4 * i), 8 << (4 * i)};
    const Int4 all = {static_cast<int32_t>(m), static_cast<int32_t>(m), static_cast<int32_t>(m), static_cast<int32_t>(m)};
    a.x[i] = choose((all & bit) != 0, a.x[i], b.x[i]);
  }
  return a;
}
TS_INLINE Vec where_greater(Vec a, Vec b, Vec x, Vec y) {
  TS_EACH y.x[i] = choose(a.x[i] > b.x[i], x.x[i], y.x[i]);
  return y;
}
TS_INLINE Vec where_nan(Vec a, Vec x, Vec y) {
  TS_EACH y.x[i] = choose(a.x[i] != a.x[i], x.x[i], y.x[i]);
  return y;
}
TS_INLINE Vec shift_up(Vec x, Vec below) {
  uint32_t lane[2 * kLanes];
  __builtin_memcpy(lane, &below, sizeof below);
  __builtin_memcpy(lane + kLanes, &x, sizeof x);
  __builtin_memcpy(&x, lane + kLanes - 1, sizeof x);
  return x;
}
TS_INLINE Vec scale_by_power_of_two(Vec x, Vec biased) {
  TS_EACH {
    Uint4 a, b;
    __builtin_memcpy(&a, &x.x[i], 16);
    __builtin_memcpy(&b, &biased.x[i], 16);
    a += b << 23;
    __builtin_memcpy(&x.x[i], &a, 16);
  }
  return x;
}
TS_INLINE Vec power_of_two(Vec biased) {  // 2^n, n + 127 in the low bits of `biased`
  TS_EACH {
    Uint4 a;
    __builtin_memcpy(&a, &biased.x[i], 16);
    a <<= 23;
    __builtin_memcpy(&biased.x[i], &a, 16);
  }
  return biased;
}
TS_INLINE Mask nonzero_bytes(const uint8_t* p) {
  Mask m = 0;
  for (int i = 0; i < kLanes; ++i) m |= static_cast<Mask>(p[i] != 0) << i;
  return m;
}
TS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#if defined(__SSE2__) && !defined(__FMA__)
// The product is exact in double. The sum is rounded to odd there (2Sum knows its error), so rounding to float is the only rounding.
// Intrinsics, because GCC 12's SLP vectoriser got the same code in generic vectors wrong.
TS_INLINE __m128 fma_two(__m128 a, __m128 b, __m128 c) {
  const __m128d product = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), addend = _mm_cvtps_pd(c), none = _mm_setzero_pd();
  const __m128d sum = _mm_add_pd(product, addend), part = _mm_sub_pd(sum, product);
  const __m128d error = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, part)), _mm_sub_pd(addend, part));
  const __m128d inexact = _mm_or_pd(_mm_cmpgt_pd(error, none), _mm_cmplt_pd(error, none));  // not for NaN, which inf - inf makes
  const __m128i one = _mm_set1_epi64x(1), bits = _mm_castpd_si128(sum);
  const __m128i even = _mm_sub_epi64(_mm_and_si128(bits, one), one);  // all ones when the last bit is 0
  const __m128i toward = _mm_srli_epi64(_mm_castpd_si128(_mm_xor_pd(sum, error)), 63);
  const __m128i step = _mm_sub_epi64(one, _mm_add_epi64(toward, toward));  // +1 away from zero, -1 toward it
  const __m128i odd = _mm_add_epi64(bits, _mm_and_si128(_mm_and_si128(step, even), _mm_castpd_si128(inexact)));
  return _mm_cvtpd_ps(_mm_castsi128_pd(odd));
}
TS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  TS_EACH {
    const __m128 x = (__m128)a.x[i], y = (__m128)b.x[i], z = (__m128)c.x[i];
    const __m128 high = fma_two(_mm_movehl_ps(x, x), _mm_movehl_ps(y, y), _mm_movehl_ps(z, z));
    c.x[i] = (Float4)_mm_movelh_ps(fma_two(x, y, z), high);
  }
  return c;
}
#else
TS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  TS_EACH {
    const Float4 x = a.x[i], y = b.x[i], z = c.x[i];
    c.x[i] = Float4{__builtin_fmaf(x[0], y[0], z[0]), __builtin_fmaf(x[1], y[1], z[1]), __builtin_fmaf(x[2], y[2], z[2]),
                    __builtin_fmaf(x[3], y[3], z[3])};
  }
  return c;
}
#endif

TS_INLINE Vec reduce_rows(const Vec* x) {
  float sum[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    float lane[kLanes];
    store(lane, x[j]);
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) lane[i] = lane[i] + lane[i + step];
    }
    sum[j] = lane[0];
  }
  return load(sum);
}

TS_INLINE void transpose(Vec* x) {
  float in[kLanes][kLanes], out[kLanes][kLanes];
  __builtin_memcpy(in, x, sizeof in);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) out[j][i] = in[i][j];
  }
  __builtin_memcpy(x, out, sizeof out);
}

#undef TS_EACH

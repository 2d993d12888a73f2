// CUDA C++ under a plain C++ compiler: the names that kernels use, on the host SIMT runtime. Included by device/simt.h only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "testing/simt/runtime.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __noinline__  // libstdc++ spells an attribute so
#undef __shared__    // CUDA's headers define it to nothing, which would silently make a per-thread variable
#define __shared__ use_SIMT_SHARED_instead_of_the_CUDA_keyword

#define SIMT_NOINLINE __attribute__((noinline))
#define SIMT_SHARED(type, name, ...)                                                  \
  using name##_simt_type = type __VA_ARGS__;                                          \
  static const char name##_simt_key = 0; /* one per variable and template instance */ \
  name##_simt_type& name = *static_cast<name##_simt_type*>(                           \
      ::tokensieve::simt::host::shared_array(&name##_simt_key, sizeof(name##_simt_type), alignof(name##_simt_type), #name))
#define SIMT_DYN_SHARED(type, name) type* const name = static_cast<type*>(::tokensieve::simt::host::dynamic_shared())
#define SIMT_CARVE(type, name, offset, count) \
  type* const name = static_cast<type*>(      \
      ::tokensieve::simt::host::carve_dynamic(static_cast<size_t>(offset), static_cast<size_t>(count) * sizeof(type), #name))

constexpr int warpSize = 32;

namespace tokensieve {
namespace simt {
namespace host {

// ---- warp operations (warp_ops.cpp); values travel as their bits ---------------------------------------------------------
enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle_bits(Shuffle mode, uint32_t mask, uint64_t bits, int operand, int width, Loc place);
uint32_t vote_ballot(uint32_t mask, bool predicate, Loc place);
bool vote_all(uint32_t mask, bool predicate, Loc place);
bool vote_any(uint32_t mask, bool predicate, Loc place);
uint32_t match_any(uint32_t mask, uint64_t bits, Loc place);
uint32_t match_all(uint32_t mask, uint64_t bits, int* equal, Loc place);
enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
int64_t reduce_lanes(Reduce op, uint32_t mask, int64_t value, Loc place);
void warp_barrier(uint32_t mask, Loc place);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "warp operations take plain values of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}
template <typename T>
T shuffle(Shuffle mode, uint32_t mask, T value, int operand, int width, Loc place) {
  return from_bits<T>(shuffle_bits(mode, mask, to_bits(value), operand, width, place));
}

// ---- atomics: relaxed, as CUDA's; __threadfence makes them publish ---------------------------------------------------------
template <typename T, typename Op>
T atomic_update(T* p, Op op) {
  atomic_before(p);
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  T desired;
  do {
    desired = op(old);
  } while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  atomic_after(p);
  return old;
}

template <typename To, typename From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

#define SIMT_LOC ::tokensieve::simt::host::Loc place = {}
#define SIMT_HOST ::tokensieve::simt::host

// ---- barriers, fences ------------------------------------------------------------------------------------------------------
inline void __syncthreads(SIMT_LOC) { SIMT_HOST::block_barrier(false, place); }
inline int __syncthreads_count(int predicate, SIMT_LOC) { return SIMT_HOST::block_barrier(predicate != 0, place).count; }
inline int __syncthreads_or(int predicate, SIMT_LOC) { return SIMT_HOST::block_barrier(predicate != 0, place).count != 0; }
inline int __syncthreads_and(int predicate, SIMT_LOC) {
  const auto votes = SIMT_HOST::block_barrier(predicate != 0, place);
  return votes.count == votes.total;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_LOC) { SIMT_HOST::warp_barrier(mask, place); }
inline void __threadfence() { SIMT_HOST::memory_fence(); }
inline void __threadfence_block() { SIMT_HOST::memory_fence(); }
inline void __nanosleep(unsigned, SIMT_LOC) { SIMT_HOST::yield(place); }
[[noreturn]] inline void __trap(SIMT_LOC) { SIMT_HOST::fail("__trap", place); }

// ---- shuffles, votes, matches, reductions -----------------------------------------------------------------------------------
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_LOC) {
  return SIMT_HOST::shuffle(SIMT_HOST::Shuffle::kIndex, mask, value, source, width, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_LOC) {
  return SIMT_HOST::shuffle(SIMT_HOST::Shuffle::kUp, mask, value, static_cast<int>(delta), width, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_LOC) {
  return SIMT_HOST::shuffle(SIMT_HOST::Shuffle::kDown, mask, value, static_cast<int>(delta), width, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_LOC) {
  return SIMT_HOST::shuffle(SIMT_HOST::Shuffle::kXor, mask, value, lane_mask, width, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_LOC) { return SIMT_HOST::vote_ballot(mask, predicate != 0, place); }
inline int __any_sync(unsigned mask, int predicate, SIMT_LOC) { return SIMT_HOST::vote_any(mask, predicate != 0, place); }
inline int __all_sync(unsigned mask, int predicate, SIMT_LOC) { return SIMT_HOST::vote_all(mask, predicate != 0, place); }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_LOC) {
  return SIMT_HOST::match_any(mask, SIMT_HOST::to_bits(value), place);
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* equal, SIMT_LOC) {
  return SIMT_HOST::match_all(mask, SIMT_HOST::to_bits(value), equal, place);
}
#define SIMT_REDUCE(name, op, type)                                                               \
  inline type name(unsigned mask, type value, SIMT_LOC) {                                         \
    return static_cast<type>(SIMT_HOST::reduce_lanes(SIMT_HOST::Reduce::op, mask, value, place)); \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd, unsigned)
SIMT_REDUCE(__reduce_add_sync, kAdd, int)
SIMT_REDUCE(__reduce_min_sync, kMin, unsigned)
SIMT_REDUCE(__reduce_min_sync, kMin, int)
SIMT_REDUCE(__reduce_max_sync, kMax, unsigned)
SIMT_REDUCE(__reduce_max_sync, kMax, int)
SIMT_REDUCE(__reduce_and_sync, kAnd, unsigned)
SIMT_REDUCE(__reduce_or_sync, kOr, unsigned)
SIMT_REDUCE(__reduce_xor_sync, kXor, unsigned)
#undef SIMT_REDUCE

// ---- atomics -----------------------------------------------------------------------------------------------------------------
#define SIMT_ATOMIC(name, type, expression)                                           \
  inline type name(type* p, type value) {                                             \
    return SIMT_HOST::atomic_update(p, [&](type old) -> type { return expression; }); \
  }
#define SIMT_ATOMIC_INT(name, expression) \
  SIMT_ATOMIC(name, int, expression)      \
  SIMT_ATOMIC(name, unsigned, expression) \
  SIMT_ATOMIC(name, unsigned long long, expression)
SIMT_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))  // wraps
SIMT_ATOMIC(atomicAdd, unsigned, old + value)
SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
SIMT_ATOMIC(atomicAdd, float, old + value)
SIMT_ATOMIC(atomicAdd, double, old + value)
SIMT_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
SIMT_ATOMIC(atomicSub, unsigned, old - value)
SIMT_ATOMIC_INT(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicMin, long long, old < value ? old : value)
SIMT_ATOMIC_INT(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicMax, long long, old > value ? old : value)
SIMT_ATOMIC_INT(atomicAnd, old& value)
SIMT_ATOMIC_INT(atomicOr, old | value)
SIMT_ATOMIC_INT(atomicXor, old ^ value)
SIMT_ATOMIC_INT(atomicExch, ((void)old, value))
SIMT_ATOMIC(atomicExch, float, ((void)old, value))
SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1u)
SIMT_ATOMIC(atomicDec, unsigned, old == 0u || old > value ? value : old - 1u)
#undef SIMT_ATOMIC_INT
#undef SIMT_ATOMIC
template <typename T>
T atomicCAS(T* p, T compare, T value) {
  return SIMT_HOST::atomic_update(p, [&](T old) { return old == compare ? value : old; });
}

// ---- loads and stores with cache hints ----------------------------------------------------------------------------------------
#define SIMT_LOAD(name) \
  template <typename T> \
  T name(const T* p) {  \
    return *p;          \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcs)
#undef SIMT_LOAD
#define SIMT_STORE(name)     \
  template <typename T>      \
  void name(T* p, T value) { \
    *p = value;              \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
#undef SIMT_STORE

// ---- bits --------------------------------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xfu;
    unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7u))) & 0xffu;
    if ((pick & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }
inline int __float_as_int(float x) { return SIMT_HOST::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return SIMT_HOST::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return SIMT_HOST::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return SIMT_HOST::bit_cast<float>(x); }

// ---- arithmetic ----------------------------------------------------------------------------------------------------------------
#define SIMT_MIN_MAX(type)                                  \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }  // CUDA's: a NaN loses
inline float max(float a, float b) { return fmaxf(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

#undef SIMT_HOST
#undef SIMT_LOC

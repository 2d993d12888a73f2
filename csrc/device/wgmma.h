// Warpgroup tensor cores: the wgmma instructions of sm_90a. Elsewhere they trap, and no plan asks for them. The emulated bodies are in
// testing/simt/wgmma_emulated.h. Include device/simt.h, not this file.
//
// A warpgroup is 4 neighbouring warps, the first of them warp 4 i, which take the same steps. A product runs in the background: from its
// wgmma to the wgmma_wait that covers its group nobody touches its accumulators, its a or its tile.
#pragma once

#if !defined(__CUDACC__)
#include "testing/simt/wgmma_emulated.h"
#else

#include <type_traits>

namespace tokensieve {
namespace simt {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// Orders what the thread wrote to shared memory before what a wgmma reads; the barrier that tells the others comes after it.
__device__ __forceinline__ void fence_async_shared() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TOKENSIEVE_ROW(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define TOKENSIEVE_ACCUMULATORS                                                                                                        \
  TOKENSIEVE_ROW(0), TOKENSIEVE_ROW(1), TOKENSIEVE_ROW(2), TOKENSIEVE_ROW(3), TOKENSIEVE_ROW(4), TOKENSIEVE_ROW(5), TOKENSIEVE_ROW(6), \
      TOKENSIEVE_ROW(7)

// Before the first wgmma after the thread has used the registers of its acc or a.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the committed groups are in flight; acc is of one that is not, and may be read from here on.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(float (&acc)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : TOKENSIEVE_ACCUMULATORS : "n"(kPending) : "memory");
}

// acc[64x64] = a[64x16] . b[16x64], on top of what acc held where `more`. A warp has 16 of the 64 rows; its a, and its acc[n] of columns
// [8 n, 8 n + 8), are the fragments of mma_m16n8k16. Column n of b is elements [16 step, 16 step + 16) of row n of `tile`: 64 rows of 64
// 16-bit elements (128 bytes), 1024-byte aligned, in which 16-byte part c of row r lies at c ^ r % 8: eight rows' parts in all banks.
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&acc)[8][4], const uint32_t (&a)[4], const void* tile, int step, bool more) {
  // Matrix descriptor: address / 16, 1024 / 16 from 8 rows to the next, a swizzle of 128 bytes.
  const uint64_t b = uint64_t{1} << 62 | uint64_t{64} << 32 | uint64_t{1} << 16 |
                     ((shared_address(tile) & 0x3ffffu) / 16 + 2 * static_cast<uint32_t>(step));
#define TOKENSIEVE_WGMMA(type)                                                                                                \
  asm volatile(                                                                                                               \
      "{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %37, 0;\n\t"                                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
      "%25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, more, 1, 1, 0;\n\t}"                                    \
      : TOKENSIEVE_ACCUMULATORS                                                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more ? 1 : 0))
  if constexpr (std::is_same<T, __half>::value) {
    TOKENSIEVE_WGMMA("f16");
  } else {
    TOKENSIEVE_WGMMA("bf16");
  }
#undef TOKENSIEVE_WGMMA
}
#undef TOKENSIEVE_ACCUMULATORS
#undef TOKENSIEVE_ROW

#else
__device__ __forceinline__ void wgmma_fence() { __trap(); }
__device__ __forceinline__ void wgmma_commit() { __trap(); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait(float (&)[8][4]) {
  __trap();
}
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&)[8][4], const uint32_t (&)[4], const void*, int, bool) {
  __trap();
}
#endif

}  // namespace simt
}  // namespace tokensieve
#endif

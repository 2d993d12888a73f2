// Every instruction that has no CUDA C++ name, sm_80 and up: with wgmma.h the only inline PTX of the project. The emulated bodies are in
// testing/simt/ptx_emulated.h; testing/conformance.cu runs both against the same expectations. Include device/simt.h, not this file.
#pragma once

#if !defined(__CUDACC__)
#include "testing/simt/ptx_emulated.h"
#else

namespace tokensieve {
namespace simt {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- checks ----------------------------------------------------------------------------------------------------------------
// A contract of the kernel: ends the launch with an error where it is broken (the emulator names the place and the thread).
__device__ __forceinline__ void device_check(bool condition) {
  if (!condition) __trap();
}

// ---- asynchronous copies, global -> shared ---------------------------------------------------------------------------------
// Copies kBytes (4, 8 or 16; both addresses aligned to it); bytes from valid_bytes on become 0 and are not read.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* dst, const void* src, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const auto global = static_cast<unsigned long long>(__cvta_generic_to_global(src));
  if constexpr (kBytes == 16) {  // .cg: past L1, which streaming loads would only thrash
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(global), "r"(valid_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(dst)), "l"(global), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are in flight. Other threads' copies need a barrier after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------------
// 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8 (16-byte aligned, shared memory).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// acc[16x8] += a[16x16] . b[16x8] in float32. Fragments as in the PTX manual, g = lane / 4, t = lane % 4, two elements a register:
// a = (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8); b = (k 2t, n g) (k 2t+8, n g); acc = (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- barriers and flags ----------------------------------------------------------------------------------------------------
// Barrier `id` (1 to 15) of `threads` threads (whole warps) of the block.
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Flags between blocks: what the writer did before store_release is seen after a load_acquire that reads it.
__device__ __forceinline__ int32_t load_acquire(const int32_t* flag) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int32_t* flag, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}

// ---- thread block clusters (sm_90 and up; below, a cluster is one block, and the launch refuses a larger one) -----------------
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}
// All threads of all blocks of the cluster; shared memory written before is visible after. One is needed before the first access to a
// peer's shared memory (the peer has started) and one after the last (the peer has not ended).
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The address, in the block of that rank, of what `p` is in this block's shared memory. Loads, stores and atomics work on it.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t remote;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(remote);
#else
  (void)rank;
  return p;
#endif
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------------
// 2^x within 2 ulp (MUFU), subnormals flushed to 0; exp(x) = fast_exp2(x * log2(e)).
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace simt
}  // namespace tokensieve
#endif

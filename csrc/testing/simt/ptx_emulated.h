// The emulated bodies of device/ptx.h. Everything that touches the kernel's memory is here, in a header, so that it is compiled with
// the kernel's sanitizers and is blamed on the kernel's thread.
#pragma once

#include <cstdint>

#include "testing/simt/cuda_names.h"

namespace tokensieve {
namespace simt {
namespace host {

// volatile: GCC would turn the loops into memcpy and memset, which it expands without ThreadSanitizer's instrumentation.
template <typename Word>
void store_words(void* dst, const unsigned char* data, int bytes) {
  volatile Word* out = static_cast<Word*>(dst);
  for (int i = 0; i < bytes / static_cast<int>(sizeof(Word)); ++i)
    out[i] = from_bits<Word>(*reinterpret_cast<const Word*>(data + i * sizeof(Word)));
}
inline bool aligned_to(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0; }

void ldmatrix(uint32_t* r, const uint32_t (&row)[4], const void* address, int matrices, bool transposed, Loc place);
void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16, Loc place);

inline void load_matrix(uint32_t* r, const void* address, int matrices, bool transposed, Loc place) {
  uint32_t row[4] = {};
  if (lane_id() < 8 * matrices) {  // the other lanes' addresses are ignored
    if (!aligned_to(address, 16)) fail("ldmatrix: the row is not 16-byte aligned", place);
    if (!is_shared(address)) fail("ldmatrix: the row is not in shared memory", place);
    for (int i = 0; i < 4; ++i) row[i] = static_cast<const volatile uint32_t*>(address)[i];
  }
  ldmatrix(r, row, address, matrices, transposed, place);
}

}  // namespace host

inline void device_check(bool condition, host::Loc place = {}) {
  if (!condition) host::fail("device_check failed", place);
}

template <int kBytes>
void cp_async(void* dst, const void* src, int valid_bytes = kBytes, host::Loc place = {}) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if (valid_bytes < 0 || valid_bytes > kBytes) host::fail("cp_async: valid_bytes is outside [0, size]", place);
  if (!host::aligned_to(dst, kBytes) || !host::aligned_to(src, kBytes))
    host::fail("cp_async: an address is not aligned to the size", place);
  host::PendingCopy copy = {dst, {}, kBytes, &host::store_words<uint32_t>};
  for (int i = 0; i < valid_bytes; ++i) copy.data[i] = static_cast<const volatile unsigned char*>(src)[i];
  host::copy_issue(copy, place);
  for (int i = 0; i < kBytes / 4; ++i) static_cast<volatile uint32_t*>(dst)[i] = 0xffffffffu;  // garbage until the wait
}
inline void cp_async_commit() { host::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  host::copy_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, host::Loc place = {}) { host::load_matrix(r, row, 4, false, place); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, host::Loc place = {}) { host::load_matrix(r, row, 4, true, place); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, host::Loc place = {}) { host::load_matrix(r, row, 2, false, place); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, host::Loc place = {}) { host::load_matrix(r, row, 2, true, place); }

template <typename T>
void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Loc place = {}) {
  static_assert(std::is_same<T, __half>::value || std::is_same<T, __nv_bfloat16>::value, "mma takes __half or __nv_bfloat16");
  host::mma(acc, a, b, std::is_same<T, __nv_bfloat16>::value, place);
}

inline void named_barrier(int id, int threads, host::Loc place = {}) { host::group_barrier(id, threads, place); }

inline int32_t load_acquire(const int32_t* flag) {
  host::atomic_before(const_cast<int32_t*>(flag));
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}
inline void store_release(int32_t* flag, int32_t value) {
  host::atomic_before(flag);
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

inline int cluster_rank() { return host::cluster_position(); }
inline int cluster_size() { return host::cluster_extent(); }
inline void cluster_sync(host::Loc place = {}) { host::cluster_barrier(place); }
template <typename T>
T* cluster_map(T* p, int rank, host::Loc place = {}) {
  return static_cast<T*>(host::cluster_address(p, rank, place));
}

inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;  // NaN stays
}

}  // namespace simt
}  // namespace tokensieve

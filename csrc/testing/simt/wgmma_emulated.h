// The emulated bodies of device/wgmma.h. Reads of shared memory are here, compiled with the kernel's sanitizers; they happen twice, when a
// product is asked for and when it is waited for, because the hardware may read at any time between.
#pragma once

#include "testing/simt/ptx_emulated.h"

namespace tokensieve {
namespace simt {
namespace host {

constexpr int kTileWords = 16;  // of a product, a lane reads 16 elements of rows 2 lane and 2 lane + 1
struct Product {
  const void* tile;
  int step;
  int group;
  uint32_t words[kTileWords];
};

void fence_async_shared();
void wgmma_fence();
void wgmma_commit();
void wgmma_issue(float* acc, const uint32_t (&a)[4], const Product& product, bool more, bool bfloat16, Loc place);
const Product* wgmma_next(int pending_groups);                      // the oldest one that a wait for all but so many groups covers, or null
void wgmma_finish(const uint32_t (&words)[kTileWords], Loc place);  // it, whose tile reads so by now
void wgmma_deliver(const float* acc, int pending_groups, Loc place);

inline void read_tile(uint32_t (&words)[kTileWords], const void* tile, int step) {
  for (int i = 0; i < kTileWords; ++i) {
    const int row = 2 * lane_id() + i / 8, part = (2 * step + i % 8 / 4) ^ (row % 8);
    words[i] = static_cast<const volatile uint32_t*>(tile)[row * 32 + part * 4 + i % 4];
  }
}

}  // namespace host

constexpr bool kHasWgmma = true;

inline void fence_async_shared() { host::fence_async_shared(); }
inline void wgmma_fence() { host::wgmma_fence(); }
inline void wgmma_commit() { host::wgmma_commit(); }

template <int kPending>
void wgmma_wait(float (&acc)[8][4], host::Loc place = {}) {
  while (const host::Product* product = host::wgmma_next(kPending)) {
    uint32_t words[host::kTileWords];
    host::read_tile(words, product->tile, product->step);
    host::wgmma_finish(words, place);
  }
  host::wgmma_deliver(&acc[0][0], kPending, place);
}

template <typename T>
void wgmma_m64n64k16(float (&acc)[8][4], const uint32_t (&a)[4], const void* tile, int step, bool more, host::Loc place = {}) {
  static_assert(std::is_same<T, __half>::value || std::is_same<T, __nv_bfloat16>::value, "wgmma takes __half or __nv_bfloat16");
  if (!host::aligned_to(tile, 1024)) host::fail("wgmma: the tile is not 1024-byte aligned", place);
  if (!host::is_shared(tile)) host::fail("wgmma: the tile is not in shared memory", place);
  if (step < 0 || step > 3) host::fail("wgmma: the step is outside [0, 3]", place);
  host::Product product = {tile, step, 0, {}};
  host::read_tile(product.words, tile, step);
  host::wgmma_issue(&acc[0][0], a, product, more, std::is_same<T, __nv_bfloat16>::value, place);
}

}  // namespace simt
}  // namespace tokensieve

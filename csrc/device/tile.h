// tile<W>: W neighbouring lanes of a warp (W a power of two up to 32), with the few operations that kernels need, on __shfl_*_sync.
// All lanes of the tile must arrive; different tiles of a warp may be in different branches. Include device/simt.h, not this file.
#pragma once

namespace tokensieve {
namespace simt {

template <int W>
struct tile {
  static_assert(W >= 1 && W <= 32 && (W & (W - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 lanes");
  static constexpr int kSize = W;

  // Position in the tile, and the mask of the tile's lanes. Blocks are one-dimensional or have whole warps along x.
  __device__ static int rank() { return static_cast<int>(threadIdx.x) % W; }
  __device__ static unsigned mask() {
    if constexpr (W == 32) {
      return 0xffffffffu;
    } else {
      return ((1u << W) - 1u) << (threadIdx.x % 32u / W * W);
    }
  }

#if defined(__CUDACC__)
#define SIMT_PLACE
#define SIMT_PLACE_ONLY
#define SIMT_PASS
#else  // carries the caller's line into the emulator's reports
#define SIMT_PLACE , host::Loc place = {}
#define SIMT_PLACE_ONLY host::Loc place = {}
#define SIMT_PASS , place
#endif
  __device__ static void sync(SIMT_PLACE_ONLY) { __syncwarp(mask() SIMT_PASS); }
  template <typename T>
  __device__ static T shfl(T value, int source SIMT_PLACE) {
    return __shfl_sync(mask(), value, source, W SIMT_PASS);
  }
  template <typename T>
  __device__ static T shfl_up(T value, int delta SIMT_PLACE) {
    return __shfl_up_sync(mask(), value, static_cast<unsigned>(delta), W SIMT_PASS);
  }
  template <typename T>
  __device__ static T shfl_down(T value, int delta SIMT_PLACE) {
    return __shfl_down_sync(mask(), value, static_cast<unsigned>(delta), W SIMT_PASS);
  }
  template <typename T>
  __device__ static T shfl_xor(T value, int lane_mask SIMT_PLACE) {
    return __shfl_xor_sync(mask(), value, lane_mask, W SIMT_PASS);
  }
  // Bit i = lane i of the tile.
  __device__ static unsigned ballot(bool predicate SIMT_PLACE) {
    return (__ballot_sync(mask(), predicate SIMT_PASS) & mask()) >> (threadIdx.x % 32u / W * W);
  }
  __device__ static bool any(bool predicate SIMT_PLACE) { return __any_sync(mask(), predicate SIMT_PASS) != 0; }
  __device__ static bool all(bool predicate SIMT_PLACE) { return __all_sync(mask(), predicate SIMT_PASS) != 0; }

  // Butterfly: every lane gets the same bits, because op(a, b) == op(b, a) for +, min and max.
  template <typename T, typename Op>
  __device__ static T reduce(T value, Op op SIMT_PLACE) {
#pragma unroll
    for (int step = W / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(mask(), value, step, W SIMT_PASS));
    return value;
  }
  template <typename T>
  __device__ static T sum(T value SIMT_PLACE) {
    return reduce(value, [](T a, T b) { return a + b; } SIMT_PASS);
  }
  template <typename T>
  __device__ static T max(T value SIMT_PLACE) {
    return reduce(value, [](T a, T b) { return a > b ? a : b; } SIMT_PASS);
  }
  template <typename T>
  __device__ static T min(T value SIMT_PLACE) {
    return reduce(value, [](T a, T b) { return a < b ? a : b; } SIMT_PASS);
  }
  // Lane i gets value_0 + ... + value_i.
  template <typename T>
  __device__ static T inclusive_sum(T value SIMT_PLACE) {
#pragma unroll
    for (int step = 1; step < W; step *= 2) {
      const T below = __shfl_up_sync(mask(), value, static_cast<unsigned>(step), W SIMT_PASS);
      if (rank() >= step) value += below;
    }
    return value;
  }
#undef SIMT_PLACE
#undef SIMT_PLACE_ONLY
#undef SIMT_PASS
};

using warp = tile<32>;

}  // namespace simt
}  // namespace tokensieve

// Copies a slice of output tokens for all tensors: what gather, scatter_rows and topk_gather share. See gather_kernel.cuh.
#pragma once

#include "device/simt.h"
#include "select/gather_args.h"

namespace tokensieve {
namespace select {

// `count` output tokens from `slot0` on of batch row b; source[i] = token to copy, or -1 for zeros.
template <typename V>
__device__ __forceinline__ void copy_tokens_as(const CopyTensor& t, int64_t b, int slots, int slot0, int count, const int* source) {
  constexpr int kUnroll = 4;
  const int lane = static_cast<int>(threadIdx.x) & (t.lanes - 1), group = static_cast<int>(threadIdx.x) / t.lanes;
  const int groups = static_cast<int>(blockDim.x) / t.lanes;
  if (group >= groups) return;  // threads beyond the last whole group
  const int units = t.segments * t.units;
  const V* const src = reinterpret_cast<const V*>(t.src + b * t.src_b);
  for (int i = group; i < count; i += groups) {
    const int token = source[i];
    V* const dst = reinterpret_cast<V*>(t.dst + (b * slots + slot0 + i) * t.dst_row);
    const char* const row = reinterpret_cast<const char*>(src) + (token < 0 ? 0 : token) * t.src_n;
    for (int u0 = lane; u0 < units; u0 += kUnroll * t.lanes) {
      V value[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int u = u0 + j * t.lanes;
        if (u >= units || token < 0) {
          value[j] = V{};
        } else if (t.segments == 1) {
          value[j] = reinterpret_cast<const V*>(row)[u];
        } else {
          value[j] = reinterpret_cast<const V*>(row + u / t.units * t.src_m)[u % t.units];
        }
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (u0 + j * t.lanes < units) dst[u0 + j * t.lanes] = value[j];
      }
    }
  }
}

__device__ inline void copy_tokens(const CopyArgs& a, int64_t b, int slot0, int count, const int* source) {
  for (int i = 0; i < a.num_tensors; ++i) {
    const CopyTensor& t = a.tensors[i];
    switch (t.vector) {
      case 16:
        copy_tokens_as<uint4>(t, b, a.slots, slot0, count, source);
        break;
      case 8:
        copy_tokens_as<uint2>(t, b, a.slots, slot0, count, source);
        break;
      case 4:
        copy_tokens_as<uint32_t>(t, b, a.slots, slot0, count, source);
        break;
      case 2:
        copy_tokens_as<uint16_t>(t, b, a.slots, slot0, count, source);
        break;
      default:
        copy_tokens_as<uint8_t>(t, b, a.slots, slot0, count, source);
        break;
    }
  }
}

struct Slice {
  int64_t b;
  int slice, begin, count;
};
__device__ __forceinline__ Slice this_slice(const CopyArgs& a) {
  Slice s;
  s.b = blockIdx.x / static_cast<unsigned>(a.blocks_per_row);
  s.slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.blocks_per_row));
  const int64_t begin = static_cast<int64_t>(s.slice) * a.slots_per_block, left = a.slots - begin;
  s.begin = static_cast<int>(begin < a.slots ? begin : a.slots);
  s.count = static_cast<int>(left <= 0 ? 0 : left < a.slots_per_block ? left : a.slots_per_block);
  return s;
}

}  // namespace select
}  // namespace tokensieve

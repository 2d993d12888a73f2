// select_topk + gather_tokens in one launch, without a barrier between blocks.
//
// In, out: those of topk_kernel.cuh and gather_kernel.cuh; gather.index is topk.index.
// Algorithm: every block repeats the selection of its row (the scores come from L2 after the first block; estimate: 2 us) and copies its
//   slice of the output tokens of all tensors. The list never leaves the block: a slot of the slice goes to shared memory, the first block of a row
//   also writes the index. A grid-wide hand-over would cost 1 to 2 us itself, and blocks that wait for each other may hang.
// Work: that of both, plus B x slices x N e of L2 reads (four times that for rows above 52k). Floor on H200: 2944 -> 704 x 4096 bf16,
//   11.5 MB, 2.4 us at 4.8 TB/s plus the selection; the plan makes no more blocks than run at once.
// Launch: grid.x = B x slices, the threads of the selection. Deterministic, tie rule, limits: as topk and gather; order = position only.
#pragma once

#include "select/gather_copy.cuh"
#include "select/topk_kernel.cuh"

namespace tokensieve {
namespace select {

template <typename T, int kItems, Hold kHold>
__global__ void __launch_bounds__(1024, 1) topk_gather_kernel(const TopkParams p, const CopyArgs a, const int held_bytes) {
  TS_TOPK_SHARED(shared);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  int* source = reinterpret_cast<int*>(dynamic + held_bytes);
  const Slice s = this_slice(a);
  const Row<T, kItems, kHold> row(p, static_cast<int>(s.b), dynamic);
  Cut cut;
  const int taken = find_cut<T>(row, shared, cut);
  const int64_t length = p.prefix + p.K + p.suffix;
  const bool writes_index = s.slice == 0;
  int64_t* index = p.index + s.b * length;
  const auto place = [&](int64_t slot, int64_t position) {
    const int64_t at = slot - s.begin;
    if (at >= 0 && at < s.count) source[at] = position < a.N ? static_cast<int>(position) : -1;
    if (writes_index) index[slot] = position;
  };
  emit_selected(row, shared, cut, [&](int slot, int token, uint32_t, bool) { place(p.prefix + slot, p.offset + token); });
  for (int64_t i = threadIdx.x; i < length - taken; i += blockDim.x) {
    const int64_t slot = i < p.prefix ? i : i + taken;
    place(slot, edge_position(p, slot, taken));
  }
  __syncthreads();
  copy_tokens(a, s.b, s.begin, s.count, source);
}

}  // namespace select
}  // namespace tokensieve

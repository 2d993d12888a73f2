// merge_tokens, merge_by_label, fuse_dropped, sum_pairs: token rows reduced by output row.
//
// In: up to 8 tensors [B, N, M, W bytes] strided, inverse int64 [B, N] (output row of a token, -1 = none), or the kept tokens [B, K] of
//   which row 0 is the complement; own int64 [B, R]; weights and size float32 [B, N]; from int64 [B, N] (token of an entry).
// Out: [B, R, M, W] contiguous per tensor; total and its log, float32 [B, R].
// Algorithm: a block owns a slice of the output rows of one batch row. It lists their tokens in shared memory (integer counts, offsets, and
//   a rank sort of each list, so that the order is unique), then groups of lanes write the rows of all tensors: a copy where a row has one
//   token, else a float32 sum in the list's order. Few long rows: a block owns 128 bytes of columns of one row, 32 groups of lanes each sum
//   an equal run of its list, and the partial sums are added in order.
// Work: B N C multiply-adds; bytes B (N + R) C and 8 N of inverse a block (L2). Floor on H200: 64 x 196 x 3584 bf16 to 98 rows = 135 MB,
//   31 us. Bound by HBM; a single 577-token image by the launch and the lists (about 4 us).
// Launch: grid.x = B x slices (x columns), 256 threads, 12 bytes a row and 4 a token of shared memory. Deterministic: integer atomics count
//   only, lists are sorted, no float atomics. amax: NaN wins. Rows of up to 32 tokens sum in the CPU kernel's order.
// Limits: N and R below 2^30, a token below 2^31 bytes; lists of more than 32768 tokens live in the workspace.
#pragma once

#include "merge/merge_lists.cuh"
#include "merge/merge_values.cuh"

namespace tokensieve {
namespace merge {

__device__ __forceinline__ bool copies(const MergeArgs& a) {
  return a.mode == MergeMode::kWeighted || (a.weights == nullptr && a.epsilon == 0.0f);
}

__device__ __forceinline__ float weight_of(const MergeArgs& a, int64_t b, int n) {
  return a.weights != nullptr ? a.weights[b * a.N + n] : 1.0f;
}

// One output row of one tensor by `lanes` lanes of a group.
template <bool kMax, typename T, int kCount>
__device__ __forceinline__ void write_row(const MergeArgs& a, const MergeArg& t, const Lists& l, int i, int lane) {
  using V = Pack<T, kCount>;
  const int first = l.start[i], length = l.start[i + 1] - first, units = t.segments * t.units;
  char* const row = t.dst + (l.b * a.R + l.begin + i) * t.row;
  if (length == 1 && copies(a)) {
    const int n = source_of(a, l.b, l.list[first]);
    for (int u = lane; u < units; u += t.lanes) reinterpret_cast<V*>(row)[u] = unit_of<V>(t, l.b, n, u);
    return;
  }
  float scale = 1.0f;
  if constexpr (!kMax && std::is_same_v<Sum<T>, float>) {
    if (a.mode == MergeMode::kMlerp && length > 0) scale = norms_of<T, kCount>(t, l.b, l.list + first, length, lane).scale();
  }
  const bool divide = a.mode != MergeMode::kSum && !kMax && length > 0;
  const Divisor divisor = sum_of_weights(l.divisor[i]);
  for (int u = lane; u < units; u += t.lanes) {
    Sums<T, kCount> sums = {};
#pragma unroll 2
    for (int k = 0; k < length; ++k) {
      const int n = l.list[first + k];
      accumulate<kMax>(sums, unit_of<V>(t, l.b, source_of(a, l.b, n), u), weight_of(a, l.b, n), k == 0);
    }
    if (divide) finish(sums, divisor, scale);
    put<T, kCount>(row, u, sums);
  }
}

// The shared arrays of a block, its batch row and its slice of the output rows.
#define TOKENSIEVE_MERGE_BLOCK(a, block_index, slice)                                               \
  const MergeShared at = merge_shared(a);                                                           \
  SIMT_CARVE(int, shared_start, 0, a.rows_per_block + 1);                                           \
  SIMT_CARVE(int, shared_cursor, at.cursor * 4, a.rows_per_block);                                  \
  SIMT_CARVE(float, shared_divisor, at.divisor * 4, a.rows_per_block);                              \
  SIMT_CARVE(unsigned, shared_kept, at.kept * 4, a.complement ? (a.N + 31) / 32 : 0);               \
  SIMT_CARVE(int, shared_list, at.list * 4, a.lists == nullptr ? a.N : 0);                          \
  Lists lists;                                                                                      \
  lists.b = (block_index) / a.blocks_per_row;                                                       \
  lists.begin = static_cast<int>((slice) < a.R ? (slice) : a.R);                                    \
  lists.count = a.R - lists.begin < a.rows_per_block ? a.R - lists.begin : a.rows_per_block;        \
  lists.start = shared_start, lists.divisor = shared_divisor, lists.kept = shared_kept;             \
  lists.list = a.lists != nullptr ? a.lists + static_cast<int64_t>(blockIdx.x) * a.N : shared_list; \
  mark_kept(a, lists.b, shared_kept)

template <bool kMax>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArgs a) {
  TOKENSIEVE_MERGE_BLOCK(a, blockIdx.x, static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(a.blocks_per_row)) * a.rows_per_block);
  build_lists(a, lists, shared_cursor, true);
  for (int k = 0; k < a.num_tensors; ++k) {
    const MergeArg& t = a.tensors[k];
    const int lane = static_cast<int>(threadIdx.x) & (t.lanes - 1), group = static_cast<int>(threadIdx.x) / t.lanes;
    with_type<true>(t, [&](auto tag) {
      using Tag = decltype(tag);
      for (int i = group; i < lists.count; i += kThreads / t.lanes) {
        write_row<kMax, typename Tag::Type, Tag::kElements>(a, t, lists, i, lane);
      }
    });
  }
}

// ---- few long rows --------------------------------------------------------------------------------------------------------

constexpr int kLongGroups = kThreads / kLongLanes;

template <bool kMax, typename T, int kCount>
__device__ __forceinline__ void write_columns(const MergeArgs& a, const MergeArg& t, const Lists& l, int column, unsigned char* partial) {
  using V = Pack<T, kCount>;
  const int lane = static_cast<int>(threadIdx.x) % kLongLanes, group = static_cast<int>(threadIdx.x) / kLongLanes;
  const int length = l.start[1], units = t.segments * t.units, run = (length + kLongGroups - 1) / kLongGroups;
  const int begin = group * run, end = begin + run < length ? begin + run : length;
  Sums<T, kCount>* const sums_of = reinterpret_cast<Sums<T, kCount>*>(partial);
  char* const row = t.dst + (l.b * a.R + l.begin) * t.row;
  for (int base = column * kLongLanes; base < units; base += a.column_blocks * kLongLanes) {
    const int u = base + lane;
    Sums<T, kCount> sums = {};
    if (u < units) {
#pragma unroll 4
      for (int k = begin; k < end; ++k) {
        const int n = l.list[k];
        accumulate<kMax>(sums, unit_of<V>(t, l.b, source_of(a, l.b, n), u), weight_of(a, l.b, n), k == begin);
      }
      sums_of[threadIdx.x] = sums;
    }
    __syncthreads();
    if (group == 0 && u < units) {
      for (int g = 1; g * run < length; ++g) combine<kMax>(sums, sums_of[g * kLongLanes + lane]);
      const bool single = length == 1 && copies(a);
      if (a.mode != MergeMode::kSum && !kMax && length > 0 && !single) finish(sums, sum_of_weights(l.divisor[0]), 1.0f);
      if (single) {
        reinterpret_cast<V*>(row)[u] = unit_of<V>(t, l.b, source_of(a, l.b, l.list[0]), u);
      } else {
        put<T, kCount>(row, u, sums);
      }
    }
    __syncthreads();
  }
}

constexpr int kPartialBytes = 32;  // of a thread: the float sums of 8 halves

template <bool kMax>
__global__ void __launch_bounds__(kThreads) merge_long_kernel(const MergeArgs a) {
  SIMT_SHARED(uint4, partial, [kThreads * kPartialBytes / 16]);
  const int64_t index = blockIdx.x / static_cast<unsigned>(a.column_blocks);
  const int column = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.column_blocks));
  TOKENSIEVE_MERGE_BLOCK(a, index, index % a.blocks_per_row);
  build_lists(a, lists, shared_cursor, column == 0);
  for (int k = 0; k < a.num_tensors; ++k) {
    const MergeArg& t = a.tensors[k];
    with_type<true>(t, [&](auto tag) {
      using Tag = decltype(tag);
      write_columns<kMax, typename Tag::Type, Tag::kElements>(a, t, lists, column, reinterpret_cast<unsigned char*>(partial));
    });
  }
}

}  // namespace merge
}  // namespace tokensieve

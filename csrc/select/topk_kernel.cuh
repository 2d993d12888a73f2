// select_topk: the k best tokens of a row, exact, ties to the lowest index, ascending positions by construction.
//
// In: scores [B, N] float32/float16/bfloat16, optional bool masks [B, N], k per row [B]. Out: index int64 [B, prefix + K + suffix].
// Algorithm: radix select (AIR Top-K, doi 10.1145/3581784.3607062, one block a row): histograms of 11 + 11 + 10 bits of core/order.h's
//   ordered bits narrow [lower, upper] until the ties inside are the ones to cut or all are taken. Then one block scan over (above, equal)
//   counts, in token order, gives every selected token its place: no atomics decide anything but histogram counts, which are integers.
//   16-bit scores need only the first 22 bits. order = score sorts 64-bit keys (rank, ordered bits, complement of the index) afterwards.
// Work: bytes = B N e read once (4 or 16 scores a thread stay in registers up to N = 16384, in shared memory up to 52k; longer rows are
//   read again by every pass, from L2) + 8 B K. Floor on H200: 8 x 2944 x 4 = 94 KB, 20 ns of HBM: launch- and barrier-bound (about 12
//   barriers, estimated 2 us). Fuse, do not tune.
// Launch: grid.x = B; threads to cover N, 64 to 1024. Shared 8.4 KB (+ the keys of order = score, a power of two of 8 bytes, up to 16384;
//   beyond, in the workspace). All-equal rows put every token into one bin: counts of neighbours are added before the atomic.
// Deterministic: the answer is unique. NaN ranks below -inf, -0 equals +0.
// Limits: N < 2^31; a row is one block's work: at 64k an estimated 12 us (256 KB four times at 0.1 TB/s an SM), where 8 SMs would need 3.
#pragma once

#include "core/order.h"
#include "device/simt.h"
#include "select/topk_args.h"

namespace tokensieve {
namespace select {

constexpr int kBins = 2048;

struct TopkShared {
  int* histogram;       // [kBins]
  uint32_t* warp_sums;  // [32]
  int* found;           // [4]: bin, left to take in it, tokens in it; eligible and always counts before that
};

#define TS_TOPK_SHARED(name)                                         \
  SIMT_SHARED(int, name##_histogram, [::tokensieve::select::kBins]); \
  SIMT_SHARED(uint32_t, name##_warp_sums, [32]);                     \
  SIMT_SHARED(int, name##_found, [4]);                               \
  const ::tokensieve::select::TopkShared name = {name##_histogram, name##_warp_sums, name##_found}

__device__ __forceinline__ uint32_t score_order(float x) { return ordered_bits(__float_as_uint(x)); }
__device__ __forceinline__ uint32_t score_order(__half x) { return score_order(__half2float(x)); }
__device__ __forceinline__ uint32_t score_order(__nv_bfloat16 x) { return score_order(__bfloat162float(x)); }

// kItems neighbouring tokens of a thread.
template <int kItems>
struct Items {
  uint32_t order[kItems];
  uint32_t candidate = 0, always = 0;  // bit i: token i; a token that is always kept is in `always` only
};

template <typename T>
struct alignas(sizeof(T) * 4) Quad {
  T value[4];
};

template <typename T, int kItems>
__device__ __forceinline__ void load_orders(const TopkParams& p, int b, int first, Items<kItems>& items) {
  const T* row = static_cast<const T*>(p.scores) + b * p.score_stride;
  const int N = static_cast<int>(p.N);
  const bool wide = first + kItems <= N && reinterpret_cast<uintptr_t>(row + first) % (sizeof(T) * 4) == 0;
#pragma unroll
  for (int i = 0; i < kItems; i += 4) {
    Quad<T> quad;
    if (wide) {
      quad = *reinterpret_cast<const Quad<T>*>(row + first + i);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) quad.value[j] = first + i + j < N ? row[first + i + j] : T(0.0f);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) items.order[i + j] = score_order(quad.value[j]);
  }
}

template <int kItems>
__device__ __forceinline__ void load_classes(const TopkParams& p, int b, int first, Items<kItems>& items) {
  const int left = static_cast<int>(p.N) - first;
  items.candidate = left >= kItems ? (1u << kItems) - 1u : left > 0 ? (1u << left) - 1u : 0u;
  if (p.candidates == nullptr && p.always_keep == nullptr) return;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i >= left) continue;
    const bool always = p.always_keep != nullptr && p.always_keep[b * p.always_keep_stride + first + i] != 0;
    const bool candidate = p.candidates == nullptr || p.candidates[b * p.candidates_stride + first + i] != 0;
    if (always || !candidate) items.candidate &= ~(1u << i);
    if (always) items.always |= 1u << i;
  }
}

// Exclusive sum over the block's threads in order, and the total. Ends with a barrier, so it can be called again at once.
__device__ inline uint32_t block_exclusive_sum(uint32_t value, uint32_t* warp_sums, uint32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const uint32_t inclusive = simt::warp::inclusive_sum(value);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const uint32_t sums = simt::warp::inclusive_sum(lane < warps ? warp_sums[lane] : 0u);
  const uint32_t before = warp == 0 ? 0u : simt::warp::shfl(sums, warp - 1);
  total = simt::warp::shfl(sums, 31);
  __syncthreads();
  return before + inclusive - value;
}

// What the row selects: tokens of the class (always, or candidate) with order in (upper, ..) and the first `ties` ones in [lower, upper];
// with take_always, the always tokens besides.
struct Cut {
  uint32_t lower = 0, upper = 0xffffffffu;
  int ties = 0;
  bool always_class = false, take_always = false;
};

// Adds this thread's tokens to the histogram of bits [shift, shift + 11). Neighbours of one bin are added together.
template <int kItems>
__device__ __forceinline__ void count_items(const Items<kItems>& items, const Cut& cut, int shift, uint32_t mask, int* histogram) {
  const uint32_t members = cut.always_class ? items.always : items.candidate;
  int bin = -1, count = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t order = items.order[i];
    if ((members >> i & 1u) == 0 || order < cut.lower || order > cut.upper) continue;
    const int mine = static_cast<int>(order >> shift & mask);
    if (mine != bin) {
      if (count > 0) atomicAdd(&histogram[bin], count);
      bin = mine;
      count = 0;
    }
    ++count;
  }
  if (count > 0) atomicAdd(&histogram[bin], count);
}

// The bin, from the top, in which the running count reaches `need` (1 <= need <= all counts): found = {bin, left to take in it, its count}.
__device__ inline void find_bin(const TopkShared& s, int need) {
  const int each = (kBins + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = kBins - 1 - static_cast<int>(threadIdx.x) * each;
  uint32_t sum = 0, total;
  for (int i = 0; i < each && first - i >= 0; ++i) sum += static_cast<uint32_t>(s.histogram[first - i]);
  int above = static_cast<int>(block_exclusive_sum(sum, s.warp_sums, total));
  if (above >= need || above + static_cast<int>(sum) < need) return;
  int bin = first;
  while (above + s.histogram[bin] < need) above += s.histogram[bin--];
  s.found[0] = bin;
  s.found[1] = need - above;
  s.found[2] = s.histogram[bin];
}

// Tiles of the row: one that stays in registers, or many whose order words wait in shared memory or are read again. A thread only ever uses
// what it loaded itself, so none of this needs a barrier.
template <typename T, int kItems, Hold kHold>
struct Row {
  const TopkParams& p;
  const int b, tiles;
  uint4* const held;  // kShared: [tiles][threads]
  Items<kItems> resident;

  __device__ Row(const TopkParams& params, int row, void* shared)
      : p(params),
        b(row),
        tiles(kHold == Hold::kRegisters ? 1 : static_cast<int>((params.N + tile_tokens() - 1) / tile_tokens())),
        held(static_cast<uint4*>(shared)) {
    if constexpr (kHold == Hold::kRegisters) resident = read(0);
    if constexpr (kHold == Hold::kShared) {
      for (int tile = 0; tile < tiles; ++tile) {
        Items<kItems> items;
        load_orders<T>(p, b, first(tile), items);
        held[tile * blockDim.x + threadIdx.x] = make_uint4(items.order[0], items.order[1], items.order[2], items.order[3]);
      }
    }
  }
  __device__ static int64_t tile_tokens() { return static_cast<int64_t>(blockDim.x) * kItems; }
  __device__ int first(int tile) const {  // a thread of the last tile may start past N, which is below 2^31
    const int64_t at = tile * tile_tokens() + static_cast<int64_t>(threadIdx.x) * kItems;
    return static_cast<int>(at < p.N ? at : p.N);
  }
  __device__ Items<kItems> read(int tile) const {
    Items<kItems> items;
    load_orders<T>(p, b, first(tile), items);
    load_classes(p, b, first(tile), items);
    return items;
  }
  __device__ Items<kItems> load(int tile) const {
    if constexpr (kHold == Hold::kRegisters) return resident;
    if constexpr (kHold == Hold::kNowhere) return read(tile);
    const uint4 order = held[tile * blockDim.x + threadIdx.x];
    Items<kItems> items = {{order.x, order.y, order.z, order.w}};
    load_classes(p, b, first(tile), items);
    return items;
  }
};

// Counts of eligible tokens: {candidates, always}.
template <typename R>
__device__ inline void count_classes(const R& row, const TopkShared& s) {
  if (threadIdx.x < 2) s.found[threadIdx.x] = 0;
  __syncthreads();
  int candidates = 0, always = 0;
  for (int tile = 0; tile < row.tiles; ++tile) {
    const auto items = row.load(tile);
    candidates += __popc(items.candidate);
    always += __popc(items.always);
  }
  candidates = simt::warp::sum(candidates);
  always = simt::warp::sum(always);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&s.found[0], candidates);
    atomicAdd(&s.found[1], always);
  }
  __syncthreads();
}

// Finds the cut of row b; returns how many tokens it selects. All threads; ends with a barrier.
template <typename T, typename R>
__device__ inline int find_cut(const R& row, const TopkShared& s, Cut& cut) {
  const TopkParams& p = row.p;
  int members = static_cast<int>(p.N), always = 0;
  if (p.candidates != nullptr || p.always_keep != nullptr) {
    count_classes(row, s);
    members = s.found[0];
    always = s.found[1];  // find_bin writes there two barriers later
  }
  int64_t k = p.k_rows != nullptr ? p.k_rows[row.b] : p.K;
  k = k < 0 ? 0 : k > p.K ? p.K : k;
  const int taken = static_cast<int>(k < members + static_cast<int64_t>(always) ? k : members + static_cast<int64_t>(always));
  cut.always_class = taken <= always && always > 0;
  cut.take_always = !cut.always_class;
  if (cut.always_class) members = always;
  int need = taken - (cut.take_always ? always : 0);
  constexpr int kPasses = sizeof(T) == 4 ? 3 : 2;  // a 16-bit float has no bits below 2^10 of its float32
  for (int pass = 0; pass < kPasses && need > 0 && need < members; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) s.histogram[i] = 0;
    __syncthreads();
    for (int tile = 0; tile < row.tiles; ++tile) count_items(row.load(tile), cut, shift, pass == 2 ? 1023u : 2047u, s.histogram);
    __syncthreads();
    find_bin(s, need);
    __syncthreads();
    cut.lower |= static_cast<uint32_t>(s.found[0]) << shift;
    cut.upper = cut.lower + ((1u << shift) - 1u);
    need = s.found[1];
    members = s.found[2];
  }
  cut.ties = need;
  return taken;
}

// Calls emit(slot, token, order, always) for every selected token: slots ascend with the token. All threads.
template <typename R, typename Emit>
__device__ inline void emit_selected(const R& row, const TopkShared& s, const Cut& cut, Emit&& emit) {
  int base = 0, base_ties = 0;  // of the tiles before: tokens above the cut, tokens at the cut
  for (int tile = 0; tile < row.tiles; ++tile) {
    const auto items = row.load(tile);
    constexpr int kItems = sizeof(items.order) / sizeof(uint32_t);
    const uint32_t members = cut.always_class ? items.always : items.candidate;
    uint32_t above = cut.take_always ? items.always : 0u, ties = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((members >> i & 1u) == 0 || items.order[i] < cut.lower) continue;
      (items.order[i] > cut.upper ? above : ties) |= 1u << i;
    }
    uint32_t total;  // 16 bits each: a tile has at most 16384 tokens
    const uint32_t packed = static_cast<uint32_t>(__popc(above)) | static_cast<uint32_t>(__popc(ties)) << 16;
    const uint32_t before = block_exclusive_sum(packed, s.warp_sums, total);
    int slot = base + static_cast<int>(before & 0xffffu), tie = base_ties + static_cast<int>(before >> 16);
    const int first = row.first(tile);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_above = (above >> i & 1u) != 0, is_tie = (ties >> i & 1u) != 0;
      if (is_above || (is_tie && tie < cut.ties)) {
        emit(slot + (tie < cut.ties ? tie : cut.ties), first + i, items.order[i], (items.always >> i & 1u) != 0);
      }
      slot += is_above ? 1 : 0;
      tie += is_tie ? 1 : 0;
    }
    base += static_cast<int>(total & 0xffffu);
    base_ties += static_cast<int>(total >> 16);
  }
}

// Everything but the selection: position of output slot `slot`, or -1, when `taken` tokens were selected.
__device__ __forceinline__ int64_t edge_position(const TopkParams& p, int64_t slot, int64_t taken) {
  if (slot < p.prefix) return p.offset - p.prefix + slot;
  const int64_t after = slot - p.prefix - taken;
  return after < p.suffix ? p.offset + p.N + after : -1;
}

// ---- order = score -------------------------------------------------------------------------------------------------------------
// always (1 bit) | ordered bits (32) | complement of the token (31)
__device__ __forceinline__ uint64_t rank_key(bool always, uint32_t order, int token) {
  return static_cast<uint64_t>(always) << 63 | static_cast<uint64_t>(order) << 31 | (0x7fffffffu - static_cast<uint32_t>(token));
}
__device__ __forceinline__ int64_t token_of(uint64_t key) { return static_cast<int64_t>(0x7fffffffu - (key & 0x7fffffffu)); }

// Bitonic sort, largest first, of `size` (a power of two) keys in shared or global memory.
__device__ inline void sort_descending(uint64_t* keys, int size) {
  for (int block = 2; block <= size; block *= 2) {
    for (int step = block / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += static_cast<int>(blockDim.x)) {
        const int low = i / step * (2 * step) + i % step, high = low + step;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & block) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

template <typename T, int kItems, Hold kHold>
__global__ void __launch_bounds__(1024, 1)
    topk_kernel(const TopkParams p, const int held_bytes, const int sort_size, const int sort_shared) {
  TS_TOPK_SHARED(shared);
  SIMT_DYN_SHARED(unsigned char, dynamic);
  const int b = static_cast<int>(blockIdx.x);
  const Row<T, kItems, kHold> row(p, b, dynamic);
  Cut cut;
  const int taken = find_cut<T>(row, shared, cut);
  const int64_t length = p.prefix + p.K + p.suffix;
  int64_t* out = p.index + b * length;
  if (p.order == TopkOrder::kPosition) {
    emit_selected(row, shared, cut, [&](int slot, int token, uint32_t, bool) { out[p.prefix + slot] = p.offset + token; });
  } else {
    uint64_t* keys = sort_shared != 0 ? reinterpret_cast<uint64_t*>(dynamic + held_bytes)
                                      : static_cast<uint64_t*>(p.workspace) + static_cast<int64_t>(b) * sort_size;
    for (int i = taken + static_cast<int>(threadIdx.x); i < sort_size; i += static_cast<int>(blockDim.x)) keys[i] = 0;
    emit_selected(row, shared, cut, [&](int slot, int token, uint32_t order, bool always) { keys[slot] = rank_key(always, order, token); });
    sort_descending(keys, sort_size);
    for (int i = static_cast<int>(threadIdx.x); i < taken; i += static_cast<int>(blockDim.x)) out[i] = p.offset + token_of(keys[i]);
  }
  for (int64_t i = threadIdx.x; i < length - taken; i += blockDim.x) {
    const int64_t slot = i < p.prefix ? i : i + taken;
    out[slot] = edge_position(p, slot, taken);
  }
}

}  // namespace select
}  // namespace tokensieve

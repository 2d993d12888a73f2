// attention_scores of all query rows: column sums of softmax(Q K^T) without the map, in two sweeps.
//
// In, out: as score_kernel.cuh, for query_reduction mean, sum, max and visible mean; any head_reduction, activation, bias, positions.
// Algorithm: row_kernel (colsum_rows.cuh) leaves (maximum, 1 / sum) of every query row; with a given lse, or logits that nobody wants the
//   lse of, it is not run. column_kernel computes S^T = K Q^T again with the keys on the M side: a block owns 256 keys (128 where D > 128,
//   64 in float32) of one key head in registers, streams the query rows of that head's group in tiles of 64 through two cp.async buffers,
//   and adds factor * 2^(scale * s - maximum) to two accumulators per 16 keys that never leave their thread: no shuffles in the loop, one
//   quad exchange at the end. factor = row weight * head weight / sum comes with the maximum in one 16-byte load per two rows. Sums over
//   rows and heads are one sum, over the heads of the group in registers and over key heads and splits in `partial`, which the last block
//   of a key tile adds in order. Maxima, visible means and kept heads go through `partial` head by head.
//   Causal: row tiles start at the diagonal, splits take every col_splits-th tile (equal work), masks are evaluated only in the tiles that a
//   warp's keys cross; the bounds of 32 rows, kept beside them, decide that, so query_positions take the same road.
// Work: E = B H L N elements (half of it causal). One sweep: 2 D E flops on the tensor cores and E exponentials on the MUFU pipe.
//   Floor on H200 (790 TF/s, 3.7e12 exp/s), with a given lse, mma / exp: LLaVA-NeXT 2944 x 32 x 128 causal 45 / 38 us; Qwen 16k 28/4 x 128
//   causal 1218 / 1017; CLIP 577 x 16 x 64 b64 55 / 92; without lse twice that. Bound by both pipes at D = 128, by exponentials at D <= 80.
//   ESTIMATE, nothing was measured: mma.sync reaches about 0.6 of the wgmma rate, so about 75 us (NeXT) and 2.0 ms (Qwen) a sweep;
//   colsum_wgmma_columns.cuh is this sweep at that rate, behind the plan.
// Code (nvcc 13.0, sm_90a, SASS): the unmasked loop body for 64 keys x 32 rows of a warp at D = 128 is 349 instructions: 128 HMMA, 128 FFMA,
//   64 MUFU, 20 LDS, 9 others; at D = 64 277: 64, 128, 64, 12, 9. Two chunks are unrolled, so that one's exponentials can hide behind the
//   other's HMMA. 255 registers at D = 128, 219 at D = 64, no spills on sm_80 and sm_90a: two blocks of 4 warps an SM.
// Deterministic: every sum has a fixed order (rows in a thread, quad, splits, heads); no atomics but the arrival counters.
// Error: float32 dot products and sums, ex2.approx (2 ulp): scores within 2e-5 relative of float64 (tests/kernels).
// Not finite: a NaN logit makes its row NaN for all keys that the row sees; others keep what they are.
// Limits: D <= 256; N, H / Hkv * L below 2^31. Workspace: 8 B H L bytes, 4 col_splits B R planes (Hkv linear, H otherwise, 2 H visible mean).
#pragma once

#include "score/colsum_finish.cuh"
#include "score/colsum_rows.cuh"

namespace tokensieve {
namespace colsum {

// What the second sweep knows about the 64 query rows of a streamed tile, for every buffer.
struct RowTable {
  float4* facts;  // [buffers][kCols / 2]: (maximum, factor) of two rows: value = factor * 2^(x - maximum)
  float* weight;  // [buffers][kCols], what a visible mean divides by
  int* end;       // [buffers][kCols]: keys [0, end) are visible
  int* bounds;    // [buffers][kCols / 32][2]: least and greatest end of 32 rows
};

struct RowFacts {
  float maximum, factor, weight;
  int end;
};

__device__ inline RowFacts row_facts(const Args& a, int b, int h, int64_t l) {
  const ScoreParams& p = a.p;
  RowFacts r = {0.0f, 0.0f, 0.0f, row_end(p, b, l)};
  if (l >= p.L) return r;
  const int64_t row = (static_cast<int64_t>(b) * p.H + h) * p.L + l;
  r.weight = a.factor * (a.weights == nullptr ? 1.0f : a.weights[b * a.weight_stride[0] + h * a.weight_stride[1] + l]);
  r.factor = p.query_reduction == Reduction::kMax ? 1.0f : r.weight;
  if (!a.per_head) {
    const float head = score::head_weight(p, b, h);
    if (head == 0.0f) r.end = 0;  // counts for nothing, even NaN
    r.factor *= head;
  }
  if (p.activation != Activation::kSoftmax) return r;
  if (p.lse_in != nullptr) {
    r.maximum = p.lse_in[row] * kLog2E;
  } else {
    r.maximum = a.stats[2 * row];
    r.factor *= a.stats[2 * row + 1];
  }
  if (r.maximum == -infinity()) {  // the row is 0; a visible mean counts it where a given lse says so
    r.maximum = infinity();
    if (p.query_reduction != Reduction::kVisibleMean) r.end = 0;
  }
  return r;
}

// The threads below `cols` write their row; every warp of them the bounds of its 32.
__device__ __forceinline__ void store_facts(const RowTable& table, int buffer, int cols, const RowFacts& r, bool general) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= cols) return;
  reinterpret_cast<float2*>(table.facts)[buffer * kCols + i] = make_float2(r.maximum, r.factor);
  table.end[buffer * kCols + i] = r.end;
  if (general) table.weight[buffer * kCols + i] = r.weight;
  const int least = simt::warp::min(r.end), most = simt::warp::max(r.end);
  if (i % 32 == 0) table.bounds[buffer * (kCols / 16) + i / 16] = least, table.bounds[buffer * (kCols / 16) + i / 16 + 1] = most;
}

// Lean: sum += factor * 2^(dot * scale - maximum).
template <bool kMasked, int kTiles, int kNTiles>
__device__ __forceinline__ void add_lean(const float (&acc)[kTiles][kNTiles][4], const float4* facts, const int* end, int key, float scale,
                                         float (&sum)[kTiles][2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const float4 f = facts[4 * n + t];
    const int end0 = kMasked ? end[8 * n + 2 * t] : 0, end1 = kMasked ? end[8 * n + 2 * t + 1] : 0;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = key + 16 * m + 8 * i;
        const float e0 = simt::fast_exp2(fmaf(acc[m][n][2 * i], scale, -f.x)),
                    e1 = simt::fast_exp2(fmaf(acc[m][n][2 * i + 1], scale, -f.z));
        if (!kMasked || k < end0) sum[m][i] = fmaf(f.y, e0, sum[m][i]);
        if (!kMasked || k < end1) sum[m][i] = fmaf(f.w, e1, sum[m][i]);
      }
    }
  }
}

// Both halves of an unrolled pair of chunks are independent: the exponentials of one hide behind the tensor-core steps of the other.
template <bool kMasked, typename Core>
__device__ __forceinline__ void lean_tile(const Core& core, const unsigned char* shared, const unsigned char* tile, const float4* facts,
                                          const int* ends, int buffer, int key, int D, float scale, float (&sum)[Core::kTiles][2]) {
#pragma unroll(kMasked || Core::kTiles < 4 ? 1 : 2)
  for (int chunk = 0; chunk < Core::cols(D); chunk += Core::kChunk) {
    float acc[Core::kTiles][Core::kNTiles][4];
    core.dots(acc, shared, tile + chunk * Core::row_bytes(D), D);
    const int row = buffer * kCols + chunk;
    add_lean<kMasked>(acc, facts + row / 2, ends + row, key, scale, sum);
  }
}

// Everything else: bias, logits and sigmoids, maxima, counts. One element at a time.
__device__ inline void add_general(const Args& a, int b, int h, int64_t l, int64_t key, float dot, float maximum, float factor,
                                   float weight, float& sum, float& seen) {
  const ScoreParams& p = a.p;
  const float unit = p.activation == Activation::kSoftmax ? kLog2E : 1.0f;  // as the first sweep computed it, bit for bit
  float x = dot * (p.scale * unit);
  if (p.bias != nullptr) x = fmaf(load_bias(p, bias_offset(p, b, h, l, key)), unit, x);
  if (x == -infinity()) return;
  const float value = p.activation == Activation::kSoftmax ? simt::fast_exp2(x - maximum) : score::activate(p, x);
  if (p.query_reduction == Reduction::kMax) {
    sum = nan_max(sum, factor * value);
  } else {
    sum = fmaf(factor, value, sum);
  }
  seen += weight;
}

// The rows of a chunk, from entry `first` of the row table on (row `l` of head h), added to this thread's keys element by element.
template <int kTiles, int kNTiles>
__device__ __forceinline__ void add_general_chunk(const Args& a, const RowTable& table, int b, int h, int64_t l, int first, int warp_key,
                                                  const float (&acc)[kTiles][kNTiles][4], float (&sum)[kTiles][2],
                                                  float (&seen)[kTiles][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * n + 2 * t + i % 2, key = warp_key + 16 * m + g + 8 * (i / 2);
        if (key >= table.end[first + row]) continue;
        const float2 f = reinterpret_cast<const float2*>(table.facts)[first + row];
        add_general(a, b, h, l + row, key, acc[m][n][i], f.x, f.y, table.weight[first + row], sum[m][i / 2], seen[m][i / 2]);
      }
    }
  }
}

// A given lse is also an output: the key tiles share the copy.
__device__ __forceinline__ void copy_lse(const Args& a, int b, int kv_head, int group, int tile) {
  const ScoreParams& p = a.p;
  const int64_t from = (static_cast<int64_t>(b) * p.H + kv_head * group) * p.L, threads = blockDim.x;
  for (int64_t i = tile * threads + static_cast<int>(threadIdx.x); i < group * p.L; i += a.key_tiles * threads) {
    p.lse_out[from + i] = p.lse_in[from + i];
  }
}

// Tiles of query rows [first, tiles), every col_splits-th of them: under a causal mask all splits then have the same work.
struct RowTiles {
  int first, count;  // count: of a head

  __device__ __forceinline__ RowTiles(const Args& a, int64_t tile_key, int cols, int split) {
    const ScoreParams& p = a.p;
    const int tiles = static_cast<int>((p.L + cols - 1) / cols);
    const int64_t first_row = p.causal && p.query_positions == nullptr ? tile_key - (p.N - p.L) : 0;
    first = (first_row <= 0 ? 0 : static_cast<int>(first_row / cols)) + split;
    count = tiles <= first ? 0 : (tiles - first + a.col_splits - 1) / a.col_splits;
  }
};

// What a block computes: a share (`split`) of the query rows for a tile of keys. Early keys are seen by most rows: they start first.
struct ColumnBlock {
  int tile, split, kv_head, b;

  __device__ __forceinline__ explicit ColumnBlock(const Args& a) {
    const unsigned units = static_cast<unsigned>(a.p.B * a.p.Hkv) * static_cast<unsigned>(a.col_splits);
    const int rest = static_cast<int>(blockIdx.x % units);
    tile = static_cast<int>(blockIdx.x / units), split = rest % a.col_splits;
    kv_head = rest / a.col_splits % static_cast<int>(a.p.Hkv), b = rest / a.col_splits / static_cast<int>(a.p.Hkv);
  }
};

// The last block of a tile of kKeys keys adds the partial results, in order. `parts` is [warps].
template <int kKeys>
__device__ __forceinline__ void finish_tile(const Args& a, int b, int tile, float* parts, int* is_last) {
  const ScoreParams& p = a.p;
  if (!arrive_last(p.semaphores + static_cast<int64_t>(tile) * p.B + b, static_cast<int>(p.Hkv) * a.col_splits, is_last)) return;
  const float rows = row_divisor(p, b, parts), heads = score::head_divisor(p, b);
  const int64_t first = static_cast<int64_t>(tile) * kKeys;
  const int count = clamp_to(p.range_end - p.range_begin - first, kKeys);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) finish_key(a, b, first + i, rows, heads);
}

template <typename T, int kSteps, bool kLean>
__global__ void __launch_bounds__(kThreads, 2) column_kernel(const Args a) {
  using Core = Core<T, kSteps>;
  constexpr int kRows = stationary_rows(kSteps), kTiles = Core::kTiles;
  SIMT_SHARED(float4, facts, [kCols]);
  SIMT_SHARED(float, weights, [2 * kCols]);
  SIMT_SHARED(int, ends, [2 * kCols]);
  SIMT_SHARED(int, bounds, [2 * kCols / 16]);
  SIMT_SHARED(float, parts, [kWarps]);
  SIMT_SHARED(int, is_last);
  const ScoreParams& p = a.p;
  const RowTable table = {facts, weights, ends, bounds};
  const int D = static_cast<int>(p.D), cols = Core::cols(D), group = static_cast<int>(p.H / p.Hkv);
  const int stationary_bytes = Core::stationary_bytes(D), buffer_bytes = cols * Core::row_bytes(D);
  SIMT_CARVE(unsigned char, stationary, 0, stationary_bytes);
  SIMT_CARVE(unsigned char, even, stationary_bytes, buffer_bytes);
  SIMT_CARVE(unsigned char, odd, stationary_bytes + buffer_bytes, buffer_bytes);
  const ColumnBlock block(a);
  const int tile = block.tile, split = block.split, kv_head = block.kv_head, b = block.b;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t R = p.range_end - p.range_begin, tile_key = p.range_begin + static_cast<int64_t>(tile) * kRows;
  const int count = clamp_to(p.range_end - tile_key, kRows);
  const int warp_key = static_cast<int>(tile_key) + warp * kTiles * 16, warp_keys = clamp_to(p.range_end - warp_key, kTiles * 16);

  Core core;
  core.load(static_cast<const T*>(p.key) + b * p.key_stride[0] + kv_head * p.key_stride[1] + tile_key * p.key_stride[2], p.key_stride[2],
            count, D, a.wide_loads, 0, stationary);
  const float scale = p.scale * kLog2E;

  const RowTiles rows_of(a, tile_key, cols, split);
  const int first = rows_of.first, per_head = rows_of.count, items = group * per_head;

  float sum[kTiles][2], seen[kTiles][2];
  const float start = p.query_reduction == Reduction::kMax ? -infinity() : 0.0f;
  const auto reset = [&] {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) sum[m][0] = sum[m][1] = start, seen[m][0] = seen[m][1] = 0.0f;
  };
  // The quads' results to `partial`: of a head, or of all heads of the group.
  const auto write = [&](int64_t unit, int64_t plane) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = 16 * m + 8 * i + g;
        const float value = p.query_reduction == Reduction::kMax ? quad_max(sum[m][i]) : quad_sum(sum[m][i]);
        const float visible = kLean ? 0.0f : quad_sum(seen[m][i]);
        const int64_t at = unit * R + (warp_key - p.range_begin) + k;
        const bool mine = t == 0 && k < warp_keys;
        if (mine) a.partial[at] = value;
        if (mine && !kLean && p.query_reduction == Reduction::kVisibleMean) a.partial[plane + at] = visible;
      }
    }
  };
  const auto write_head = [&](int h) { write((static_cast<int64_t>(split) * p.B + b) * p.H + h, a.col_splits * p.B * p.H * R); };
  const auto prefetch = [&](int item) {
    const int h = kv_head * group + item / per_head, l = (first + item % per_head * a.col_splits) * cols;
    const T* query = static_cast<const T*>(p.query) + b * p.query_stride[0] + h * p.query_stride[1];
    stream_tile<T, kSteps>(item % 2 == 0 ? even : odd, query, p.query_stride[2], l, static_cast<int>(p.L), D, a.wide_loads);
    return static_cast<int>(threadIdx.x) < cols ? row_facts(a, b, h, l + static_cast<int>(threadIdx.x)) : RowFacts{};
  };

  reset();
  if (items > 0) store_facts(table, 0, cols, prefetch(0), !kLean);
#pragma unroll 1
  for (int item = 0; item < items; ++item) {
    simt::cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the other buffer any more
    RowFacts next = {};
    if (item + 1 < items) next = prefetch(item + 1);
    const int buffer = item % 2, h = kv_head * group + item / per_head;
    [[maybe_unused]] const int l0 = (first + item % per_head * a.col_splits) * cols;
    const int* range = bounds + buffer * (kCols / 16);
    const int least = cols > 32 ? min(range[0], range[2]) : range[0], most = cols > 32 ? max(range[1], range[3]) : range[1];
    if (warp_keys > 0 && warp_key < most) {
      const unsigned char* at = buffer == 0 ? even : odd;
      if constexpr (!kLean) {
#pragma unroll 1
        for (int chunk = 0; chunk < cols; chunk += Core::kChunk) {
          float acc[kTiles][Core::kNTiles][4];
          core.dots(acc, stationary, at + chunk * Core::row_bytes(D), D);
          add_general_chunk(a, table, b, h, l0 + chunk, buffer * kCols + chunk, warp_key, acc, sum, seen);
        }
      } else if (warp_key + warp_keys > least) {
        lean_tile<true>(core, stationary, at, facts, ends, buffer, warp_key + g, D, scale, sum);
      } else {
        lean_tile<false>(core, stationary, at, facts, ends, buffer, warp_key + g, D, scale, sum);
      }
    }
    if (a.per_head && (item + 1) % per_head == 0) {
      write_head(h);
      reset();
    }
    if (item + 1 < items) store_facts(table, 1 - buffer, cols, next, !kLean);
  }
  if (!a.per_head) write(static_cast<int64_t>(kv_head * a.col_splits + split) * p.B + b, 0);
  if (a.per_head && per_head == 0) {
    for (int i = 0; i < group; ++i) write_head(kv_head * group + i);
  }
  if (a.with_lse && split == 0) copy_lse(a, b, kv_head, group, tile);
  finish_tile<kRows>(a, b, tile, parts, &is_last);
}

template <typename T, int kSteps>
Status launch_columns(const Args& a, int64_t smem_bytes, void* stream) {
  const int64_t blocks = a.p.B * a.p.Hkv * a.key_tiles * a.col_splits;
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  const auto kernel = is_lean(a.p) ? column_kernel<T, kSteps, true> : column_kernel<T, kSteps, false>;
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), static_cast<size_t>(smem_bytes), stream, a);
}

}  // namespace colsum
}  // namespace tokensieve

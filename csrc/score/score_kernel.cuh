// attention_scores for few query rows, fused: Q K^T, mask, softmax statistics, reduction over rows and heads, without the map.
//
// In: query [B, H, L, D], key [B, Hkv, N, D] float32/float16/bfloat16, any strides; bias, positions, weights of score.h.
// Out: scores float32 [B, H or 1, L or 1, R], lse float32 [B, H, L].
// Algorithm: a block owns a chunk of the keys of one key head and keeps the logits of all rows of its group (up to 64 a pass) in shared
//   memory. kWhole: the chunks of a head are one cluster (or one block); maxima and sums are exchanged through distributed shared memory,
//   then every block scales and reduces its own logits. kStats + kApply: chunks are unrelated blocks; the first launch leaves (maximum,
//   sum) of every chunk, the second computes its logits again and applies them (also the only launch where the caller gives the
//   normaliser). Reading K twice moves 2 x 256 bytes a key (D = 128); storing the logits of 64 rows, to be merged by a last block, would
//   move 512 and leave that merge, megabytes of it, to one SM.
//   Heads of other key heads: partial scores go to the workspace and the last of the Hkv blocks of a chunk adds them in head order.
// Work: bytes = B Hkv N D e + B H L D e + 4 B R; flops = 2 B H L N D. Floor on H200 at 4.8 TB/s: 32 heads x 2944 keys x 128 bf16 = 24.1 MB,
//   5.0 us; below about 6 MB launch-bound (2-3 us). 64 rows a key of 256 bytes are 64 FLOP a byte: bound by HBM up to there.
// Launch: grid.x = chunks x Hkv x B (cluster = chunks in kWhole); two blocks of 256 threads an SM, or one of up to 512 where the logits
//   need the room. One exp a logit (94k at the shape above, 0.03 us of the MUFU), so expf (2 ulp) rather than ex2.approx.
// Deterministic: every sum has a fixed order (lanes, warps, chunks, rows, heads); no atomics but the arrival counters of the last block.
// Error: float32 dot products and sums; scores within 2e-5 relative of float64 (tests/kernels).
// Limits: D <= 2048; N and H / Hkv * L below 2^31. More than 64 rows of a group: passes, K again from L2. Workspace: B Hkv R floats;
//   Hkv x the output where rows are kept and heads reduced; kSplit adds 8 B H L chunks bytes.
#pragma once

#include "score/score_device.cuh"
#include "score/score_dots.cuh"

namespace tokensieve {
namespace score {

// What a pass knows about its rows, the same for all keys.
struct Shared {
  float (*partial)[kMaxRows];  // [warps][rows]
  float* maximum;              // of this chunk, then of the row
  float* coefficient;          // score = logits entry x coefficient
  float* lse;                  // the row's normaliser
  float* weight;
  int* end;       // keys [0, end) are visible
  int64_t* bias;  // offset of bias[b, h, l, 0]
  float* own;     // [rows][2] (maximum, sum), read by the other blocks of the cluster
};

struct Block {
  int b, kv_head, chunk;
  int group, L, rows;  // query heads of the key head; rows = group x L
  int64_t first_key;   // of the chunk
  int keys;            // of the chunk
  bool rows_by_head;   // row = g * L + l (rows are reduced first), else l * group + g
};

__device__ __forceinline__ Block this_block(const Args& a) {
  Block block;
  const int64_t unit = blockIdx.x / static_cast<unsigned>(a.num_chunks);
  block.chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.num_chunks));
  block.b = static_cast<int>(unit / a.p.Hkv);
  block.kv_head = static_cast<int>(unit % a.p.Hkv);
  block.group = static_cast<int>(a.p.H / a.p.Hkv);
  block.L = static_cast<int>(a.p.L);
  block.rows = block.group * block.L;
  block.first_key = a.scan_begin + static_cast<int64_t>(block.chunk) * a.chunk_keys;
  const int64_t left = a.scan_end - block.first_key;
  block.keys = left <= 0 ? 0 : left < a.chunk_keys ? static_cast<int>(left) : a.chunk_keys;
  block.rows_by_head = a.p.query_reduction != Reduction::kNone;
  return block;
}

__device__ __forceinline__ void split_row(const Block& block, int row, int& g, int& l) {
  g = block.rows_by_head ? row / block.L : row % block.group;
  l = block.rows_by_head ? row % block.L : row / block.group;
}

// The rows' normalisers from the chunks of the first sweep: a warp takes a row, its lanes the chunks, in a fixed order.
__device__ inline void merge_statistics(const Args& a, const Block& block, const Shared& s, int row0, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < count; i += warps) {
    const int64_t row = (static_cast<int64_t>(block.b) * a.p.Hkv + block.kv_head) * block.rows + row0 + i;
    const float* chunk = a.stats + row * a.stats_chunks * 2;
    float maximum = -infinity(), sum = 0;
    for (int c = lane; c < a.stats_chunks; c += 32) maximum = chunk[2 * c] > maximum ? chunk[2 * c] : maximum;
    maximum = simt::warp::max(maximum);
    for (int c = lane; c < a.stats_chunks; c += 32) {
      sum += chunk[2 * c] == -infinity() ? chunk[2 * c + 1] : chunk[2 * c + 1] * expf(chunk[2 * c] - maximum);
    }
    sum = simt::warp::sum(sum);
    if (lane == 0) s.lse[i] = sum == 0 ? -infinity() : maximum + logf(sum);
  }
}

__device__ __forceinline__ int64_t row_of_lse(const Args& a, const Block& block, int row) {
  int g, l;
  split_row(block, row, g, l);
  return (static_cast<int64_t>(block.b) * a.p.H + static_cast<int64_t>(block.kv_head) * block.group + g) * a.p.L + l;
}

// Row facts to shared memory, one thread a row.
__device__ inline void load_rows(const Args& a, const Block& block, const Shared& s, int row0, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  int g, l;
  split_row(block, row0 + i, g, l);
  const int64_t h = static_cast<int64_t>(block.kv_head) * block.group + g, bl = static_cast<int64_t>(block.b) * a.p.L + l;
  s.end[i] = row_end(a.p, block.b, l);
  s.weight[i] = a.p.row_weights != nullptr ? a.p.row_weights[bl] : 1.0f;
  s.bias[i] = bias_offset(a.p, block.b, h, l, 0);
  s.coefficient[i] = 1.0f;
  if (a.mode == Mode::kApply && a.p.lse_in != nullptr) s.lse[i] = a.p.lse_in[row_of_lse(a, block, row0 + i)];
}

// Query rows of a pass to shared memory, zeros for what pads rows to whole tiles and D to whole steps.
template <typename T>
__device__ __forceinline__ void load_queries(const Args& a, const Block& block, int row0, int count, unsigned char* out, int row_bytes) {
  constexpr int kElements = 16 / sizeof(T);
  const int D = static_cast<int>(a.p.D), parts = static_cast<int>(padded_dim(D, sizeof(T))) / kElements;
  for (int i = static_cast<int>(threadIdx.x); i < a.padded_rows * parts; i += static_cast<int>(blockDim.x)) {
    const int row = i / parts, d = i % parts * kElements;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < count) {
      int g, l;
      split_row(block, row0 + row, g, l);
      const T* q = static_cast<const T*>(a.p.query) + block.b * a.p.query_stride[0] +
                   (static_cast<int64_t>(block.kv_head) * block.group + g) * a.p.query_stride[1] + l * a.p.query_stride[2];
      value = load_row_part(q, d, D, a.wide_loads);
    }
    *reinterpret_cast<uint4*>(out + row * row_bytes + d * static_cast<int>(sizeof(T))) = value;
  }
}

// Dot products -> logits, -inf where not visible, which stays so to the end. kApply goes on to the scores; the others leave the maxima of
// the warps in s.partial.
__device__ inline void finish_logits(const Args& a, const Block& block, const Shared& s, float* logits, int stride, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool softmax = a.p.activation == Activation::kSoftmax;
  for (int r = 0; r < count; ++r) {
    float* row = logits + r * stride;
    float maximum = -infinity();
    for (int i = static_cast<int>(threadIdx.x); i < block.keys; i += static_cast<int>(blockDim.x)) {
      const int64_t n = block.first_key + i;
      float value = -infinity();
      if (n < s.end[r]) {
        value = row[i] * a.p.scale;
        if (a.p.bias != nullptr) value += load_bias(a.p, s.bias[r] + n * a.p.bias_stride[3]);
      }
      if (a.mode == Mode::kApply && value != -infinity()) {
        value = !softmax ? activate(a.p, value) : s.lse[r] == -infinity() ? 0.0f : expf(value - s.lse[r]);
      }
      row[i] = value;
      maximum = value > maximum ? value : maximum;
    }
    if (a.mode == Mode::kApply) continue;
    maximum = simt::warp::max(maximum);
    if (lane == 0) s.partial[warp][r] = maximum;
  }
}

// Logits -> exp(logit - maximum of the chunk), or their activation; the sums of the former, of the warps, to s.partial.
__device__ inline void exponentiate(const Args& a, const Block& block, const Shared& s, float* logits, int stride, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool softmax = a.p.activation == Activation::kSoftmax;
  for (int r = 0; r < count; ++r) {
    float* row = logits + r * stride;
    float sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < block.keys; i += static_cast<int>(blockDim.x)) {
      const float logit = row[i];
      if (logit == -infinity()) continue;
      const float value = expf(logit - s.maximum[r]);
      row[i] = softmax ? value : activate(a.p, logit);
      sum += value;
    }
    sum = simt::warp::sum(sum);
    if (lane == 0) s.partial[warp][r] = sum;
  }
}

// (maximum, sum) of every row over this chunk, to s.own. All threads; ends without a barrier.
__device__ inline void chunk_statistics(const Args& a, const Block& block, const Shared& s, float* logits, int stride, int count) {
  const int i = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  if (i < count) {
    float maximum = s.partial[0][i];
    for (int w = 1; w < warps; ++w) maximum = s.partial[w][i] > maximum ? s.partial[w][i] : maximum;
    s.maximum[i] = maximum;
  }
  __syncthreads();
  exponentiate(a, block, s, logits, stride, count);
  __syncthreads();
  if (i < count) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += s.partial[w][i];
    s.own[2 * i] = s.maximum[i];
    s.own[2 * i + 1] = sum;
  }
}

// kWhole: the row's statistics over all blocks of the cluster, in rank order, become this block's coefficient.
__device__ inline void exchange(const Args& a, const Shared& s, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (a.num_chunks > 1) simt::cluster_sync();
  if (i < count) {
    float maximum = -infinity(), sum = 0;
    for (int c = 0; c < a.num_chunks; ++c) {
      const float m = a.num_chunks > 1 ? simt::cluster_map(s.own, c)[2 * i] : s.own[2 * i];
      maximum = m > maximum ? m : maximum;
    }
    for (int c = 0; c < a.num_chunks; ++c) {
      const float* other = a.num_chunks > 1 ? simt::cluster_map(s.own, c) : s.own;
      sum += other[2 * i] == -infinity() ? other[2 * i + 1] : other[2 * i + 1] * expf(other[2 * i] - maximum);
    }
    const float mine = s.maximum[i] == -infinity() ? 1.0f : expf(s.maximum[i] - maximum);
    s.coefficient[i] = a.p.activation != Activation::kSoftmax ? 1.0f : sum == 0 ? 0.0f : mine / sum;
    s.lse[i] = sum == 0 ? -infinity() : maximum + logf(sum);
  }
  if (a.num_chunks > 1) {
    simt::cluster_sync();  // nobody overwrites or leaves before all have read
  } else {
    __syncthreads();
  }
}

__device__ inline void write_statistics(const Args& a, const Block& block, const Shared& s, int row0, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  const int64_t row = (static_cast<int64_t>(block.b) * a.p.Hkv + block.kv_head) * block.rows + row0 + i;
  float* out = a.stats + (row * a.num_chunks + block.chunk) * 2;
  out[0] = s.own[2 * i];
  out[1] = s.own[2 * i + 1];
}

// The first block of a head writes its rows' normalisers. After the barrier that follows their computation.
__device__ __forceinline__ void write_lse(const Args& a, const Block& block, const Shared& s, int row0, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count && block.chunk == 0 && a.p.lse_out != nullptr) a.p.lse_out[row_of_lse(a, block, row0 + i)] = s.lse[i];
}

// Divisor of query_reduction mean, the same for all heads. Threads of one warp; every lane returns it.
__device__ inline float row_divisor(const Args& a, int b) {
  if (a.p.row_weights == nullptr && a.p.query_positions == nullptr) return static_cast<float>(a.p.L);
  float sum = 0;
  for (int64_t l = threadIdx.x % 32; l < a.p.L; l += 32) {
    const int64_t at = static_cast<int64_t>(b) * a.p.L + l;
    sum += a.p.row_weights != nullptr ? a.p.row_weights[at] : a.p.query_positions[at] >= 0 ? 1.0f : 0.0f;
  }
  return simt::warp::sum(sum);
}

// What the reductions divide by, the same for all keys.
struct Divisors {
  float rows, heads;
};

// What is unfinished between two passes.
struct Carry {
  float rows = 0, heads = 0, seen = 0;
};

// Where the scores of this key head's group go once its heads are reduced.
__device__ __forceinline__ void emit_group(const Args& a, const Block& block, int64_t l, int64_t out_rows, int64_t x, float value,
                                           float divisor) {
  const int64_t R = a.p.range_end - a.p.range_begin;
  if (a.p.Hkv > 1) {
    a.partial[((static_cast<int64_t>(block.b) * a.p.Hkv + block.kv_head) * out_rows + l) * R + x] = value;
  } else {
    emit(a.p, (block.b * out_rows + l) * R + x, divide_or_zero(value, divisor));
  }
}

// The rows' reduction of one head and key, complete.
__device__ __forceinline__ float finish_rows(Reduction rows, const Carry& carry, float divisor) {
  if (rows == Reduction::kMax) return carry.rows == -infinity() ? 0.0f : carry.rows;
  if (rows == Reduction::kVisibleMean) return divide_or_zero(carry.rows, carry.seen);
  return rows == Reduction::kMean ? divide_or_zero(carry.rows, divisor) : carry.rows;
}

// One key: this pass's rows, in order. `inner` runs over what is reduced first (rows, or heads where rows are kept), `outer` over the rest.
__device__ inline void reduce_key(const Args& a, const Block& block, const Shared& s, const float* column, int stride, int row0, int count,
                                  const Divisors& divisors, int64_t x, Carry& carry) {
  const Reduction rows = a.p.query_reduction, heads = a.p.head_reduction;
  const int64_t R = a.p.range_end - a.p.range_begin;
  const int inner_size = block.rows_by_head ? block.L : block.group;
  const int64_t first_head = static_cast<int64_t>(block.kv_head) * block.group;
  int inner = row0 % inner_size, outer = row0 / inner_size;
  for (int r = 0; r < count; ++r) {
    const bool visible = column[r * stride] != -infinity(), last = inner + 1 == inner_size;
    const float value = (visible ? column[r * stride] : 0.0f) * s.coefficient[r];  // 0 x NaN: a NaN row is NaN everywhere
    if (!block.rows_by_head) {
      if (heads == Reduction::kNone) {
        emit(a.p, ((block.b * a.p.H + first_head + inner) * a.p.L + outer) * R + x, value);
      } else {
        carry.heads = add_head(a.p, block.b, first_head + inner, inner == 0, carry.heads, value);
        if (last) emit_group(a, block, outer, a.p.L, x, carry.heads, divisors.heads);
      }
    } else {
      if (inner == 0) carry.rows = rows == Reduction::kMax ? -infinity() : 0.0f, carry.seen = 0.0f;
      if (rows == Reduction::kMax) {
        carry.rows = visible ? nan_max(carry.rows, value) : carry.rows;
      } else {
        carry.rows += s.weight[r] * value;
        carry.seen += visible ? s.weight[r] : 0.0f;
      }
      if (last) {
        const float reduced = finish_rows(rows, carry, divisors.rows);
        if (heads == Reduction::kNone) {
          emit(a.p, (block.b * a.p.H + first_head + outer) * R + x, reduced);
        } else {
          carry.heads = add_head(a.p, block.b, first_head + outer, outer == 0, carry.heads, reduced);
          if (outer + 1 == block.group) emit_group(a, block, 0, 1, x, carry.heads, divisors.heads);
        }
      }
    }
    outer += last ? 1 : 0;
    inner = last ? 0 : inner + 1;
  }
}

// All keys of the chunk that lie in the range. What is unfinished after this pass waits in `waiting`, [2 or 3][chunk_keys].
__device__ inline void reduce_pass(const Args& a, const Block& block, const Shared& s, const float* logits, int stride, int row0, int count,
                                   const Divisors& divisors, float* waiting) {
  const bool first_pass = row0 == 0, last_pass = row0 + count == block.rows, counts = a.p.query_reduction == Reduction::kVisibleMean;
  for (int i = static_cast<int>(threadIdx.x); i < block.keys; i += static_cast<int>(blockDim.x)) {
    const int64_t n = block.first_key + i;
    if (n < a.p.range_begin || n >= a.p.range_end) continue;
    Carry carry;
    if (!first_pass) carry = {waiting[i], waiting[a.chunk_keys + i], counts ? waiting[2 * a.chunk_keys + i] : 0.0f};
    reduce_key(a, block, s, logits + i, stride, row0, count, divisors, n - a.p.range_begin, carry);
    if (!last_pass) waiting[i] = carry.rows, waiting[a.chunk_keys + i] = carry.heads;
    if (!last_pass && counts) waiting[2 * a.chunk_keys + i] = carry.seen;
  }
}

// The last of the Hkv blocks of a chunk adds the groups' scores in head order. The counter goes back to zero.
__device__ inline void merge_heads(const Args& a, const Block& block, float divisor, int* is_last) {
  int32_t* arrived = a.p.semaphores + static_cast<int64_t>(block.b) * a.num_chunks + block.chunk;
  if (!arrive_last(arrived, static_cast<int>(a.p.Hkv), is_last)) return;
  const Reduction heads = a.p.head_reduction;
  const int64_t R = a.p.range_end - a.p.range_begin, out_rows = block.rows_by_head ? 1 : a.p.L;
  for (int64_t l = 0; l < out_rows; ++l) {
    for (int i = static_cast<int>(threadIdx.x); i < block.keys; i += static_cast<int>(blockDim.x)) {
      const int64_t n = block.first_key + i;
      if (n < a.p.range_begin || n >= a.p.range_end) continue;
      float acc = heads == Reduction::kMax ? -infinity() : 0.0f;
      const float* from = a.partial + (static_cast<int64_t>(block.b) * a.p.Hkv * out_rows + l) * R + n - a.p.range_begin;
      for (int64_t h = 0; h < a.p.Hkv; ++h) {
        const float group = from[h * out_rows * R];
        acc = heads == Reduction::kMax ? nan_max(acc, group) : acc + group;
      }
      emit(a.p, (block.b * out_rows + l) * R + n - a.p.range_begin, divide_or_zero(acc, divisor));
    }
  }
}

template <typename T, int kRowTiles>
__global__ void __launch_bounds__(max_threads(kRowTiles)) score_kernel(const Args a) {
  SIMT_SHARED(float, partial, [kMaxThreads / 32][kMaxRows]);
  SIMT_SHARED(float, maximum, [kMaxRows]);
  SIMT_SHARED(float, coefficient, [kMaxRows]);
  SIMT_SHARED(float, lse, [kMaxRows]);
  SIMT_SHARED(float, weight, [kMaxRows]);
  SIMT_SHARED(int, end, [kMaxRows]);
  SIMT_SHARED(int64_t, bias, [kMaxRows]);
  SIMT_SHARED(float, own, [kMaxRows * 2]);
  SIMT_SHARED(int, is_last);

  const Block block = this_block(a);
  const Shared s = {partial, maximum, coefficient, lse, weight, end, bias, own};
  const int row_bytes = static_cast<int>(query_row_bytes(a.p.D, sizeof(T))), stride = static_cast<int>(logit_stride(a.chunk_keys));
  const int query_bytes = a.padded_rows * row_bytes, logit_count = a.rows_per_pass * stride;
  SIMT_CARVE(unsigned char, queries, 0, query_bytes);
  SIMT_CARVE(float, logits, query_bytes, logit_count);
  SIMT_CARVE(float, carry, query_bytes + 4 * logit_count, carry_planes(a.p, a.rows_per_pass) * a.chunk_keys);
  const T* keys = static_cast<const T*>(a.p.key) + block.b * a.p.key_stride[0] + block.kv_head * a.p.key_stride[1] +
                  block.first_key * a.p.key_stride[2];
  const Divisors divisors = {a.p.query_reduction == Reduction::kMean ? row_divisor(a, block.b) : 1.0f, head_divisor(a.p, block.b)};

  for (int row0 = 0; row0 < block.rows; row0 += a.rows_per_pass) {
    const int count = block.rows - row0 < a.rows_per_pass ? block.rows - row0 : a.rows_per_pass;
    if (row0 > 0) __syncthreads();  // the last pass has been read
    load_rows(a, block, s, row0, count);
    if (a.mode == Mode::kApply && a.p.lse_in == nullptr) merge_statistics(a, block, s, row0, count);
    load_queries<T>(a, block, row0, count, queries, row_bytes);
    __syncthreads();
    block_dots<T, kRowTiles>(
        keys, {queries, logits, row_bytes, stride, count, block.keys, a.p.key_stride[2], static_cast<int>(a.p.D), a.wide_loads});
    __syncthreads();
    finish_logits(a, block, s, logits, stride, count);
    if (a.mode != Mode::kApply) {
      __syncthreads();
      chunk_statistics(a, block, s, logits, stride, count);
      if (a.mode == Mode::kStats) {
        write_statistics(a, block, s, row0, count);
        continue;
      }
      exchange(a, s, count);
    }
    write_lse(a, block, s, row0, count);
    reduce_pass(a, block, s, logits, stride, row0, count, divisors, carry);
  }
  if (a.mode != Mode::kStats && a.p.head_reduction != Reduction::kNone && a.p.Hkv > 1) merge_heads(a, block, divisors.heads, &is_last);
}

template <typename T, int kRowTiles>
Status launch(const Args& args, int threads, int cluster, int64_t smem_bytes, void* stream) {
  const int64_t blocks = args.p.B * args.p.Hkv * args.num_chunks;
  if (blocks > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  return simt::launch_cluster(score_kernel<T, kRowTiles>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                              cluster, static_cast<size_t>(smem_bytes), stream, args);
}

}  // namespace score
}  // namespace tokensieve

// What the kernels expect of every device wrapper and CUDA name, in one source for both sides: under nvcc a program for a real GPU (the
// only check of the PTX text, so the first thing to run on a new card), under g++ the same checks of the emulator.
// Each kernel compares with plain arithmetic and counts what differs. `conformance` prints one line per check.
#include <cstdio>

#include "device/simt.h"
#include "testing/conformance.h"

namespace tokensieve {
namespace testing {
namespace {

using namespace simt;

constexpr int kInputBytes = 4096;
struct Context {
  int* counts;                 // [2]: failed, evaluated
  int32_t* flags;              // [8], zero at launch
  const unsigned char* input;  // [kInputBytes], byte i = (7 i + 3) mod 256
};
__device__ unsigned char input_byte(int i) { return static_cast<unsigned char>(7 * i + 3); }
__device__ void expect(const Context& c, bool condition) {
  if (!condition) atomicAdd(&c.counts[0], 1);
  atomicAdd(&c.counts[1], 1);
}

__global__ void shuffle_kernel(Context c) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float value = 100.0f + static_cast<float>(lane);
  expect(c, __shfl_sync(kFullMask, value, 5) == 105.0f);
  expect(c, __shfl_sync(kFullMask, lane, 35) == 3);
  expect(c, __shfl_sync(kFullMask, lane, 2, 8) == (lane & ~7) + 2);
  expect(c, __shfl_up_sync(kFullMask, lane, 3) == (lane < 3 ? lane : lane - 3));
  expect(c, __shfl_up_sync(kFullMask, lane, 3, 16) == (lane % 16 < 3 ? lane : lane - 3));
  expect(c, __shfl_down_sync(kFullMask, lane, 4) == (lane > 27 ? lane : lane + 4));
  expect(c, __shfl_down_sync(kFullMask, lane, 1, 4) == (lane % 4 == 3 ? lane : lane + 1));
  expect(c, __shfl_xor_sync(kFullMask, lane, 16) == (lane ^ 16));
  const unsigned long long wide = (1ull << 40) + static_cast<unsigned>(lane);
  expect(c, __shfl_xor_sync(kFullMask, wide, 1) == (1ull << 40) + static_cast<unsigned>(lane ^ 1));
  if (lane < 12) {  // part of the warp, in its own branch
    expect(c, __shfl_sync(0xfffu, lane, 11) == 11);
  } else {
    expect(c, __shfl_sync(0xfffff000u, lane, 12) == 12);
  }
}

__global__ void vote_kernel(Context c) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  expect(c, __ballot_sync(kFullMask, lane % 3 == 0) == 0x49249249u);
  expect(c, __any_sync(kFullMask, lane == 31) && !__any_sync(kFullMask, lane > 31));
  expect(c, __all_sync(kFullMask, lane < 32) && !__all_sync(kFullMask, lane != 7));
  expect(c, __match_any_sync(kFullMask, lane / 8) == 0xffu << (lane / 8 * 8));
  int equal = -1;
  expect(c, __match_all_sync(kFullMask, 42, &equal) == kFullMask && equal == 1);
  expect(c, __match_all_sync(kFullMask, lane == 3, &equal) == 0 && equal == 0);
  if (lane % 2 == 1) expect(c, __ballot_sync(0xaaaaaaaau, lane > 16) == 0xaaaa0000u);
  expect(c, __syncthreads_count(threadIdx.x % 4 == 0) == static_cast<int>(blockDim.x) / 4);
  expect(c, __syncthreads_or(threadIdx.x == 9) != 0);
  expect(c, __syncthreads_or(0) == 0);
  expect(c, __syncthreads_and(1) != 0);
  expect(c, __syncthreads_and(threadIdx.x != 9) == 0);
}

__global__ void reduce_kernel(Context c) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned u = static_cast<unsigned>(lane);
  expect(c, __reduce_add_sync(kFullMask, u) == 496u);
  expect(c, __reduce_add_sync(kFullMask, -lane) == -496);
  expect(c, __reduce_add_sync(kFullMask, 0x80000000u + u) == 496u);  // wraps
  expect(c, __reduce_min_sync(kFullMask, lane - 16) == -16 && __reduce_max_sync(kFullMask, lane - 16) == 15);
  expect(c, __reduce_min_sync(kFullMask, u + 4) == 4u && __reduce_max_sync(kFullMask, u | 0x80000000u) == 0x8000001fu);
  expect(c, __reduce_and_sync(kFullMask, u | 0xf0u) == 0xf0u && __reduce_or_sync(kFullMask, 1u << lane) == kFullMask);
  expect(c, __reduce_xor_sync(kFullMask, 1u << (lane / 2)) == 0u);
}

template <int W>
__device__ void check_tile(const Context& c) {
  const int lane = static_cast<int>(threadIdx.x) % 32, rank = lane % W, first = lane - rank;
  expect(c, tile<W>::rank() == rank);
  expect(c, tile<W>::sum(lane) == W * first + W * (W - 1) / 2);
  expect(c, tile<W>::max(static_cast<float>(lane)) == static_cast<float>(first + W - 1));
  expect(c, tile<W>::min(lane) == first);
  expect(c, tile<W>::inclusive_sum(rank) == rank * (rank + 1) / 2);
  expect(c, tile<W>::shfl(lane, W - 1) == first + W - 1 && tile<W>::shfl_xor(lane, W / 2) == (lane ^ (W / 2)));
  expect(c, tile<W>::shfl_up(lane, 1) == (rank == 0 ? lane : lane - 1));
  expect(c, tile<W>::shfl_down(lane, 1) == (rank == W - 1 ? lane : lane + 1));
  expect(c, tile<W>::ballot(rank == 0) == 1u);
  expect(c, tile<W>::any(lane == 0) == (first == 0) && tile<W>::all(lane != 0) == (first != 0));
  tile<W>::sync();
}
__global__ void tile_kernel(Context c) {
  check_tile<32>(c);
  check_tile<16>(c);
  check_tile<4>(c);
  check_tile<1>(c);
  if (threadIdx.x % 32 < 8) check_tile<8>(c);  // one tile alone in a branch
}

__global__ void atomic_kernel(Context c) {
  SIMT_SHARED(int, cell, [6]);
  SIMT_SHARED(unsigned, ucell, [4]);
  SIMT_SHARED(float, fcell);
  SIMT_SHARED(unsigned long long, wide);
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  if (t == 0) {
    cell[0] = cell[1] = cell[2] = cell[3] = 0;
    cell[4] = 1000;
    cell[5] = -1;
    ucell[0] = ucell[1] = 0;
    ucell[2] = ucell[3] = 0xffffffffu;
    fcell = 0.0f;
    wide = 0;
  }
  __syncthreads();
  atomicAdd(&cell[0], t);
  atomicSub(&cell[1], 1);
  atomicMax(&cell[2], t);
  atomicOr(&cell[3], 1 << (t % 32));
  atomicMin(&cell[4], t + 3);
  expect(c, atomicExch(&cell[5], t) < n);
  expect(c, atomicInc(&ucell[0], static_cast<unsigned>(n - 1)) < static_cast<unsigned>(n));
  atomicXor(&ucell[1], 1u << (t % 32));
  atomicAnd(&ucell[2], ~(1u << (t % 32)));
  atomicMin(&ucell[3], static_cast<unsigned>(t) + 5u);
  atomicAdd(&fcell, 0.5f);
  atomicMax(&wide, (1ull << 40) + static_cast<unsigned>(t));
  atomicAdd(&c.flags[0], 1);
  for (int old = load_acquire(&c.flags[1]), seen; (seen = atomicCAS(&c.flags[1], old, old + 2)) != old; old = seen) {
  }
  __syncthreads();
  expect(c, cell[0] == n * (n - 1) / 2 && cell[1] == -n && cell[2] == n - 1 && cell[3] == -1 && cell[4] == 3);
  expect(c, cell[5] >= 0 && cell[5] < n && ucell[0] == 0u && ucell[1] == 0u && ucell[2] == 0u && ucell[3] == 5u);
  expect(c, fcell == 0.5f * static_cast<float>(n) && wide == (1ull << 40) + static_cast<unsigned>(n - 1));
  expect(c, atomicAdd(&c.flags[0], 0) == n && atomicAdd(&c.flags[1], 0) == 2 * n);
}

__global__ void bits_kernel(Context c) {
  expect(c, __popc(0xf0f0u) == 8 && __popcll(0xffull << 36) == 8 && __clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63);
  expect(c, __ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41 && __brev(1u) == 0x80000000u && __brev(0x6u) == 0x60000000u);
  expect(c, __byte_perm(0x33221100u, 0x77665544u, 0x5140u) == 0x55114400u);
  expect(c, __funnelshift_l(0x80000001u, 0x1u, 4) == 0x18u && __funnelshift_r(0x10u, 0x3u, 4) == 0x30000001u);
  expect(c, __umulhi(0x80000000u, 6u) == 3u && __float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0xc0000000u) == -2.0f);
  expect(c, __float_as_int(-0.0f) == static_cast<int>(0x80000000u) && __int_as_float(0x40400000) == 3.0f);
  const float nan = __uint_as_float(0x7fc00000u);
  expect(c, fminf(nan, 2.0f) == 2.0f && fmaxf(2.0f, nan) == 2.0f && max(3, -4) == 3 && min(3u, 4u) == 3u);
  expect(c, __half2float(__float2half_rn(1.0f + 1.0f / 2048)) == 1.0f && __half2float(__float2half_rn(65520.0f)) > 1e30f);
  expect(c, __bfloat162float(__float2bfloat16_rn(1.0f + 3.0f / 256)) == 1.0f + 4.0f / 256);
  expect(c, __float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __fmaf_rn(3.0f, 4.0f, 5.0f) == 17.0f);
  for (int i = static_cast<int>(threadIdx.x); i < 512; i += static_cast<int>(blockDim.x)) {
    const float x = -120.0f + 0.467f * static_cast<float>(i), y = exp2f(x);
    expect(c, fabsf(fast_exp2(x) - y) <= 1e-6f * y);
  }
  const float inf = __uint_as_float(0x7f800000u), weird = fast_exp2(nan);
  expect(c, fast_exp2(-inf) == 0.0f && fast_exp2(inf) == inf && weird != weird && fast_exp2(0.0f) == 1.0f && fast_exp2(-130.0f) == 0.0f);
  expect(c, __ldg(c.input + 9) == input_byte(9) && __ldcg(c.input + 1) == input_byte(1) && __ldcs(c.input) == input_byte(0));
}

__global__ void cp_async_kernel(Context c) {
  SIMT_DYN_SHARED(unsigned char, smem);  // 100 KiB: more than a launch gets without opting in
  expect(c, reinterpret_cast<uintptr_t>(smem) % 128 == 0);
  const int t = static_cast<int>(threadIdx.x);
  unsigned char* const a = smem + 50 * 1024;
  unsigned char* const b = a + 16 * 128;
  unsigned char* const d = b + 8 * 128;
  cp_async<16>(a + 16 * t, c.input + 16 * t, t % 17);
  cp_async<8>(b + 8 * t, c.input + 8 * t);
  cp_async_commit();
  cp_async<4>(d + 4 * t, c.input + 4 * t, t % 5);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 16; ++i) expect(c, a[16 * t + i] == (i < t % 17 ? input_byte(16 * t + i) : 0));
  for (int i = 0; i < 8; ++i) expect(c, b[8 * t + i] == input_byte(8 * t + i));
  cp_async_wait<0>();
  __syncthreads();
  const int other = t ^ 37;  // in another warp or lane
  for (int i = 0; i < 4; ++i) expect(c, d[4 * other + i] == (i < other % 5 ? input_byte(4 * other + i) : 0));
}

__global__ void ldmatrix_kernel(Context c) {
  SIMT_SHARED(uint4, rows, [32]);  // 4 matrices of 8 rows of 8 elements; element (m, r, k) = 64 m + 8 r + k
  const int lane = static_cast<int>(threadIdx.x);
  for (int k = 0; k < 8; ++k) reinterpret_cast<unsigned short*>(&rows[lane])[k] = static_cast<unsigned short>(8 * lane + k);
  __syncwarp();
  const int g = lane / 4, t = 2 * (lane % 4);
  uint32_t r[4], s[4], p[2], q[2];
  ldmatrix_x4(r, &rows[lane]);
  ldmatrix_x4_trans(s, &rows[lane]);
  ldmatrix_x2(p, &rows[lane % 16]);
  ldmatrix_x2_trans(q, &rows[lane % 16]);
  for (int m = 0; m < 4; ++m) {
    const auto straight = static_cast<uint32_t>((64 * m + 8 * g + t + 1) << 16 | (64 * m + 8 * g + t));
    const auto transposed = static_cast<uint32_t>((64 * m + 8 * (t + 1) + g) << 16 | (64 * m + 8 * t + g));
    expect(c, r[m] == straight && s[m] == transposed);
    if (m < 2) expect(c, p[m] == straight && q[m] == transposed);
  }
}

__device__ float a_value(int row, int k) { return static_cast<float>((row * 5 + k * 3) % 17 - 8); }  // exact in both 16-bit types
__device__ float b_value(int k, int column) { return static_cast<float>((k * 7 + column * 11) % 13 - 6); }
template <typename T>
__device__ uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  return static_cast<uint32_t>(reinterpret_cast<const unsigned short*>(pair)[1]) << 16 | reinterpret_cast<const unsigned short*>(pair)[0];
}
template <typename T>
__global__ void mma_kernel(Context c) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = 2 * (lane % 4);
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) {
    const int row = g + 8 * (r % 2), k = t + 8 * (r / 2);
    a[r] = pack<T>(a_value(row, k), a_value(row, k + 1));
  }
  for (int r = 0; r < 2; ++r) b[r] = pack<T>(b_value(t + 8 * r, g), b_value(t + 8 * r + 1, g));
  float acc[4] = {0.5f, -1.0f, 2.0f, 3.0f};
  mma_m16n8k16<T>(acc, a, b);
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = t + i % 2;
    float sum = i == 0 ? 0.5f : i == 1 ? -1.0f : static_cast<float>(i);
    for (int k = 0; k < 16; ++k) sum += a_value(row, k) * b_value(k, column);  // small integers: exact in any order
    expect(c, acc[i] == sum);
  }
}

// Two warpgroups share two tiles; the sums of 64 products of small integers are exact in any order.
template <typename T>
__global__ void wgmma_kernel(Context c) {
  if (!kHasWgmma) return;
  SIMT_DYN_SHARED(unsigned char, dynamic);
  unsigned char* const tiles = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, g = t % 32 / 4, pair = 2 * (t % 4);
  for (int i = t; i < 128 * 32; i += static_cast<int>(blockDim.x)) {  // tile, column, two elements
    const int column = i / 32 % 64, k = i % 32 * 2, shift = i / 2048;
    const int part = (k / 8) ^ (column % 8);
    reinterpret_cast<uint32_t*>(tiles)[i / 32 * 32 + part * 4 + k % 8 / 2] =
        pack<T>(b_value(k + shift, column), b_value(k + 1 + shift, column));
  }
  fence_async_shared();
  __syncthreads();
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step) {
    for (int r = 0; r < 4; ++r) {
      const int row = 16 * warp + g + 8 * (r % 2), k = 16 * step + pair + 8 * (r / 2);
      a[step][r] = pack<T>(a_value(row, k), a_value(row, k + 1));
    }
  }
  float first[8][4], second[8][4];
  for (int i = 0; i < 32; ++i) first[i / 4][i % 4] = 7.0f, second[i / 4][i % 4] = static_cast<float>(i);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_m64n64k16<T>(first, a[step], tiles, step, step > 0);  // in place of the sevens
  wgmma_commit();
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_m64n64k16<T>(second, a[step], tiles + 64 * 128, step, true);
  wgmma_commit();
  wgmma_wait<1>(first);
  wgmma_wait<0>(second);
  for (int i = 0; i < 32; ++i) {
    const int row = 16 * warp + g + 8 * (i % 4 / 2), column = 8 * (i / 4) + pair + i % 2;
    float sums[2] = {0.0f, static_cast<float>(i)};
    for (int k = 0; k < 64; ++k) {
      for (int shift = 0; shift < 2; ++shift) sums[shift] += a_value(row, k) * b_value(k + shift, column);
    }
    expect(c, first[i / 4][i % 4] == sums[0]);
    expect(c, second[i / 4][i % 4] == sums[1]);
  }
}

__global__ void barrier_kernel(Context c) {
  SIMT_SHARED(int, cell, [128]);
  const int t = static_cast<int>(threadIdx.x), group = t / 64;
  for (int round = 0; round < 3 + group; ++round) {  // the two halves of the block go round independently
    cell[t] = 100 * round + t;
    named_barrier(1 + group, 64);
    expect(c, cell[t ^ 63] == 100 * round + (t ^ 63));
    named_barrier(1 + group, 64);
  }
  __syncthreads();
  cell[t] = -t;
  __syncthreads();
  expect(c, cell[127 - t] == t - 127);
}

__global__ void cluster_kernel(Context c) {
  SIMT_SHARED(int, cell, [64]);
  SIMT_DYN_SHARED(int, dynamic);
  const int t = static_cast<int>(threadIdx.x), rank = cluster_rank(), size = cluster_size();
  expect(c, size == 4 && rank == static_cast<int>(blockIdx.x) % 4);
  cell[t] = 1000 * rank + t;
  dynamic[t] = 0;
  cluster_sync();
  for (int peer = 0; peer < size; ++peer) {
    expect(c, cluster_map(cell, peer)[t] == 1000 * peer + t);
    atomicAdd(&cluster_map(dynamic, peer)[t], 1 << (4 * rank));
  }
  cluster_sync();
  expect(c, dynamic[t] == 0x1111);
}

__global__ void flag_kernel(Context c) {  // two blocks that run at once: the second waits for the first
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    c.flags[2] = 77;
    store_release(&c.flags[3], 1);
  } else {
    while (load_acquire(&c.flags[3]) == 0) __nanosleep(50);
    expect(c, c.flags[2] == 77);
  }
}

__global__ void last_block_kernel(Context c) {  // the last block to arrive sees what all have written
  SIMT_SHARED(int, last);
  if (threadIdx.x == 0) {
    c.flags[blockIdx.x] = 10 + static_cast<int>(blockIdx.x);
    __threadfence();
    last = atomicAdd(&c.flags[7], 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (last != 0 && threadIdx.x < gridDim.x) expect(c, c.flags[threadIdx.x] == 10 + static_cast<int>(threadIdx.x));
}

struct Check {
  const char* name;
  void (*kernel)(Context);
  int grid, block, cluster;
  size_t smem;
  bool optional = false;  // evaluates nothing on an architecture that lacks the instruction
};
const Check kChecks[] = {{"shuffles", shuffle_kernel, 2, 64, 1, 0},
                         {"votes", vote_kernel, 1, 64, 1, 0},
                         {"warp reductions", reduce_kernel, 1, 64, 1, 0},
                         {"tile", tile_kernel, 1, 64, 1, 0},
                         {"atomics", atomic_kernel, 1, 256, 1, 0},
                         {"bits and arithmetic", bits_kernel, 1, 64, 1, 0},
                         {"cp_async", cp_async_kernel, 2, 128, 1, 100 * 1024},
                         {"ldmatrix", ldmatrix_kernel, 1, 32, 1, 0},
                         {"mma half", mma_kernel<__half>, 1, 32, 1, 0},
                         {"mma bfloat16", mma_kernel<__nv_bfloat16>, 1, 32, 1, 0},
                         {"wgmma half", wgmma_kernel<__half>, 1, 256, 1, 17 * 1024, true},
                         {"wgmma bfloat16", wgmma_kernel<__nv_bfloat16>, 1, 256, 1, 17 * 1024, true},
                         {"barriers", barrier_kernel, 2, 128, 1, 0},
                         {"cluster", cluster_kernel, 8, 64, 4, 256},
                         {"flags between blocks", flag_kernel, 2, 32, 1, 0},
                         {"last block", last_block_kernel, 6, 64, 1, 0}};

#if defined(__CUDACC__)
struct Memory {
  Context context = {};
  bool ok = true;
  bool supported(const Check& check) {
    int major = 0;
    ok = ok && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess;
    return check.cluster == 1 || major >= 9;
  }
  Memory() {
    unsigned char bytes[kInputBytes];
    for (int i = 0; i < kInputBytes; ++i) bytes[i] = static_cast<unsigned char>(7 * i + 3);
    void* input = nullptr;
    ok = cudaMalloc(&context.counts, 2 * sizeof(int)) == cudaSuccess && cudaMalloc(&context.flags, 8 * sizeof(int32_t)) == cudaSuccess &&
         cudaMalloc(&input, kInputBytes) == cudaSuccess && cudaMemcpy(input, bytes, kInputBytes, cudaMemcpyHostToDevice) == cudaSuccess;
    context.input = static_cast<const unsigned char*>(input);
  }
  void clear() {
    ok = ok && cudaMemset(context.counts, 0, 2 * sizeof(int)) == cudaSuccess &&
         cudaMemset(context.flags, 0, 8 * sizeof(int32_t)) == cudaSuccess;
  }
  void read(int (&counts)[2]) { ok = ok && cudaMemcpy(counts, context.counts, sizeof(counts), cudaMemcpyDeviceToHost) == cudaSuccess; }
};
#else
struct Memory {
  int counts[2] = {};
  int32_t flags[8] = {};
  alignas(16) unsigned char input[kInputBytes];
  Context context = {counts, flags, input};
  bool ok = true;
  bool supported(const Check&) { return true; }
  Memory() {
    for (int i = 0; i < kInputBytes; ++i) input[i] = static_cast<unsigned char>(7 * i + 3);
  }
  void clear() {
    for (int& v : counts) v = 0;
    for (int32_t& v : flags) v = 0;
  }
  void read(int (&out)[2]) {
    for (int i = 0; i < 2; ++i) out[i] = counts[i];
  }
};
#endif

}  // namespace

std::vector<ConformanceResult> run_conformance() {
  Memory memory;
  std::vector<ConformanceResult> results;
  for (const Check& check : kChecks) {
    ConformanceResult result = {check.name, ConformanceResult::kPassed, ""};
    memory.clear();
    int counts[2] = {-1, 0};
    if (!memory.supported(check)) {
      result.outcome = ConformanceResult::kSkipped;
    } else {
      const Status status =
          launch_cluster(check.kernel, dim3(check.grid), dim3(check.block), check.cluster, check.smem, nullptr, memory.context);
      if (status.ok()) memory.read(counts);
      if (!status.ok()) {
        result = {check.name, ConformanceResult::kFailed, status.message};
      } else if (!memory.ok) {
        result = {check.name, ConformanceResult::kFailed, "a CUDA call failed; later checks may only repeat it"};
      } else if (counts[1] == 0 && check.optional) {
        result.outcome = ConformanceResult::kSkipped;
      } else if (counts[0] != 0 || counts[1] == 0) {
        result = {check.name, ConformanceResult::kFailed, std::to_string(counts[0]) + " of " + std::to_string(counts[1]) + " expectations"};
      }
    }
    results.push_back(result);
  }
  struct Refusal {
    const char* name;
    dim3 grid, block;
    int cluster;
    size_t smem;
  };
  const Refusal refusals[] = {{"refuses 1025 threads", dim3(1), dim3(1025), 1, 0},
                              {"refuses an empty grid", dim3(0), dim3(32), 1, 0},
                              {"refuses a tall grid", dim3(1, 65536), dim3(32), 1, 0},
                              {"refuses 228 KiB", dim3(1), dim3(32), 1, 228 * 1024},
                              {"refuses half a cluster", dim3(3), dim3(32), 2, 0}};
  for (const Refusal& r : refusals) {
    const bool refused = !launch_cluster(shuffle_kernel, r.grid, r.block, r.cluster, r.smem, nullptr, memory.context).ok();
    results.push_back({r.name, refused ? ConformanceResult::kPassed : ConformanceResult::kFailed, ""});
  }
  return results;
}

}  // namespace testing
}  // namespace tokensieve

#if defined(TOKENSIEVE_CONFORMANCE_MAIN)
int main() {
  using tokensieve::testing::ConformanceResult;
#if !defined(__CUDACC__)
  tokensieve::simt::host::config().resident_blocks = 2;
#endif
  int failed = 0;
  for (const ConformanceResult& r : tokensieve::testing::run_conformance()) {
    const char* outcome = r.outcome == ConformanceResult::kPassed ? "ok" : r.outcome == ConformanceResult::kSkipped ? "skipped" : "FAILED";
    std::printf("%-8s %s%s%s\n", outcome, r.name.c_str(), r.detail.empty() ? "" : ": ", r.detail.c_str());
    failed += r.outcome == ConformanceResult::kFailed ? 1 : 0;
  }
  std::printf("%d failed\n", failed);
  return failed == 0 ? 0 : 1;
}
#endif

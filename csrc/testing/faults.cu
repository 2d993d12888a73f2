// Every kernel here is a template: <true> holds one mistake, <false> is right. tests/kernels/test_simt_faults.py runs both in every build
// and expects the report to name the line marked "FAULT: <name>". Emulator only: on a GPU most of these pass or hang.
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "device/simt.h"
#include "testing/faults.h"

namespace tokensieve {
namespace testing {
namespace {

using namespace simt;

constexpr int kOut = 64;
struct Args {
  float* out;       // [64]
  const float* in;  // [64], in[i] = i
  int32_t* flags;   // [4], zero
};
__device__ int tid() { return static_cast<int>(threadIdx.x); }
__device__ int bid() { return static_cast<int>(blockIdx.x); }

// ---- memory ------------------------------------------------------------------------------------------------------------------
template <bool kFault>
__global__ void shared_bounds(Args a) {
  SIMT_DYN_SHARED(float, smem);           // 64 floats
  smem[tid() + (kFault ? 1 : 0)] = 1.0f;  // FAULT: shared_bounds
  __syncthreads();
  a.out[tid()] = smem[63 - tid()];
}
template <bool kFault>
__global__ void carve_bounds(Args a) {
  SIMT_CARVE(float, low, 0, 32);
  SIMT_CARVE(float, high, 128, 32);
  if (tid() < 32) {
    high[tid()] = 2.0f;
    low[tid() + (kFault ? 1 : 0)] = 1.0f;  // FAULT: carve_bounds
  }
  __syncthreads();
  a.out[tid()] = tid() < 32 ? low[31 - tid()] : high[63 - tid()];
}
template <bool kFault>
__global__ void static_bounds(Args a) {
  SIMT_SHARED(float, cell, [64]);
  float* p = cell;
  p[tid()] = a.in[tid()];
  __syncthreads();
  a.out[tid()] = p[tid() - (kFault ? 8 : 0)];  // FAULT: static_bounds
}
template <bool kFault>
__global__ void global_bounds(Args a) {
  a.out[tid()] = a.in[tid() + (kFault ? 64 : 0)];  // FAULT: global_bounds
}
template <bool kFault>
__global__ void misaligned_vector(Args a) {
  a.out[tid()] = 1.0f;
  if (tid() < 15) a.out[tid()] = reinterpret_cast<const float4*>(a.in + (kFault ? 1 : 0))[tid()].x;  // FAULT: misaligned_vector
}
template <bool kFault>
__global__ void wide_shift(Args a) {
  a.out[tid()] = static_cast<float>(1u << (kFault ? tid() : tid() % 32));  // FAULT: wide_shift
}
template <bool kFault>
__global__ void uninitialised_shared(Args a) {
  SIMT_SHARED(float, total);
  if (!kFault && tid() == 0) total = 0.0f;
  __syncthreads();
  atomicAdd(&total, 1.0f);
  __syncthreads();
  a.out[tid()] = total;
}

// ---- barriers ----------------------------------------------------------------------------------------------------------------
template <bool kFault>
__global__ void missing_syncthreads(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cell[tid()] = a.in[tid()];
  if (!kFault) __syncthreads();
  a.out[tid()] = cell[63 - tid()];  // FAULT: missing_syncthreads
}
template <bool kFault>
__global__ void missing_syncwarp(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cell[tid()] = a.in[tid()];
  if (!kFault) __syncwarp();
  a.out[tid()] = cell[tid() ^ 1];  // FAULT: missing_syncwarp
}
template <bool kFault>
__global__ void shuffle_is_no_barrier(Args a) {  // a shuffle makes lanes meet, but orders no memory
  SIMT_SHARED(float, cell, [64]);
  cell[tid()] = a.in[tid()];
  const int lane = __shfl_sync(kFullMask, tid(), 0);
  if (!kFault) __syncwarp();
  a.out[tid()] = cell[tid() ^ 1] + 0.0f * static_cast<float>(lane);  // FAULT: shuffle_is_no_barrier
}
template <bool kFault>
__global__ void divergent_barrier(Args a) {
  if (kFault && tid() >= 32) {
    __syncthreads();  // FAULT: divergent_barrier
  } else {
    __syncthreads();
  }
  a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void deadlock(Args a) {
  if (!kFault || tid() != 5) {
    __syncwarp();  // FAULT: deadlock
  } else {
    named_barrier(3, 64);
  }
  a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void unfinished_shuffle(Args a) {                                      // half of the lanes stay away
  if (!kFault || tid() % 2 == 0) a.out[tid()] = __shfl_sync(kFullMask, 1.0f, 0);  // FAULT: unfinished_shuffle
  __syncthreads();
}
template <bool kFault>
__global__ void mixed_operations(Args a) {
  if (!kFault || tid() % 32 < 16) {
    a.out[tid()] = __shfl_sync(kFullMask, 1.0f, 0);
  } else {
    a.out[tid()] = static_cast<float>(__any_sync(kFullMask, 1));  // FAULT: mixed_operations
  }
}
template <bool kFault>
__global__ void lane_outside_mask(Args a) {
  const unsigned mask = kFault ? 0xffffu : kFullMask;
  a.out[tid()] = __shfl_sync(mask, 1.0f, 0);  // FAULT: lane_outside_mask
}
template <bool kFault>
__global__ void unaligned_mma(Args a) {  // ldmatrix and mma are .aligned: the whole warp at one line
  SIMT_SHARED(uint4, rows, [64]);
  rows[tid()] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  uint32_t r[2];
  if (!kFault || tid() % 2 == 0) {
    ldmatrix_x2(r, &rows[tid()]);
  } else {
    ldmatrix_x2(r, &rows[tid()]);  // FAULT: unaligned_mma
  }
  a.out[tid()] = static_cast<float>(r[0]);
}
template <bool kFault>
__global__ void failed_check(Args a) {
  device_check(!kFault || tid() != 7);  // FAULT: failed_check
  a.out[tid()] = 1.0f;
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------------------
template <bool kFault>
__global__ void missing_copy_wait(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cp_async<4>(&cell[tid()], a.in + tid());
  cp_async_commit();
  if (!kFault) cp_async_wait<0>();
  __syncthreads();
  a.out[tid()] = cell[63 - tid()];
  if (kFault) cp_async_wait<0>();
}
template <bool kFault>
__global__ void early_refill(Args a) {  // the second copy lands on data that others still have to read
  SIMT_SHARED(float, cell, [64]);
  cp_async<4>(&cell[tid()], a.in + tid());
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float first = kFault ? 0.0f : cell[63 - tid()];
  if (!kFault) __syncthreads();
  cp_async<4>(&cell[tid()], a.in + 63 - tid());  // FAULT: early_refill
  cp_async_commit();
  a.out[tid()] = kFault ? cell[63 - tid()] : first;
  cp_async_wait<0>();
}
template <bool kFault>
__global__ void copy_in_flight_at_exit(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cp_async<4>(&cell[tid()], a.in + tid());
  cp_async_commit();
  if (!kFault) cp_async_wait<0>();
  a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void misaligned_copy(Args a) {
  SIMT_SHARED(float4, cell, [16]);
  if (tid() < 15) cp_async<16>(&cell[tid()], a.in + 4 * tid() + (kFault ? 1 : 0));  // FAULT: misaligned_copy
  cp_async_commit();
  cp_async_wait<0>();
  a.out[tid()] = tid() < 15 ? cell[tid()].x : 1.0f;
}
template <bool kFault>
__global__ void misaligned_ldmatrix(Args a) {
  SIMT_SHARED(float, cell, [160]);
  for (int i = tid(); i < 160; i += 64) cell[i] = 0.0f;
  __syncthreads();
  uint32_t r[2];
  ldmatrix_x2(r, &cell[4 * (tid() % 32) + (kFault ? 1 : 0)]);  // FAULT: misaligned_ldmatrix
  a.out[tid()] = __uint_as_float(r[0]);
}

// ---- warpgroups: one of four warps ----------------------------------------------------------------------------------------------
struct alignas(1024) WgmmaTile {
  uint32_t pairs[64 * 32];
};
constexpr uint32_t kOnes = 0x3c003c00u;  // two halves
__device__ void fill(WgmmaTile& tile) {
  for (int i = tid(); i < 64 * 32; i += 128) tile.pairs[i] = kOnes;
}
__device__ void publish_tile() {
  fence_async_shared();
  __syncthreads();
}
#define ONE_PRODUCT(acc, tile)                             \
  float acc[8][4] = {};                                    \
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};   \
  wgmma_fence();                                           \
  wgmma_m64n64k16<__half>(acc, ones, tile.pairs, 0, true); \
  wgmma_commit()

template <bool kFault>
__global__ void missing_proxy_fence(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  cp_async<4>(&tile.pairs[tid()], a.in + tid() % 64);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kFault) fence_async_shared();
  __syncthreads();
  ONE_PRODUCT(acc, tile);  // FAULT: missing_proxy_fence
  wgmma_wait<0>(acc);
  if (tid() < 64) a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void missing_tile_barrier(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  fence_async_shared();
  if (!kFault) __syncthreads();
  ONE_PRODUCT(acc, tile);  // FAULT: missing_tile_barrier
  wgmma_wait<0>(acc);
  if (tid() < 64) a.out[tid()] = acc[0][0];
}
template <bool kFault>
__global__ void missing_wgmma_wait(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  ONE_PRODUCT(acc, tile);
  if (!kFault) wgmma_wait<0>(acc);
  if (tid() < 64) a.out[tid()] = acc[0][0];
  if (kFault) wgmma_wait<0>(acc);
}
template <bool kFault>
__global__ void short_wgmma_wait(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  ONE_PRODUCT(acc, tile);
  wgmma_wait<kFault ? 1 : 0>(acc);  // FAULT: short_wgmma_wait
  if (tid() < 64) a.out[tid()] = acc[0][0];
}
template <bool kFault>
__global__ void missing_wgmma_fence(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  ONE_PRODUCT(acc, tile);
  wgmma_wait<0>(acc);
  acc[0][0] = 0.0f;
  if (!kFault) wgmma_fence();
  wgmma_m64n64k16<__half>(acc, ones, tile.pairs, 1, true);  // FAULT: missing_wgmma_fence
  wgmma_commit();
  wgmma_wait<0>(acc);
  if (tid() < 64) a.out[tid()] = acc[0][0];
}
template <bool kFault>
__global__ void accumulator_in_flight(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  ONE_PRODUCT(acc, tile);
  if (kFault) acc[3][1] = 0.0f;
  wgmma_wait<0>(acc);  // FAULT: accumulator_in_flight
  if (tid() < 64) a.out[tid()] = acc[0][0];
}
template <bool kFault>
__global__ void early_tile_write(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  ONE_PRODUCT(acc, tile);
  __syncthreads();  // no race: the barriers order all but the product itself
  if (kFault && tid() == 0) tile.pairs[0] = 0;
  __syncthreads();
  wgmma_wait<0>(acc);  // FAULT: early_tile_write
  if (tid() < 64) a.out[tid()] = acc[0][0];
}
template <bool kFault>
__global__ void divergent_warpgroup(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  if (!kFault || tid() < 96) {
    ONE_PRODUCT(acc, tile);  // FAULT: divergent_warpgroup
    wgmma_wait<0>(acc);
  } else {
    ONE_PRODUCT(acc, tile);
    wgmma_wait<0>(acc);
  }
  if (tid() < 64) a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void unfinished_warpgroup(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  if (!kFault || tid() < 96) {
    ONE_PRODUCT(acc, tile);
    wgmma_wait<0>(acc);
  }
  if (tid() < 64) a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void wgmma_in_flight_at_exit(Args a) {
  SIMT_SHARED(WgmmaTile, tile);
  fill(tile);
  publish_tile();
  ONE_PRODUCT(acc, tile);
  if (!kFault) wgmma_wait<0>(acc);
  if (tid() < 64) a.out[tid()] = 1.0f;
}
template <bool kFault>
__global__ void misaligned_tile(Args a) {
  SIMT_SHARED(WgmmaTile, tiles, [2]);
  fill(tiles[0]);
  fill(tiles[1]);
  publish_tile();
  float acc[8][4] = {};
  const uint32_t ones[4] = {};
  wgmma_fence();
  wgmma_m64n64k16<__half>(acc, ones, tiles[0].pairs + (kFault ? 128 : 0), 0, true);  // FAULT: misaligned_tile
  wgmma_commit();
  wgmma_wait<0>(acc);
  if (tid() < 64) a.out[tid()] = 1.0f;
}

// ---- blocks ------------------------------------------------------------------------------------------------------------------
template <bool kFault>
__global__ void block_race(Args a) {  // 2 blocks
  const int mine = kFault ? tid() : 32 * bid() + tid();
  if (tid() < 32) a.out[mine] = 1.0f;  // FAULT: block_race
}
template <bool kProducerFence, bool kConsumerFence>
__device__ void publish(Args a) {  // the block that comes last reads what both wrote
  SIMT_SHARED(int, last);
  if (tid() < 32) a.out[32 * bid() + tid()] = a.in[tid()];  // FAULT: missing_producer_fence
  __syncthreads();
  if (tid() == 0) {
    if (kProducerFence) __threadfence();
    last = atomicAdd(&a.flags[0], 1);
    if (kConsumerFence) __threadfence();
  }
  __syncthreads();
  if (last == 1) a.out[tid()] += 1.0f;  // FAULT: missing_consumer_fence
}
template <bool kFault>
__global__ void missing_producer_fence(Args a) {
  publish<!kFault, true>(a);
}
template <bool kFault>
__global__ void missing_consumer_fence(Args a) {
  publish<true, !kFault>(a);
}
template <bool kFault>
__global__ void late_fence(Args a) {  // a fence before the barrier publishes the own writes only, not those of the block
  SIMT_SHARED(int, last);
  if (tid() < 32) a.out[32 * bid() + tid()] = a.in[tid()];  // FAULT: late_fence
  if (kFault && tid() == 0) __threadfence();
  __syncthreads();
  if (tid() == 0) {
    if (!kFault) __threadfence();
    last = atomicAdd(&a.flags[0], 1);
    __threadfence();
  }
  __syncthreads();
  if (last == 1) a.out[tid()] += 1.0f;
}
template <bool kFault>
__global__ void endless_spin(Args a) {
  if (bid() == 0 && tid() == 0 && !kFault) store_release(&a.flags[1], 1);
  if (bid() == 1 && tid() == 0) {
    while (load_acquire(&a.flags[1]) == 0) __nanosleep(20);  // FAULT: endless_spin
  }
  if (bid() == 1) a.out[tid()] = 1.0f;
}

// ---- clusters of two ---------------------------------------------------------------------------------------------------------
template <bool kFault>
__global__ void cluster_first_sync(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cell[tid()] = 1.0f;
  if (!kFault) cluster_sync();
  const float* remote = cluster_map(cell, cluster_rank() ^ 1);  // FAULT: cluster_first_sync
  if (cluster_rank() == 0) a.out[tid()] = remote[63 - tid()];
  cluster_sync();
}
template <bool kFault>
__global__ void cluster_last_sync(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cell[tid()] = 1.0f;
  cluster_sync();
  if (cluster_rank() == 0) a.out[tid()] = cluster_map(cell, 1)[63 - tid()];
  if (!kFault) cluster_sync();
}
template <bool kFault>
__global__ void cluster_rank_bounds(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cell[tid()] = 1.0f;
  cluster_sync();
  const int rank = kFault ? cluster_size() : cluster_size() - 1;
  if (cluster_rank() == 0) a.out[tid()] = *cluster_map(&cell[tid()], rank);  // FAULT: cluster_rank_bounds
  cluster_sync();
}
template <bool kFault>
__global__ void cluster_remote_race(Args a) {
  SIMT_SHARED(float, cell, [64]);
  cluster_sync();
  cluster_map(cell, cluster_rank() ^ 1)[tid()] = 2.0f;
  if (kFault) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  if (cluster_rank() == 0) a.out[tid()] = cell[tid()];  // FAULT: cluster_remote_race
  cluster_sync();
}

struct Fault {
  const char* name;
  void (*wrong)(Args);
  void (*right)(Args);
  int grid, block, cluster;
};
#define FAULT_OF(name, grid, cluster) {#name, name<true>, name<false>, grid, 64, cluster}
#define WARPGROUP_FAULT_OF(name) {#name, name<true>, name<false>, 1, 128, 1}
const Fault kFaults[] = {FAULT_OF(shared_bounds, 1, 1),
                         FAULT_OF(carve_bounds, 1, 1),
                         FAULT_OF(static_bounds, 1, 1),
                         FAULT_OF(global_bounds, 1, 1),
                         FAULT_OF(misaligned_vector, 1, 1),
                         FAULT_OF(wide_shift, 1, 1),
                         FAULT_OF(uninitialised_shared, 1, 1),
                         FAULT_OF(missing_syncthreads, 1, 1),
                         FAULT_OF(missing_syncwarp, 1, 1),
                         FAULT_OF(shuffle_is_no_barrier, 1, 1),
                         FAULT_OF(divergent_barrier, 1, 1),
                         FAULT_OF(deadlock, 1, 1),
                         FAULT_OF(unfinished_shuffle, 1, 1),
                         FAULT_OF(mixed_operations, 1, 1),
                         FAULT_OF(lane_outside_mask, 1, 1),
                         FAULT_OF(unaligned_mma, 1, 1),
                         FAULT_OF(failed_check, 1, 1),
                         FAULT_OF(missing_copy_wait, 1, 1),
                         FAULT_OF(early_refill, 1, 1),
                         FAULT_OF(copy_in_flight_at_exit, 1, 1),
                         FAULT_OF(misaligned_copy, 1, 1),
                         FAULT_OF(misaligned_ldmatrix, 1, 1),
                         WARPGROUP_FAULT_OF(missing_proxy_fence),
                         WARPGROUP_FAULT_OF(missing_tile_barrier),
                         WARPGROUP_FAULT_OF(missing_wgmma_wait),
                         WARPGROUP_FAULT_OF(short_wgmma_wait),
                         WARPGROUP_FAULT_OF(missing_wgmma_fence),
                         WARPGROUP_FAULT_OF(accumulator_in_flight),
                         WARPGROUP_FAULT_OF(early_tile_write),
                         WARPGROUP_FAULT_OF(divergent_warpgroup),
                         WARPGROUP_FAULT_OF(unfinished_warpgroup),
                         WARPGROUP_FAULT_OF(wgmma_in_flight_at_exit),
                         WARPGROUP_FAULT_OF(misaligned_tile),
                         FAULT_OF(block_race, 2, 1),
                         FAULT_OF(missing_producer_fence, 2, 1),
                         FAULT_OF(missing_consumer_fence, 2, 1),
                         FAULT_OF(late_fence, 2, 1),
                         FAULT_OF(endless_spin, 2, 1),
                         FAULT_OF(cluster_first_sync, 2, 2),
                         FAULT_OF(cluster_last_sync, 2, 2),
                         FAULT_OF(cluster_rank_bounds, 2, 2),
                         FAULT_OF(cluster_remote_race, 2, 2)};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const Fault& f : kFaults) names.push_back(f.name);
  return names;
}

std::vector<float> run_fault(const std::string& name, bool faulty) {
  for (const Fault& f : kFaults) {
    if (f.name != name) continue;
    // Heap blocks of the exact size: the sanitizer guards both ends.
    std::unique_ptr<float, Free> in(static_cast<float*>(std::aligned_alloc(256, kOut * sizeof(float))));
    std::unique_ptr<float, Free> out(static_cast<float*>(std::aligned_alloc(256, kOut * sizeof(float))));
    for (int i = 0; i < kOut; ++i) in.get()[i] = static_cast<float>(i);
    for (int i = 0; i < kOut; ++i) out.get()[i] = std::numeric_limits<float>::quiet_NaN();
    int32_t flags[4] = {};
    const Args args = {out.get(), in.get(), flags};
    const Status status =
        launch_cluster(faulty ? f.wrong : f.right, dim3(f.grid), dim3(f.block), f.cluster, kOut * sizeof(float), nullptr, args);
    if (!status.ok()) throw std::runtime_error(status.message);
    return std::vector<float>(out.get(), out.get() + kOut);
  }
  throw std::invalid_argument("no fault is called " + name);
}

}  // namespace testing
}  // namespace tokensieve

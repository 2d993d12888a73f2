// The one front header of a kernel file. Under nvcc it is CUDA; under a plain C++ compiler it is the host SIMT runtime of testing/simt,
// so the same kernel source runs, schedule by schedule, without a GPU. Rules for kernel authors that follow from it:
//  - no <<<>>>, __shared__, inline asm, cooperative groups, CUB, __noinline__ (SIMT_NOINLINE) or __activemask();
//  - every instruction without a CUDA C++ name goes through a wrapper of ptx.h;
//  - spin loops contain __nanosleep and read their flag with load_acquire or an atomic;
//  - publish: __syncthreads(); one thread: __threadfence(); atomic. Consume: atomic; __threadfence(); __syncthreads();
//  - every thread of a block calls the same __syncthreads line; masks name the lanes that really arrive;
//  - 16-bit floats: convert to float, compute, convert back (most other half functions do not exist on the host);
//  - kernels are at least in a named namespace, parameters are passed by value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// SIMT_SHARED(float, tile, [16][33]); or SIMT_SHARED(int, count); A type with a comma needs an alias.
#define SIMT_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// type* name = the dynamic shared memory of the launch, 128-byte aligned.
#define SIMT_DYN_SHARED(type, name)                                           \
  extern __shared__ __align__(128) unsigned char tokensieve_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(tokensieve_dynamic_shared)
// type* name = `count` elements of the dynamic shared memory from byte `offset` on. Under the emulator a block of its own, so that a step
// over its end is one that AddressSanitizer sees.
#define SIMT_CARVE(type, name, offset, count)                                 \
  extern __shared__ __align__(128) unsigned char tokensieve_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(tokensieve_dynamic_shared + (offset))
#define SIMT_NOINLINE __noinline__
#else
#include "testing/simt/cuda_names.h"
#endif

namespace tokensieve {
namespace simt {

constexpr size_t kMaxSharedBytes = 227 * 1024;  // opt-in limit of sm_90; smaller cards refuse at launch
constexpr unsigned kFullMask = 0xffffffffu;

// What both sides refuse, so that a launch that the emulator accepts is one that a GPU takes.
inline const char* launch_error(dim3 grid, dim3 block, int cluster, size_t smem) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return "launch: a block needs 1 to 1024 threads";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "launch: the grid is empty";
  if (grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u) return "launch: the grid exceeds (2^31-1, 65535, 65535)";
  if (smem > kMaxSharedBytes) return "launch: more than 227 KiB of dynamic shared memory";
  if (cluster < 1 || cluster > 16) return "launch: a cluster has 1 to 16 blocks";
  if (grid.x % static_cast<unsigned>(cluster) != 0) return "launch: grid.x is not a multiple of the cluster";
  return nullptr;
}

#if defined(__CUDACC__)
// Lets the kernel have `bytes` of dynamic shared memory on the current device. The limit goes up once, to all that its static arrays leave:
// with the bytes of each launch, a thread about to launch a large one could find the limit that another has just set for a small one.
template <typename... Params>
cudaError_t opt_in(void (*kernel)(Params...), size_t bytes) {
  cudaFuncAttributes now = {};
  if (const cudaError_t error = cudaFuncGetAttributes(&now, kernel); error != cudaSuccess) return error;
  if (now.maxDynamicSharedSizeBytes >= 0 && static_cast<size_t>(now.maxDynamicSharedSizeBytes) >= bytes) return cudaSuccess;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess) {
    return error;
  }
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - static_cast<int>(now.sharedSizeBytes));
}

// Launches on `stream`; `cluster` blocks along x share a cluster (1 = none). Reports refusals and launch errors, never synchronises.
template <typename... Params, typename... Args>
Status launch_cluster(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster, size_t smem, void* stream, Args... args) {
  if (const char* why = launch_error(grid, block, cluster, smem)) return Status::error(why);
  cudaError_t error = cudaSuccess;
  if (smem > 16 * 1024) error = opt_in(kernel, smem);  // above 48 KiB, the kernel's static arrays (up to 32 KiB) counted in
  if (error == cudaSuccess && cluster > 8) {           // more than 8 is not portable between cards
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (error == cudaSuccess) return Status::success();
  (void)cudaGetLastError();  // a refused launch is not sticky: leave no error behind for the next caller
  return Status::error(cudaGetErrorString(error));
}
#else
template <typename... Params, typename... Args>
Status launch_cluster(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster, size_t smem, void* /*stream*/, Args... args) {
  if (const char* why = launch_error(grid, block, cluster, smem)) return Status::error(why);
  auto body = [&] { kernel(static_cast<Params>(args)...); };
  host::run_grid([](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body, grid, block, cluster, smem);
  return Status::success();
}
#endif

template <typename... Params, typename... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, void* stream, Args... args) {
  return launch_cluster(kernel, grid, block, 1, smem, stream, args...);
}

}  // namespace simt
}  // namespace tokensieve

#include "device/ptx.h"
#include "device/tile.h"
#include "device/wgmma.h"

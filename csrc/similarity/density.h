// knn_density and nearest_center: how dense the neighbourhood of every token is, how far the next denser token, and which centre is nearest.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/device_info.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "core/status.h"

namespace tokensieve {

// Strides count elements; the last dimension is contiguous.
struct DensityParams {
  const void* x = nullptr;        // [B, N, C] dtype
  const float* noise = nullptr;   // [B, N] contiguous; 1e-6 of it is added to the density; may be null
  const uint8_t* mask = nullptr;  // [B, N] bool, false = padding; may be null
  float* density = nullptr;       // [B, N]
  float* distance = nullptr;      // [B, N], to the nearest denser token
  void* workspace = nullptr;      // plan.workspace_bytes, 64-byte aligned, contents undefined
  int64_t B = 0, N = 0, C = 0, k = 0;
  int64_t x_stride[2] = {};  // B, row
  int64_t mask_stride = 0;
  DType dtype = DType::kFloat32;
};

struct NearestParams {
  const void* x = nullptr;           // [B, N, C] dtype
  const int64_t* centers = nullptr;  // [B, K] contiguous: token ids, -1 = no centre
  int64_t* labels = nullptr;         // [B, N]: the centre's place in centers; -1 without any centre
  void* workspace = nullptr;
  int64_t B = 0, N = 0, C = 0, K = 0;
  int64_t x_stride[2] = {};  // B, row
  DType dtype = DType::kFloat32;
};

// Distances are Euclidean over sqrt(C). Products of rows (on the CPU and in float32 less the image's mean row) tell which tokens may be the
// nearest, within a bound of their rounding errors; sums of squared differences decide among those and are what is reported, ties to the
// lowest index (CUDA, k > 32: products alone choose the k nearest). So tokens that are nearly alike keep their order and their digits, and
// tokens of the same values are at 0. A token with a NaN or an infinity is at an infinite distance from all others: density 0 for k > 1.
//   density[i] = exp(-mean of the k smallest d(i, j)^2, i itself among them) + 1e-6 noise[i], 0 for padding
//   distance[i] = min over denser j of d(i, j), else the largest finite distance of the image; never more than that
// Denser: density[j] > density[i]; without noise also an equal one where j < i, so that of two nearest neighbours the first leads. Padding never is.
// Padding is as a neighbour at `far` = the largest finite distance of the batch + 1, which is then its image's largest distance too.

struct DensityPlan {
  bool store_distances = true;  // the N x N matrix of an image in the workspace; else strips of rows, computed twice
  int64_t workspace_bytes = 0;
  int64_t strip_rows = 0;  // CUDA: rows of the matrix of one image in hand, where not all of it is stored
  int64_t bytes_moved = 0;
  int64_t flops = 0;
};

struct NearestPlan {
  int64_t workspace_bytes = 0;
  int64_t bytes_moved = 0;
  int64_t flops = 0;
};

DensityPlan density_plan_cpu(const DensityParams& params);
DensityPlan density_plan_cuda(const DensityParams& params, const DeviceInfo& device);
Status density_cpu(const DensityParams& params, const DensityPlan& plan, CpuLevel level, ParallelForFn threads);
Status density_cuda(const DensityParams& params, const DensityPlan& plan, void* stream);
NearestPlan nearest_plan_cpu(const NearestParams& params);
NearestPlan nearest_plan_cuda(const NearestParams& params, const DeviceInfo& device);
Status nearest_cpu(const NearestParams& params, const NearestPlan& plan, CpuLevel level, ParallelForFn threads);
Status nearest_cuda(const NearestParams& params, const NearestPlan& plan, void* stream);

}  // namespace tokensieve

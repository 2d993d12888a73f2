// Pooling as its CUDA kernels see it. Internal to the room.
#pragma once

#include "merge/pool_args.h"

namespace tokensieve {
namespace pool {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLaneVectors = 2;            // vectors of a row that a lane holds at once
constexpr int kChunk = 32 * kLaneVectors;  // vectors of a row that a warp holds at once: 1 KB
constexpr int kMeansLanes = 8;             // means: lanes that share a token's 128 bytes
constexpr int kMeansGroups = kThreads / kMeansLanes;
constexpr int kMeansFrames = 8;  // frames between two barriers
constexpr int kMeansTokens = 4;  // tokens of a thread where tokens abound

using Axis = PoolAxisOf<int>;

// Rows of vectors, cut into `splits` parts of `part` vectors: a warp takes one.
struct Rows {
  int64_t count = 0;                    // parts of all rows
  int units = 0, splits = 1, part = 0;  // vectors of a row
};

struct PoolArgs {
  const void *x = nullptr, *grad = nullptr, *forward = nullptr;  // forward: the result, for gradients
  void* out = nullptr;                                           // of the gradient: that of x, or null
  const float* scores = nullptr;
  float* scores_grad = nullptr;
  int64_t stride_b = 0, stride_n = 0;  // elements, of x
  Axis axes[3];
  Rows rows;  // of the output
  int N = 0, R = 0, window = 1;
  float temperature = 1.0f;
  PoolKind kind = PoolKind::kMean;
  bool adaptive = false;
};

struct RunsArgs {
  const void* x = nullptr;  // of the gradient: the incoming one, [B, R, C]
  void* out = nullptr;
  const int64_t* starts = nullptr;
  int64_t stride_b = 0, stride_n = 0, starts_stride = 0;
  Rows rows;
  int64_t length = 0, kept = 0, stride = 1;  // a run's tokens, and the means that are left of it
  int S = 0, R = 0, images = 0;
};

struct MeansArgs {
  const void *x = nullptr, *rows_grad = nullptr, *columns_grad = nullptr;
  void *rows = nullptr, *columns = nullptr, *x_grad = nullptr;
  float* partial = nullptr;  // [slices, B * T, C], where there are several slices of the tokens
  int64_t stride_b = 0, stride_t = 0, stride_n = 0, C = 0;
  Rows grad_rows;
  int B = 0, T = 0, N = 0;
  int units = 0, chunks = 0, slices = 1;  // vectors of a token, blocks that share them, blocks that share the tokens
};

// Return a refusal, or null.
const char* pool_args(const PoolParams& p, const PoolPlan& plan, bool grad, PoolArgs& out);
const char* runs_args(const RunsParams& p, const PoolPlan& plan, bool grad, RunsArgs& out);
const char* means_args(const MeansParams& p, const PoolPlan& plan, bool grad, MeansArgs& out);

}  // namespace pool
}  // namespace tokensieve

// Scores of all query rows on CUDA: what the launchers hand to the kernels of colsum_kernel.cuh. Internal to the room.
#pragma once

#include "core/device_info.h"
#include "score/score.h"

namespace tokensieve {
namespace colsum {

constexpr int kThreads = 128;  // 4 warps, each with its own rows of the stationary tile
constexpr int kWarps = kThreads / 32;
constexpr int kCols = 64;  // rows of a streamed tile

// Steps of 16 elements of D that a kernel is compiled for; float32 loops over D and has one.
constexpr int kStepChoices[] = {4, 5, 8, 16};
constexpr int64_t kMaxDim = 256;
// 16-row tensor-core tiles a warp holds: 64 rows (up to 128 registers of fragments) where D <= 128, else 32; float32: 16.
constexpr int row_tiles(int steps) { return steps == 0 ? 1 : steps <= 8 ? 4 : 2; }
constexpr int stationary_rows(int steps) { return kWarps * 16 * row_tiles(steps); }
// 8 lanes read 2 rows x 64 bytes at once: rows of a streamed tile lie 64 bytes apart modulo the 128 bytes of all banks.
constexpr int tile_row_bytes(int steps) { return (steps + 1) / 2 * 64 % 128 == 0 ? (steps + 1) / 2 * 64 + 64 : (steps + 1) / 2 * 64; }
// float32: both operands in shared memory, rows 16 bytes apart modulo all banks.
constexpr int64_t float_row_bytes(int64_t D) { return (D + 31) / 32 * 128 + 16; }
constexpr int float_cols(int64_t D) { return D <= 64 ? 64 : 32; }
constexpr int steps_of(DType dtype, int64_t D) {
  if (dtype == DType::kFloat32) return 0;
  for (int steps : kStepChoices) {
    if (D <= 16 * steps) return steps;
  }
  return 16;
}
constexpr int64_t shared_bytes(DType dtype, int64_t D) {
  const int steps = steps_of(dtype, D);
  return steps > 0 ? 2 * kCols * tile_row_bytes(steps) : (stationary_rows(0) + 2 * float_cols(D)) * float_row_bytes(D);
}

// Strips: a warp holds 64 keys, a block all of them.
constexpr int kStripKeys = 64;
constexpr int max_strip_warps(int steps) { return steps <= 4 ? 10 : 12; }  // 204 or 168 registers a thread
constexpr int strip_rows(int steps) { return steps <= 4 ? 16 : 8; }        // query rows of a strip, whose accumulators are alive twice
constexpr int64_t strip_shared_bytes(int steps) { return 2 * kCols * tile_row_bytes(steps); }

// On the warpgroup tensor cores (colsum_wgmma_tiles.cuh): two warpgroups of 128 stationary rows, four buffers of 64 streamed ones.
constexpr int kWgmmaThreads = 256;
constexpr int kWgmmaRows = stationary_rows(8);    // as row_kernel and column_kernel: one plan serves both
constexpr int kWgmmaStages = kWgmmaRows / kCols;  // the stationary rows pass through the buffers first
constexpr int kWgmmaSteps = 8;
constexpr int kPanelBytes = kCols * 128;  // 64 elements of D of all rows of a tile
constexpr int kSwizzleAlign = 1024;
constexpr int wgmma_tile_bytes(int steps) { return (steps + 3) / 4 * kPanelBytes; }
constexpr int64_t wgmma_shared_bytes(int steps) { return kWgmmaStages * wgmma_tile_bytes(steps) + kSwizzleAlign; }

struct Args {
  ScoreParams p;
  const float* weights = nullptr;  // of row (b, h, l) at b * weight_stride[0] + h * weight_stride[1] + l; null = 1
  int64_t weight_stride[2] = {};
  float factor = 1.0f;                // of every weight
  const uint8_t* key_mask = nullptr;  // [B, N], rows key_mask_stride apart: scores of keys that are 0 here are 0; may be null
  int64_t key_mask_stride = 0;
  float* stats = nullptr;        // [B, H, L, 2]: maximum in units of log2, 1 / sum of 2^(x - maximum); maximum -inf: the row sees nothing
  float* split_stats = nullptr;  // [row_splits, B, H, L, 2]: maximum, sum of the keys of a split; null where row_splits = 1
  float* partial = nullptr;      // linear: [Hkv x col_splits, B, R]; per head: [col_splits, B, H, R], then the counts alike
  int row_tiles = 0, row_splits = 1;     // first sweep: tiles of query rows, of which each is split over the keys
  int key_tiles = 0, col_splits = 1;     // second sweep: tiles of keys, of which each is split over the query rows
  int64_t scan_begin = 0, scan_end = 0;  // first sweep: the keys that the normaliser covers
  int rows_per_split = 0;                // strips: query rows of a block
  bool per_head = false;                 // partial results of every head (else the block's heads are added in its registers)
  bool wide_loads = false;               // every row is 16-byte aligned and D a multiple of 16 bytes
  bool with_lse = false;                 // the second sweep also copies lse_in to lse_out
  bool wgmma = false;                    // the kernels on warpgroups where rows are aligned (first sweep: and there is no bias)
};

// Softmax, sums over rows, no bias: the lean instantiation. Everything else: the general one.
inline bool is_lean(const ScoreParams& p) {
  return p.bias == nullptr && p.activation == Activation::kSoftmax && p.query_reduction != Reduction::kMax &&
         p.query_reduction != Reduction::kVisibleMean;
}
// Sums over rows and heads are one sum, whose weights go into the row table. Otherwise each head is finished by itself.
inline bool is_linear(const ScoreParams& p) {
  const bool rows = p.query_reduction == Reduction::kMean || p.query_reduction == Reduction::kSum;
  return rows && (p.head_reduction == Reduction::kMean || p.head_reduction == Reduction::kSum);
}

// One instantiation per element type and number of steps (inst/).
template <typename T, int kSteps>
Status launch_rows(const Args& args, int64_t smem_bytes, void* stream);  // first sweep: normalisers
template <typename T, int kSteps>
Status launch_columns(const Args& args, int64_t smem_bytes, void* stream);  // second sweep: scores

template <typename T, int kSteps>
Status launch_wgmma_rows(const Args& args, void* stream);  // the same two, for what takes_wgmma
template <typename T, int kSteps>
Status launch_wgmma_columns(const Args& args, void* stream);

template <typename T, int kSteps>
Status launch_strips(const Args& args, int warps, void* stream);  // leaves partial results
Status launch_finish(const Args& args, void* stream);             // of them: the scores (colsum_cuda.cu)

// A bool bias of the keys alone hides them from every row: a mask of keys, left to the last step.
inline bool hides_keys(const ScoreParams& p) {
  const bool sums = p.query_reduction == Reduction::kMean || p.query_reduction == Reduction::kSum;
  return p.bias != nullptr && p.bias_dtype == DType::kBool && p.bias_stride[1] == 0 && p.bias_stride[2] == 0 && p.bias_stride[3] == 1 &&
         sums && p.activation == Activation::kSoftmax;
}

// Lean, once a mask of keys is left to the last step.
inline bool takes_wgmma(const ScoreParams& p) {
  const int steps = steps_of(p.dtype, p.D);
  return steps > 0 && steps <= kWgmmaSteps && (is_lean(p) || hides_keys(p));
}

// By element type and D (colsum_cuda.cu).
Status run_rows(const Args& args, void* stream);
Status run_columns(const Args& args, void* stream);
Status score_two_pass(const ScoreParams& p, const ScorePlan& plan, void* stream);
Status score_strip(const ScoreParams& p, const ScorePlan& plan, void* stream);

// colsum_plan_cuda.cpp: the plan of kTwoPass; false where the kernels do not take the shape, or the few-row ones are better at it.
bool plan_two_pass(const ScoreParams& p, const DeviceInfo& device, ScorePlan& plan);
bool plan_strip(const ScoreParams& p, const DeviceInfo& device, ScorePlan& plan);
void plan_strip_sizes(const ScoreParams& p, ScorePlan& plan);
bool plan_sweeps(const ScoreParams& p, const DeviceInfo& device, ScorePlan& plan);  // false only where they do not take it
// Fills workspace and semaphores from row_splits and col_splits (tests force those).
void plan_two_pass_sizes(const ScoreParams& p, ScorePlan& plan);
// Sizes of the workspace's parts, in floats.
struct Parts {
  int64_t stats = 0, split_stats = 0, partial = 0;
};
Parts two_pass_parts(const ScoreParams& p, int64_t row_splits, int64_t col_splits);
// The fields of Args that follow from them.
Args make_args(const ScoreParams& p, int64_t row_splits, int64_t col_splits);

}  // namespace colsum
}  // namespace tokensieve

// Merging as its CUDA kernels see it. Internal to the room.
#pragma once

#include "merge/merge.h"

namespace tokensieve {
namespace merge {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLongLanes = 8;                   // lanes that share a token of a long row: 128 bytes of 16-byte vectors
constexpr int64_t kMaxSharedTokens = 32 << 10;  // 128 KB; longer lists live in the workspace

struct MergeArg {
  const char* src = nullptr;
  char* dst = nullptr;
  const char *grad = nullptr, *out = nullptr;
  int64_t b = 0, n = 0, m = 0;  // bytes, of src
  int64_t row = 0;              // bytes of a token
  int segments = 1, units = 0;  // M, and vectors in a segment
  int vector = 16, lanes = 32;  // 16 bytes or one element; lanes (a power of two) share a token
  MergeType type = MergeType::kFloat32;
};

struct MergeArgs {
  MergeArg tensors[kMaxMergeTensors];
  int num_tensors = 0;
  const int64_t *inverse = nullptr, *from = nullptr, *own = nullptr;
  const float *weights = nullptr, *size = nullptr, *total_grad = nullptr;
  float *total = nullptr, *log_total = nullptr, *weight_grad = nullptr;
  float *divisor = nullptr, *count = nullptr;  // [B, R], of the gradient of means: what the first launch leaves to the second
  int* lists = nullptr;                        // [blocks, N], or null: the lists are in shared memory
  int64_t inverse_stride = 0, from_stride = 0, own_stride = 0;
  int64_t rows = 0;
  int N = 0, R = 0, K = 0;
  int blocks_per_row = 1, rows_per_block = 0, tokens_per_block = 0, column_blocks = 0;
  float epsilon = 0.0f;
  MergeMode mode = MergeMode::kSum;
  bool complement = false;
};

// Shared memory of a block that lists `rows` output rows of N tokens, in ints.
struct MergeShared {
  int start = 0, cursor = 0, divisor = 0, kept = 0, list = 0, ints = 0;
};

constexpr int up_to_four(int ints) { return (ints + 3) / 4 * 4; }

constexpr MergeShared merge_shared(const MergeArgs& a) {
  MergeShared at;
  at.cursor = up_to_four(a.rows_per_block + 1);
  at.divisor = at.cursor + up_to_four(a.rows_per_block);
  at.kept = at.divisor + up_to_four(a.rows_per_block);
  at.list = at.kept + (a.complement ? up_to_four((a.N + 31) / 32) : 0);
  at.ints = at.list + (a.lists == nullptr ? up_to_four(a.N) : 0);
  return at;
}

// Returns a refusal, or null.
const char* merge_args(const MergeParams& p, const MergePlan& plan, bool grad, MergeArgs& out);

}  // namespace merge
}  // namespace tokensieve

// gather_tokens as its kernels see it: tensors with their widest load and the lanes that share a token. Internal to the room.
#pragma once

#include "select/gather.h"

namespace tokensieve {
namespace select {

constexpr int64_t kMaxSlotsPerBlock = 8192;  // 32 KB of token numbers in shared memory: below the 48 KB that need no opt-in

struct CopyTensor {
  const char* src = nullptr;
  char* dst = nullptr;
  int64_t src_b = 0, src_n = 0, src_m = 0;  // bytes
  int64_t dst_row = 0;                      // bytes of a token
  int segments = 1, units = 0;              // M, and vectors of `vector` bytes in a segment
  int vector = 1, lanes = 1;                // lanes (a power of two) share a token
};

struct CopyArgs {
  CopyTensor tensors[kMaxGatherTensors];
  int num_tensors = 0;
  const int64_t* index = nullptr;
  int64_t index_stride = 0, N = 0, K = 0;
  int slots = 0;  // output tokens of a batch row
  int blocks_per_row = 1, slots_per_block = 0;
};

// Widest of 16, 8, 4, 2, 1 bytes that divides every address of a tensor.
int vector_bytes(const GatherParams& p, const GatherTensor& t, bool scatter);

// slots = K (gather, topk_gather) or N (scatter). Returns a refusal, or null.
const char* copy_args(const GatherParams& p, const GatherPlan& plan, bool scatter, CopyArgs& out);

}  // namespace select
}  // namespace tokensieve

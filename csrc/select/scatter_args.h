// scatter_tokens as its kernels see it: tensors with their widest load and the lanes that share a token. Internal to the room.
#pragma once

#include "select/scatter.h"

namespace tokensieve {
namespace select {

constexpr int64_t kMaxScatterSlots = 8192;  // 32 KB of value numbers in shared memory: below the 48 KB that need no opt-in

struct ScatterSide {
  const char* at = nullptr;
  int64_t b = 0, n = 0, m = 0;  // bytes
};

struct ScatterArg {
  ScatterSide base, value;
  char* dst = nullptr;
  int64_t dst_row = 0;          // bytes of a token
  int segments = 1, units = 0;  // M, and vectors of `vector` bytes in a segment
  int vector = 1, lanes = 1;    // lanes (a power of two) share a token; an addition's vector is 16 bytes or one element
  DType dtype = DType::kFloat32;
};

struct ScatterArgs {
  ScatterArg tensors[kMaxScatterTensors];
  int num_tensors = 0;
  const int64_t* index = nullptr;
  const float* weights = nullptr;
  float* weight_grad = nullptr;
  int64_t index_stride = 0, N = 0, K = 0;
  int blocks_per_row = 1, slots_per_block = 0;
  bool add_to_weight_grad = false;
};

// grad: the tensors are those of scatter_grad. Returns a refusal, or null.
const char* scatter_args(const ScatterParams& p, const ScatterPlan& plan, bool grad, ScatterArgs& out);

}  // namespace select
}  // namespace tokensieve

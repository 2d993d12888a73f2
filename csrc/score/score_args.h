// What score_cuda hands to its kernel: the caller's parameters and what the plan decided. Internal to the room.
#pragma once

#include "score/score.h"

namespace tokensieve {
namespace score {

constexpr int kMaxRows = 64;                 // query rows of a pass: 8 tensor-core tiles of 8
constexpr int kMaxThreads = 512;             // 128 registers a thread: 32 of key fragments, up to 16 of accumulators
constexpr int kMaxThreadsWide = 384;         // 168 registers with the 32 accumulators of 33 to 64 rows; at 128 sm_80 spills
constexpr int64_t kMaxDim = 2048;            // a longer row of queries would leave no room for logits
constexpr int kKeyTile = 16;                 // keys of one mma; chunk_keys is a multiple
constexpr int64_t kStaticShared = 8 * 1024;  // what the kernel declares itself (6.6 KB), rounded up

enum class Mode : int {
  kWhole,  // the row's keys are this block's (or cluster's) chunks: statistics, exchange, scores in one launch
  kStats,  // first sweep of kSplit: maximum and sum of every chunk to the workspace
  kApply,  // second sweep, or the only one where the caller gives the normaliser
};

struct Args {
  ScoreParams p;
  Mode mode = Mode::kWhole;
  int chunk_keys = 0, num_chunks = 0, rows_per_pass = 0, padded_rows = 0;
  int stats_chunks = 0;                  // chunks that wrote `stats`; 0 = the normaliser is p.lse_in
  int64_t scan_begin = 0, scan_end = 0;  // the keys that the chunks cover
  float* stats = nullptr;                // [B, Hkv, rows, stats_chunks, 2]: maximum, sum of exp(s - maximum)
  float* partial = nullptr;              // [B, Hkv, L or 1, R]: scores of each key head's group, before the reduction over key heads
  bool wide_loads = false;               // every query... key row is 16-byte aligned and D a multiple of 16 bytes
};

// Shared layout, in bytes: [query rows][logits][carry]. Rows are padded so that a warp's accesses fall into different banks.
constexpr int64_t padded_dim(int64_t D, int64_t element_bytes) { return element_bytes == 4 ? (D + 15) / 16 * 16 : (D + 31) / 32 * 32; }
// Eight lanes read 2 rows x 64 bytes at once: rows must lie 64 bytes apart modulo the 128 bytes of all banks.
constexpr int64_t query_row_bytes(int64_t D, int64_t element_bytes) {
  const int64_t bytes = padded_dim(D, element_bytes) * element_bytes;
  return bytes % 128 == 0 ? bytes + 64 : bytes;
}
// Accumulators of rows 2t, 2t + 1 and keys g, t < 4, g < 8, are stored at once: 2 x stride must be 8 modulo 32.
constexpr int64_t logit_stride(int64_t chunk_keys) { return chunk_keys + 4; }
constexpr int row_tiles(int64_t rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8; }
constexpr int max_threads(int tiles) { return tiles == 8 ? kMaxThreadsWide : kMaxThreads; }
constexpr int64_t padded_rows(int64_t rows, int64_t element_bytes) { return element_bytes == 4 ? (rows + 7) / 8 * 8 : row_tiles(rows) * 8; }
// What a key carries from one pass to the next: sums of rows and of heads, and what a visible mean divides by.
constexpr int64_t carry_planes(const ScoreParams& p, int64_t rows_per_pass) {
  const int64_t rows = p.Hkv > 0 ? p.H / p.Hkv * p.L : 0;
  return rows <= rows_per_pass ? 0 : p.query_reduction == Reduction::kVisibleMean ? 3 : 2;
}
constexpr int64_t shared_bytes(const ScoreParams& p, int64_t chunk_keys, int64_t rows_per_pass) {
  const int64_t element = dtype_bytes(p.dtype), carry = carry_planes(p, rows_per_pass) * chunk_keys * 4;
  return padded_rows(rows_per_pass, element) * query_row_bytes(p.D, element) + rows_per_pass * logit_stride(chunk_keys) * 4 + carry;
}

// Fills workspace, semaphores, threads and shared memory from algo, chunk_keys, num_chunks and rows_per_pass (tests force those).
void score_plan_sizes(const ScoreParams& params, ScorePlan& plan);

// One instantiation per element type and number of row tiles (inst/); float32 loops over its tiles and has one.
template <typename T, int kRowTiles>
Status launch(const Args& args, int threads, int cluster, int64_t smem_bytes, void* stream);

}  // namespace score
}  // namespace tokensieve

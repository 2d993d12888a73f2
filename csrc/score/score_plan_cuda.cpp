// Plan of score_cuda: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "score/colsum_args.h"
#include "score/score_args.h"

namespace tokensieve {
namespace {

constexpr int64_t kTwoBlocksShared = 100 * 1024;  // two blocks of more do not fit the 228 KB of an sm_90 SM

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Largest number of rows a pass can hold beside its logits, from 64 down; 0 where not even one fits.
int64_t rows_that_fit(const ScoreParams& p, int64_t rows, int64_t chunk_keys, int64_t limit) {
  for (int64_t r = std::min<int64_t>(rows, score::kMaxRows); r > 0; --r) {
    if (score::shared_bytes(p, chunk_keys, r) <= limit) return r;
  }
  return 0;
}

int64_t scanned_keys(const ScoreParams& p) {
  const bool range_only = p.normalize == Normalize::kRange || p.lse_in != nullptr;
  return range_only ? p.range_end - p.range_begin : p.N;
}

// One launch: a cluster of up to 8 blocks (the portable size) holds all logits of a pass. Below sm_90 a "cluster" is one block.
bool plan_cluster(const ScoreParams& p, const DeviceInfo& device, int64_t rows, int64_t limit, ScorePlan& plan) {
  const int64_t scan = std::max<int64_t>(1, scanned_keys(p)), units = std::max<int64_t>(1, p.B * p.Hkv);
  const int64_t largest = device.compute_capability >= 90 ? 8 : 1;
  int64_t cluster = 1;
  // Grow until all SMs have a block; chunks below 128 keys (32 KB of D = 128 bf16 keys) cost more in barriers than they gain.
  while (cluster < largest && units * cluster < device.num_sms && ceil_div(scan, cluster * 2) >= 128) cluster *= 2;
  const int64_t least_passes = std::max<int64_t>(1, ceil_div(rows, score::kMaxRows));
  for (; cluster <= largest; cluster *= 2) {
    const int64_t chunk = round_up(ceil_div(scan, cluster), score::kKeyTile);
    const int64_t fit = rows_that_fit(p, std::max<int64_t>(1, rows), chunk, limit);
    // Every pass reads K again (from L2 when it fits). More than twice the least, and two sweeps of kSplit read less.
    if (fit == 0 || ceil_div(rows, fit) > 2 * least_passes) continue;
    if (cluster < largest && ceil_div(rows, fit) > least_passes) continue;
    // Without clusters one block streams all keys of a head: 0.1 TB/s. Only where heads fill the card, or the keys are few.
    if (largest == 1 && units < device.num_sms / 2 && scan > 1024) return false;
    plan.algo = ScoreAlgo::kCluster;
    plan.chunk_keys = chunk;
    plan.num_chunks = cluster;
    plan.rows_per_pass = fit;
    return true;
  }
  return false;
}

// Chunks of one head are independent blocks: two sweeps over the keys, or one where the normaliser is given.
void plan_split(const ScoreParams& p, const DeviceInfo& device, int64_t rows, int64_t limit, ScorePlan& plan) {
  const int64_t scan = std::max<int64_t>(1, scanned_keys(p)), units = std::max<int64_t>(1, p.B * p.Hkv);
  const int64_t wanted = std::max<int64_t>(1, 2 * device.num_sms / units);  // two blocks an SM hide each other's barriers
  int64_t chunk = std::max<int64_t>(128, round_up(ceil_div(scan, wanted), score::kKeyTile));
  chunk = std::min<int64_t>(chunk, round_up(scan, score::kKeyTile));
  int64_t full = std::min<int64_t>(std::max<int64_t>(1, rows), score::kMaxRows);
  // The query rows and the logits of 16 keys must fit: one head of D = 1024 (DAMRO) has 2 KB a row, and more than 8 rows of it may not.
  while (full > 1 && score::shared_bytes(p, score::kKeyTile, full) > limit / 2) full = (full + 1) / 2;
  while (chunk > score::kKeyTile && score::shared_bytes(p, chunk, full) > limit / 2) chunk = round_up(chunk / 2, score::kKeyTile);
  plan.algo = ScoreAlgo::kSplit;
  plan.chunk_keys = chunk;
  plan.num_chunks = ceil_div(scan, chunk);
  plan.rows_per_pass = full;
}

}  // namespace

// Everything that follows from algo, chunk_keys, num_chunks and rows_per_pass (tests force those).
void score::score_plan_sizes(const ScoreParams& p, ScorePlan& plan) {
  const int64_t rows = p.Hkv > 0 ? p.H / p.Hkv * p.L : 0, R = p.range_end - p.range_begin;
  const bool merge_heads = p.head_reduction != Reduction::kNone && p.Hkv > 1;
  const int64_t out_rows = p.query_reduction == Reduction::kNone ? p.L : 1;
  const int64_t stats = plan.algo == ScoreAlgo::kSplit && p.lse_in == nullptr ? p.B * p.Hkv * rows * plan.num_chunks * 8 : 0;
  plan.workspace_bytes = round_up(stats, 64) + (merge_heads ? p.B * p.Hkv * out_rows * R * 4 : 0);
  plan.num_semaphores = merge_heads ? p.B * plan.num_chunks : 0;
  plan.smem_bytes = score::shared_bytes(p, plan.chunk_keys, plan.rows_per_pass);
  // 16 warps an SM keep HBM busy (score_dots.cuh): two blocks of 8, or one of 16 where two do not fit; 33 to 64 rows take the registers for
  // one block of 12. No warp without a tile, 4 at least.
  const bool wide = dtype_bytes(p.dtype) == 2 && score::row_tiles(plan.rows_per_pass) == 8;
  const int64_t warps = wide ? score::kMaxThreadsWide / 32 : plan.smem_bytes > kTwoBlocksShared ? 16 : 8;
  plan.threads = static_cast<int>(32 * std::clamp<int64_t>(ceil_div(plan.chunk_keys, score::kKeyTile), 4, warps));
}

ScorePlan score_plan_cuda(const ScoreParams& p, const DeviceInfo& device) {
  ScorePlan plan;
  const int64_t rows = p.Hkv > 0 ? p.H / p.Hkv * p.L : 0, R = p.range_end - p.range_begin;
  const int64_t limit = device.smem_per_block - score::kStaticShared;
  if (!colsum::plan_strip(p, device, plan) && !colsum::plan_two_pass(p, device, plan)) {
    if (p.lse_in != nullptr || !plan_cluster(p, device, rows, limit, plan)) plan_split(p, device, rows, limit, plan);
    score::score_plan_sizes(p, plan);
  }
  const int64_t out_rows = (p.head_reduction == Reduction::kNone ? p.H : 1) * (p.query_reduction == Reduction::kNone ? p.L : 1);
  plan.bytes_moved = (p.B * p.Hkv * scanned_keys(p) * p.D + p.B * p.H * p.L * p.D) * dtype_bytes(p.dtype) + p.B * out_rows * R * 4;
  plan.flops = 2 * p.B * p.H * p.L * scanned_keys(p) * p.D;
  return plan;
}

}  // namespace tokensieve

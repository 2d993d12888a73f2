// Plan of the sweeps over all query rows: host arithmetic only, so it is tested without a GPU.
#include <algorithm>

#include "score/colsum_args.h"

namespace tokensieve {
namespace colsum {
namespace {

constexpr int64_t kStaticShared = 3 * 1024;       // what the kernels declare themselves (2.2 KB), rounded up
constexpr int64_t kWgmmaStaticShared = 4 * 1024;  // 3.2 KB

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace

Parts two_pass_parts(const ScoreParams& p, int64_t row_splits, int64_t col_splits) {
  Parts parts;
  const int64_t rows = p.B * p.H * p.L, R = p.range_end - p.range_begin;
  if (p.activation == Activation::kSoftmax && p.lse_in == nullptr && R > 0) parts.stats = round_up(2 * rows, 16);
  if (row_splits > 1 && p.lse_in == nullptr) parts.split_stats = 2 * rows * row_splits;
  const int64_t planes = is_linear(p) ? p.Hkv : p.query_reduction == Reduction::kVisibleMean ? 2 * p.H : p.H;
  parts.partial = planes * col_splits * p.B * R;
  return parts;
}

void plan_two_pass_sizes(const ScoreParams& p, ScorePlan& plan) {
  const int64_t rows = stationary_rows(steps_of(p.dtype, p.D));
  const Parts parts = two_pass_parts(p, plan.row_splits, plan.col_splits);
  plan.workspace_bytes = 4 * (parts.stats + std::max(parts.split_stats, parts.partial));
  plan.num_semaphores = std::max(plan.num_chunks * p.B, parts.split_stats > 0 ? ceil_div(p.L, rows) * p.B * p.H : 0);
}

void plan_strip_sizes(const ScoreParams& p, ScorePlan& plan) {
  plan.workspace_bytes = 4 * two_pass_parts(p, 1, plan.col_splits).partial;
  plan.num_semaphores = 0;
  plan.smem_bytes = strip_shared_bytes(steps_of(p.dtype, p.D));
}

// All keys in the registers of one block: one product and one exponential an element where the sweeps need two.
bool plan_strip(const ScoreParams& p, const DeviceInfo& device, ScorePlan& plan) {
  const int64_t R = p.range_end - p.range_begin, group = p.Hkv > 0 ? p.H / p.Hkv : 0, units = p.B * p.Hkv;
  const int64_t scan = p.normalize == Normalize::kRange ? R : p.N;
  const bool sums = p.query_reduction == Reduction::kMean || p.query_reduction == Reduction::kSum;
  const int steps = steps_of(p.dtype, p.D);
  if (group * p.L <= 128 || p.L < 32 || units == 0 || R <= 0) return false;
  if ((steps != 4 && steps != 5) || p.D > 80 || scan > max_strip_warps(steps) * kStripKeys) return false;
  if (!sums || p.activation != Activation::kSoftmax || p.lse_in != nullptr || (p.bias != nullptr && !hides_keys(p))) return false;
  plan.algo = ScoreAlgo::kStrip;
  plan.threads = static_cast<int>(32 * ceil_div(scan, kStripKeys));
  plan.chunk_keys = scan;
  plan.num_chunks = 1;
  // One block an SM. Splitting the rows fills the card and evens out the last round; every block costs about 48 rows of time to load keys.
  int64_t best = 0;
  for (int64_t splits = 1; splits <= ceil_div(p.L, 64); ++splits) {
    const int64_t rows = round_up(ceil_div(p.L, splits), 16), cost = ceil_div(units * splits, device.num_sms) * (group * rows + 48);
    if (best == 0 || cost < best) best = cost, plan.col_splits = splits, plan.rows_per_pass = rows;
  }
  plan.col_splits = ceil_div(p.L, plan.rows_per_pass);
  plan_strip_sizes(p, plan);
  return true;
}

bool plan_two_pass(const ScoreParams& p, const DeviceInfo& device, ScorePlan& plan) {
  const int64_t R = p.range_end - p.range_begin, group = p.Hkv > 0 ? p.H / p.Hkv : 0;
  // Up to 128 rows a group are two passes of the few-row kernels, bound by HBM; heads of fewer than 32 rows would fill half a tile.
  if (group * p.L <= 128 || p.L < 32) return false;
  // No keys to score: the first sweep alone computes the normalisers.
  if (R > 0 ? p.query_reduction == Reduction::kNone : p.lse_in != nullptr) return false;
  return plan_sweeps(p, device, plan);
}

bool plan_sweeps(const ScoreParams& p, const DeviceInfo& device, ScorePlan& plan) {
  const int64_t R = p.range_end - p.range_begin, group = p.Hkv > 0 ? p.H / p.Hkv : 0, smem = shared_bytes(p.dtype, p.D);
  if (p.D > kMaxDim || p.B * group * p.L * p.N == 0 || smem + kStaticShared > device.smem_per_block) return false;
  const int64_t rows = stationary_rows(steps_of(p.dtype, p.D)), slots = 2 * device.num_sms;
  plan.wgmma = device.wgmma && takes_wgmma(p) && wgmma_shared_bytes(kWgmmaSteps) + kWgmmaStaticShared <= device.smem_per_block;
  plan.algo = ScoreAlgo::kTwoPass;
  plan.threads = kThreads;
  plan.smem_bytes = smem;
  plan.rows_per_pass = kCols;
  plan.chunk_keys = rows;
  plan.num_chunks = ceil_div(R, rows);
  // Four blocks for every place of one, so that the last round and the causal diagonal cost little; four tiles a block at least.
  const int64_t scan = p.normalize == Normalize::kRange ? R : p.N;
  const int64_t row_blocks = p.B * p.H * ceil_div(p.L, rows), column_blocks = std::max<int64_t>(1, p.B * p.Hkv * plan.num_chunks);
  const int64_t row_slots = plan.wgmma && p.bias == nullptr ? device.num_sms : slots;  // one block of 256 threads an SM, or two of 128
  plan.row_splits = std::clamp<int64_t>(ceil_div(4 * row_slots, row_blocks), 1, std::max<int64_t>(1, scan / (4 * kCols)));
  const int64_t column_slots = plan.wgmma ? device.num_sms : slots;
  plan.col_splits = std::clamp<int64_t>(ceil_div(4 * column_slots, column_blocks), 1, std::max<int64_t>(1, group * p.L / (4 * kCols)));
  plan.col_splits = std::min(plan.col_splits, ceil_div(p.L, kCols));
  plan_two_pass_sizes(p, plan);
  return true;
}

}  // namespace colsum
}  // namespace tokensieve

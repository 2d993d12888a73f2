// Launch facts that select_topk and topk_gather share. Internal to the room.
#pragma once

#include "select/topk.h"

namespace tokensieve {
namespace select {

constexpr int64_t kTopkStaticShared = 9 * 1024;  // the kernel's own arrays (8.4 KB), rounded up
constexpr int kTileItems = 4;                    // tokens a thread takes of a tile that is not in registers
constexpr int64_t kHeldListBytes = 8 * 1024;     // beside held scores: topk_gather's slice of the list, 2048 tokens

constexpr int64_t sort_capacity(int64_t k) {
  int64_t size = 1;
  while (size < k) size *= 2;
  return size;
}

// Where the row's order words are between passes. items_per_thread = 0: shared memory where the plan's smem_bytes covers them.
enum class Hold { kRegisters, kShared, kNowhere };

constexpr int64_t held_bytes(int64_t N, int64_t threads) { return (N + threads * kTileItems - 1) / (threads * kTileItems) * threads * 16; }
constexpr int64_t sort_bytes(const TopkParams& p, const TopkPlan& plan) {
  return p.order == TopkOrder::kScore && plan.workspace_bytes == 0 ? sort_capacity(p.K) * 8 : 0;
}
constexpr Hold hold_of(const TopkParams& p, const TopkPlan& plan) {
  if (plan.items_per_thread > 0) return Hold::kRegisters;
  return plan.smem_bytes >= held_bytes(p.N, plan.threads) + sort_bytes(p, plan) ? Hold::kShared : Hold::kNowhere;
}

inline const char* topk_refusal(const TopkParams& p, const TopkPlan& plan) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 1024;  // positions of a partly empty tile still fit 32 bits
  if (p.N >= kLimit || p.B >= kLimit) return "B and N must be below 2^31 - 1024";
  if (p.K < 0 || p.K > p.N) return "K must be in [0, N]";
  if (p.order == TopkOrder::kScore && (p.prefix != 0 || p.suffix != 0)) return "prefix and suffix need order position";
  if (plan.threads < 32 || plan.threads > 1024 || plan.threads % 32 != 0) return "threads must be a multiple of 32 up to 1024";
  if (plan.items_per_thread != 0 && plan.items_per_thread != 4 && plan.items_per_thread != 16) {
    return "items_per_thread must be 0, 4 or 16";
  }
  if (plan.items_per_thread != 0 && int64_t{plan.threads} * plan.items_per_thread < p.N) return "the plan does not hold the row";
  return nullptr;
}

// Calls launch(TopkShape<items, hold>{}) with what the plan says as compile-time values.
template <int kItemsPerThread, Hold kHeld>
struct TopkShape {
  static constexpr int kItems = kItemsPerThread;
  static constexpr Hold kHold = kHeld;
};

template <typename Launch>
Status with_topk_shape(const TopkParams& p, const TopkPlan& plan, Launch&& launch) {
  if (plan.items_per_thread == 4) return launch(TopkShape<4, Hold::kRegisters>{});
  if (plan.items_per_thread == 16) return launch(TopkShape<16, Hold::kRegisters>{});
  if (hold_of(p, plan) == Hold::kShared) return launch(TopkShape<kTileItems, Hold::kShared>{});
  return launch(TopkShape<kTileItems, Hold::kNowhere>{});
}

}  // namespace select
}  // namespace tokensieve

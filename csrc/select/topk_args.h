// Launch facts that select_topk and topk_gather share. Internal to the room.
#pragma once

#include "select/topk.h"

namespace tokensieve {
namespace select {

constexpr int64_t kTopkStaticShared = 9 * 1024;  // the kernel's own arrays (8.4 KB), rounded up
constexpr int kRereadItems = 4;                  // tokens a thread takes of a tile that is not resident

constexpr int64_t sort_capacity(int64_t k) {
  int64_t size = 1;
  while (size < k) size *= 2;
  return size;
}

inline const char* topk_refusal(const TopkParams& p, const TopkPlan& plan) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 1024;  // positions of a partly empty tile still fit 32 bits
  if (p.N >= kLimit || p.B >= kLimit) return "select_topk: B and N must be below 2^31 - 1024";
  if (p.K < 0 || p.K > p.N) return "select_topk: K must be in [0, N]";
  if (p.order == TopkOrder::kScore && (p.prefix != 0 || p.suffix != 0)) return "select_topk: prefix and suffix need order position";
  if (plan.threads < 32 || plan.threads > 1024 || plan.threads % 32 != 0) return "select_topk: threads must be a multiple of 32 up to 1024";
  if (plan.items_per_thread != 0 && plan.items_per_thread != 4 && plan.items_per_thread != 16) {
    return "select_topk: items_per_thread must be 0, 4 or 16";
  }
  if (plan.items_per_thread != 0 && int64_t{plan.threads} * plan.items_per_thread < p.N)
    return "select_topk: the plan does not hold the row";
  return nullptr;
}

// Calls launch(T{}, items, resident) with the element type and the items of the plan as compile-time values.
template <int kItemsPerThread, bool kIsResident>
struct TopkShape {
  static constexpr int kItems = kItemsPerThread;
  static constexpr bool kResident = kIsResident;
};

template <typename Launch>
Status with_topk_shape(const TopkPlan& plan, Launch&& launch) {
  switch (plan.items_per_thread) {
    case 4:
      return launch(TopkShape<4, true>{});
    case 16:
      return launch(TopkShape<16, true>{});
    default:
      return launch(TopkShape<kRereadItems, false>{});
  }
}

}  // namespace select
}  // namespace tokensieve

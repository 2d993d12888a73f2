// Products of a warpgroup in the host SIMT runtime: computed when they are asked for, delivered by the wait, the accumulators garbage until
// then; with the checks on fences, waits and the four warps' steps.
#include <algorithm>
#include <cstring>

#include "testing/simt/state.h"
#include "testing/simt/wgmma_emulated.h"

namespace tokensieve {
namespace simt {
namespace host {
namespace {

constexpr size_t kAccumulatorBytes = 32 * sizeof(float);

struct ProductLane {
  float* acc;
  const uint32_t *a, *words;
  bool more;
  Loc place;
};

// The four warps of a warpgroup take the same steps, in their own time.
void agree(Block& block, int warp_index, Loc place) {
  const Quiet quiet;
  auto& steps = block.wgmma_steps[static_cast<size_t>(warp_index / 4)];
  const size_t mine = block.warps[static_cast<size_t>(warp_index)].wgmma_steps++;
  if (mine == steps.size()) steps.push_back(place);
  if (!same(steps[mine], place)) fail("wgmma: another warp of the warpgroup took this step at " + text(steps[mine]), place);
}

template <bool kBFloat16>
void run_wgmma(void* const lanes[32], uint32_t present) {
  if (present != 0xffffffffu) fail("wgmma: needs all 32 lanes, some have ended or do not exist", {"warp operation", 0});
  const auto lane_of = [&](int i) -> ProductLane& { return *static_cast<ProductLane*>(lanes[i]); };
  agree(*rt().current->block, rt().current->linear / 32, lane_of(0).place);
  float a[16][16], b[64][16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + i + 8 * (r / 2)] = half_of<kBFloat16>(lane_of(lane).a[r], i);
      for (int k = 0; k < 16; ++k) b[2 * lane + i][k] = half_of<kBFloat16>(lane_of(lane).words[8 * i + k / 2], k % 2);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const ProductLane& l = lane_of(lane);
    for (int i = 0; i < 32; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = l.more ? l.acc[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      l.acc[i] = sum;
    }
  }
}

constexpr WarpOp kWgmma[] = {{"wgmma<half>", true, false, run_wgmma<false>}, {"wgmma<bfloat16>", true, false, run_wgmma<true>}};

}  // namespace

void fence_async_shared() {
  Thread* self = rt().current;
  if (self->unfenced_copies) --self->block->unfenced_copiers;
  self->unfenced_copies = false;
}
void wgmma_fence() { rt().current->wgmma_fenced = true; }
void wgmma_commit() { ++rt().current->wgmma_groups; }

void wgmma_issue(float* acc, const uint32_t (&a)[4], const Product& product, bool more, bool bfloat16, Loc place) {
  Thread* self = rt().current;
  Block& block = *self->block;
  if (block.warps.size() % 4 != 0) fail("wgmma: the block has no whole warpgroups", place);
  if (block.unfenced_copiers > 0) fail("wgmma: cp.async has written to shared memory, and no fence_async_shared came after it", place);
  ProductLane lane{nullptr, a, product.words, more, place};
  {
    const Quiet quiet;
    auto chain = std::find_if(self->chains.begin(), self->chains.end(), [&](const Chain& c) { return c.acc == acc; });
    if (chain == self->chains.end()) {
      if (!self->wgmma_fenced) fail("wgmma: the thread has used its registers, and no wgmma_fence came after it", place);
      self->chains.push_back({acc, 0, {}});
      chain = self->chains.end() - 1;
      std::memcpy(chain->values, acc, kAccumulatorBytes);
      std::memset(acc, 0xFF, kAccumulatorBytes);  // garbage until the wait
    }
    chain->group = self->wgmma_groups;
    self->products.push_back(product);
    self->products.back().group = self->wgmma_groups;
    lane.acc = chain->values;
  }
  warp_collective(kWgmma[bfloat16 ? 1 : 0], 0xffffffffu, &lane, place);
}

const Product* wgmma_next(int pending_groups) {
  Thread* self = rt().current;
  self->wgmma_fenced = false;
  if (self->products.empty() || self->products.front().group >= self->wgmma_groups - pending_groups) return nullptr;
  return &self->products.front();
}
void wgmma_finish(const uint32_t (&words)[kTileWords], Loc place) {
  Thread* self = rt().current;
  if (std::memcmp(self->products.front().words, words, sizeof(words)) != 0) fail("wgmma: its tile changed before the wait", place);
  const Quiet quiet;
  self->products.erase(self->products.begin());
}
void wgmma_deliver(const float* acc, int pending_groups, Loc place) {
  Thread* self = rt().current;
  const Quiet quiet;
  for (size_t i = self->chains.size(); i-- > 0;) {
    const Chain& chain = self->chains[i];
    if (chain.group >= self->wgmma_groups - pending_groups) {
      if (chain.acc == acc) fail("wgmma_wait: the accumulators are still in flight", place);
      continue;
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(chain.acc);
    if (std::any_of(bytes, bytes + kAccumulatorBytes, [](unsigned char c) { return c != 0xFF; })) {
      fail("wgmma: an accumulator was written in flight", place);
    }
    std::memcpy(chain.acc, chain.values, kAccumulatorBytes);
    self->chains.erase(self->chains.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

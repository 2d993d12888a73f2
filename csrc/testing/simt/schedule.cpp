// Launch and scheduler of the host SIMT runtime: one fibre per CUDA thread of the resident blocks, switched where a thread has to wait.
#include <algorithm>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <utility>

#include "testing/simt/state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(SIMT_ASAN)
extern "C" {
void __asan_set_error_report_callback(void (*callback)(const char*));
void* __asan_get_report_address(void);
}
#endif

namespace tokensieve {
namespace simt {
namespace host {

Runtime* const runtime = new Runtime;

uint64_t next_random() {  // xorshift64*
  uint64_t& x = rt().random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return x * 0x2545F4914F6CDD1Dull;
}

// ---- the ready set --------------------------------------------------------------------------------------------------------
void set_ready(Thread* t) { rt().ready[t->ready_bit / 64] |= uint64_t{1} << (t->ready_bit % 64); }
void clear_ready(Thread* t) { rt().ready[t->ready_bit / 64] &= ~(uint64_t{1} << (t->ready_bit % 64)); }

namespace {

constexpr int kMaxResidentThreads = 16384;  // a cluster of 16 blocks of 1024
constexpr int kMaxTsanThreads = 8000;       // ThreadSanitizer knows 8,128 threads

int first_ready(int from) {  // lowest ready bit >= from, or -1
  const auto& words = rt().ready;
  size_t w = static_cast<size_t>(from) / 64;
  if (w >= words.size()) return -1;
  uint64_t word = words[w] & (~uint64_t{0} << (from % 64));
  while (word == 0) {
    if (++w == words.size()) return -1;
    word = words[w];
  }
  return static_cast<int>(w * 64) + __builtin_ctzll(word);
}
int last_ready(int to) {  // highest ready bit <= to, or -1
  if (to < 0) return -1;
  const auto& words = rt().ready;
  size_t w = static_cast<size_t>(to) / 64;
  uint64_t word = words[w] & (~uint64_t{0} >> (63 - to % 64));
  while (word == 0) {
    if (w-- == 0) return -1;
    word = words[w];
  }
  return static_cast<int>(w * 64) + 63 - __builtin_clzll(word);
}

// The thread that runs next; after a yield (`after` >= 0) the search starts behind the one that yielded, so spinning cannot starve others.
Thread* pick(int after) {
  Runtime& r = rt();
  const int bits = static_cast<int>(r.ready.size()) * 64;
  int bit = -1;
  switch (r.config.order) {
    case Order::kAscending:
      if (after >= 0) bit = first_ready(after + 1);
      if (bit < 0) bit = first_ready(0);
      break;
    case Order::kDescending:
      if (after >= 0) bit = last_ready(after - 1);
      if (bit < 0) bit = last_ready(bits - 1);
      break;
    case Order::kRandom:
      bit = first_ready(static_cast<int>(next_random() >> 33) % bits);
      if (bit < 0) bit = first_ready(0);
      break;
  }
  return bit < 0 ? nullptr : r.threads[static_cast<size_t>(bit)].get();
}

void enter(Thread* t) {
  rt().current = t;
  if (t == nullptr) return;
  threadIdx = t->index;
  blockIdx = t->block->index;
}
void switch_from(Thread* self, Thread* next) {  // next null: back to the launching thread
  Runtime& r = rt();
  ++r.stats.switches;
  enter(next);
  Fiber::switch_fibers(&self->fiber, next != nullptr ? &next->fiber : &r.main);
}
}  // namespace

void reschedule(int after) {
  Thread* self = rt().current;
  Thread* next = pick(after);
  if (next != self) switch_from(self, next);
}
void wait_here(const char* what, Loc place) {
  Thread* self = rt().current;
  self->waits_in = what;
  self->waits_at = place;
  clear_ready(self);
  reschedule(-1);  // no one can run: the launching thread reports the deadlock
  self->waits_in = nullptr;
}

// ---- launch ---------------------------------------------------------------------------------------------------------------
namespace {

void fiber_main() {
  Runtime& r = rt();
  Fiber::entered(&r.main);
  for (;;) {  // one round per block
    Thread* self = r.current;
    order_acquire(&r.launch_order);
    try {
      r.body(r.context);
      thread_finished(self);
    } catch (...) {
      r.error = std::current_exception();
    }
    order_release(&r.end_order);
    const bool stop = r.error != nullptr || self->block->cluster->alive == 0;
    switch_from(self, stop ? nullptr : pick(-1));
  }
}

void reset(Barrier& b) {
  b.waiting = nullptr;
  b.count = b.votes = 0;
}

void load_cluster(Cluster& cluster, uint64_t number, int first_bit) {
  Runtime& r = rt();
  const int extent = static_cast<int>(cluster.blocks.size());
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const uint64_t per_row = gridDim.x / static_cast<unsigned>(extent);
  cluster.alive = extent * threads;
  cluster.epoch = 0;
  reset(cluster.barrier);
  for (int rank = 0; rank < extent; ++rank) {
    Block& block = *cluster.blocks[static_cast<size_t>(rank)];
    block.index.x = static_cast<unsigned>(number % per_row) * static_cast<unsigned>(extent) + static_cast<unsigned>(rank);
    block.index.y = static_cast<unsigned>(number / per_row % gridDim.y);
    block.index.z = static_cast<unsigned>(number / per_row / gridDim.y);
    block.rank = rank;
    block.alive = threads;
    block.cluster = &cluster;
    block.first_bit = first_bit + rank * threads;
    block.mapped = false;
    for (Barrier& b : block.barriers) reset(b);
    block.warps.resize(static_cast<size_t>((threads + 31) / 32));
    for (size_t w = 0; w < block.warps.size(); ++w) {
      const int lanes = std::min(32, threads - static_cast<int>(w) * 32);
      block.warps[w].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
      block.warps[w].meetings.clear();
      block.warps[w].meetings.reserve(32);
      block.warps[w].wgmma_steps = 0;
    }
    block.unfenced_copiers = 0;
    block.wgmma_steps.assign((block.warps.size() + 3) / 4, {});
    block.shared.clear();
    block.shared.reserve(64);
    for (int i = 0; i < threads; ++i) {
      Thread& t = *r.threads[static_cast<size_t>(block.first_bit + i)];
      const unsigned u = static_cast<unsigned>(i);
      t.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
      t.block = &block;
      t.linear = i;
      t.finished = false;
      t.waits_in = nullptr;
      t.copies.clear();
      t.copy_groups.clear();
      t.uncommitted = 0;
      t.unfenced_copies = false;
      t.products.clear();
      t.chains.clear();
      t.wgmma_groups = 0;
      t.wgmma_fenced = false;
      t.fenced = false;
      t.observed.clear();
      t.observed.reserve(8);
#if defined(SIMT_TSAN)
      t.fiber.set_name(("block (" + text(block.index) + ") thread (" + text(t.index) + ")").c_str());
#endif
      set_ready(&t);
    }
  }
}

std::string deadlock_report() {
  Runtime& r = rt();
  std::string report = "deadlock: no thread can run.";
  for (auto& cluster : r.clusters) {
    for (auto& block : cluster->blocks) {
      std::map<std::string, std::vector<int>> groups;
      for (int i = 0; block->alive > 0 && i < static_cast<int>(blockDim.x * blockDim.y * blockDim.z); ++i) {
        const Thread& t = *r.threads[static_cast<size_t>(block->first_bit + i)];
        if (!t.finished) groups[std::string(t.waits_in != nullptr ? t.waits_in : "?") + " at " + text(t.waits_at)].push_back(i);
      }
      if (!groups.empty()) report += "\n  block (" + text(block->index) + "):";
      for (const auto& [where, ids] : groups) {
        report += "\n    " + std::to_string(ids.size()) + " thread(s) wait in " + where + ":";
        for (size_t i = 0; i < ids.size();) {
          size_t j = i;
          while (j + 1 < ids.size() && ids[j + 1] == ids[j] + 1) ++j;
          report += " " + std::to_string(ids[i]) + (j > i ? "-" + std::to_string(ids[j]) : "");
          i = j + 1;
        }
      }
    }
  }
  return report;
}

// After an error: the suspended threads are dropped, their stacks start anew, so that later launches work.
void abandon() {
  Runtime& r = rt();
  std::fill(r.ready.begin(), r.ready.end(), 0);
  for (auto& t : r.threads) {
    if (t->finished) continue;
    t->fiber.release_for(&r.main, &r.end_order);
    t->fiber.start(&fiber_main, t->ready_bit);
    t->finished = true;
  }
  order_acquire(&r.end_order);
  for (auto& cluster : r.clusters) {
    for (auto& block : cluster->blocks) free_shared(*block);
  }
}

void schedule(const std::vector<uint32_t>& order, uint64_t total, int threads_per_cluster) {
  Runtime& r = rt();
  uint64_t next = 0;
  for (;;) {
    bool busy = false;
    for (size_t c = 0; c < r.clusters.size(); ++c) {
      Cluster& cluster = *r.clusters[c];
      if (cluster.alive == 0) {
        for (auto& block : cluster.blocks) free_shared(*block);
        if (next == total) continue;
        const uint64_t number = order.empty() ? next : order[next];
        load_cluster(cluster, number, static_cast<int>(c) * threads_per_cluster);
        ++next;
      }
      busy = true;
    }
    if (!busy) return;
    Thread* t = pick(-1);
    if (t == nullptr) throw std::runtime_error("simt: " + deadlock_report());
    enter(t);
    Fiber::switch_fibers(&r.main, &t->fiber);
    enter(nullptr);
    if (r.error != nullptr) std::rethrow_exception(std::exchange(r.error, nullptr));
  }
}

#if defined(SIMT_ASAN)
void name_the_thread(const char*) {
  const Thread* t = rt().current;
  if (t == nullptr) return;
  std::fprintf(stderr, "simt: in block (%s) thread (%s)", text(t->block->index).c_str(), text(t->index).c_str());
  const auto* address = static_cast<unsigned char*>(__asan_get_report_address());
  for (const SharedArray& s : t->block->shared) {
    if (address + 64 < s.data || address > s.data + s.bytes + 64) continue;
    std::fprintf(stderr, ", byte %lld of the %zu bytes of shared array %s", static_cast<long long>(address - s.data), s.bytes, s.name);
  }
  std::fputc('\n', stderr);
}
#endif

}  // namespace

Config& config() { return rt().config; }
Stats& stats() { return rt().stats; }

void fail(const std::string& what, Loc place) {
  const Thread* t = rt().current;
  std::string message = "simt: " + what + " [" + place.file + (place.line > 0 ? ":" + std::to_string(place.line) : "") + "]";
  if (t != nullptr) message += " (block " + text(t->block->index) + " thread " + text(t->index) + ")";
  throw std::runtime_error(message);
}

void run_grid(void (*body)(void*), void* context, dim3 grid, dim3 block, int extent, size_t smem) {
  Runtime& r = rt();
  if (r.running) throw std::runtime_error("simt: a kernel cannot launch a kernel");
  const int threads = static_cast<int>(block.x * block.y * block.z) * extent;
  const uint64_t total = uint64_t{grid.x} * grid.y * grid.z / static_cast<unsigned>(extent);
#if defined(SIMT_TSAN)
  const int limit = kMaxTsanThreads;
#else
  const int limit = kMaxResidentThreads;
#endif
  if (threads > limit) throw std::runtime_error("simt: a cluster of " + std::to_string(threads) + " threads is too large to emulate");
  uint64_t resident = static_cast<uint64_t>(std::max(1, r.config.resident_blocks / extent));
  resident = std::min({resident, total, static_cast<uint64_t>(std::max(1, limit / threads))});

  r.body = body;
  r.context = context;
  r.dynamic_bytes = smem;
  r.stats = Stats();
  r.random = (r.config.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  r.idle_yields = 0;
  gridDim = grid;
  blockDim = block;
  r.main.adopt_current_thread();
#if defined(SIMT_ASAN)
  __asan_set_error_report_callback(&name_the_thread);
#endif
  while (r.threads.size() < resident * static_cast<uint64_t>(threads)) {
    r.threads.push_back(std::make_unique<Thread>());
    Thread& t = *r.threads.back();
    t.ready_bit = static_cast<int>(r.threads.size()) - 1;
    t.fiber.start(&fiber_main, t.ready_bit);
  }
  r.ready.assign((resident * static_cast<uint64_t>(threads) + 63) / 64, 0);
  r.clusters.clear();
  for (uint64_t c = 0; c < resident; ++c) {
    r.clusters.push_back(std::make_unique<Cluster>());
    for (int i = 0; i < extent; ++i) r.clusters.back()->blocks.push_back(std::make_unique<Block>());
  }
  std::vector<uint32_t> order;  // empty: 0, 1, 2, ...
  if (r.config.order != Order::kAscending) {
    for (uint64_t i = 0; i < total; ++i) order.push_back(static_cast<uint32_t>(total - 1 - i));
  }
  if (r.config.order == Order::kRandom) {
    for (uint64_t i = total; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }

  r.running = true;
  order_release(&r.launch_order);
  try {
    schedule(order, total, threads);
  } catch (...) {
    enter(nullptr);
    abandon();
    r.running = false;
    throw;
  }
  order_acquire(&r.end_order);
  r.running = false;
}

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

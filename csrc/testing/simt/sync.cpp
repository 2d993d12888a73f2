// Barriers, warp operations, shared memory, asynchronous copies and flags of the host SIMT runtime, with the checks on their use.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "testing/simt/state.h"

namespace tokensieve {
namespace simt {
namespace host {

// ---- barriers -------------------------------------------------------------------------------------------------------------
void release(Barrier& b) {
  Runtime& r = rt();
  b.result[b.phase & 1] = {b.votes, b.count};
  ++b.phase;
  b.votes = 0;
  r.idle_yields = 0;
  for (Thread* t = b.waiting; t != nullptr; t = t->next_waiting) set_ready(t);
  b.waiting = nullptr;
  b.count = 0;
}

namespace {

Votes arrive(Barrier& b, bool full, bool vote, const char* what, Loc place) {
  Thread* self = rt().current;
  const unsigned phase = b.phase & 1;
  order_release(&b.order[phase]);
  self->fenced = false;
  if (b.count++ == 0) b.place = place;
  self->next_waiting = b.waiting;
  b.waiting = self;
  b.votes += vote ? 1 : 0;
  if (full) {
    release(b);
    reschedule(-1);
  } else {
    wait_here(what, place);
  }
  order_acquire(&b.order[phase]);
  return b.result[phase];
}

void complete(Block& block, int warp_index, size_t which) {
  Warp& warp = block.warps[static_cast<size_t>(warp_index)];
  Meeting& meeting = warp.meetings[which];
  if (meeting.op->run != nullptr) meeting.op->run(meeting.arguments, meeting.arrived);
  if (meeting.op->orders_memory) ++warp.phase[__builtin_ctz(meeting.mask)];
  const int first = block.first_bit + 32 * warp_index;
  for (uint32_t left = meeting.arrived; left != 0; left &= left - 1) {
    set_ready(rt().threads[static_cast<size_t>(first + __builtin_ctz(left))].get());
  }
  if (&meeting != &warp.meetings.back()) meeting = warp.meetings.back();
  warp.meetings.pop_back();
}

}  // namespace

// ---- a thread's life ------------------------------------------------------------------------------------------------------
void free_shared(Block& block) {
  const Quiet quiet;  // the last thread frees what others used: not a race
  for (SharedArray& s : block.shared) std::free(s.data);
  block.shared.clear();
}

static void block_finished(Block& block) {
  Cluster& cluster = *block.cluster;
  if (block.mapped && block.mapped_epoch == cluster.epoch) {
    fail("the block ends although a peer has mapped its shared memory since the last cluster_sync", {"kernel end", 0});
  }
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const size_t taken = block.warps[w].wgmma_steps, all = block.wgmma_steps[w / 4].size();
    if (taken != all)
      fail("wgmma: warp " + std::to_string(w) + " took " + std::to_string(taken) + " of its warpgroup's " + std::to_string(all) + " steps",
           {"kernel end", 0});
  }
#if defined(SIMT_ASAN)
  free_shared(block);  // later remote accesses are reported as use after free
#else
  const Quiet quiet;
  for (SharedArray& s : block.shared) std::memset(s.data, 0xFF, s.bytes);
#endif
}

void thread_finished(Thread* self) {
  if (!self->copies.empty()) fail("the thread ends with " + std::to_string(self->copies.size()) + " cp.async in flight", {"kernel end", 0});
  if (!self->chains.empty()) fail("the thread ends with a wgmma in flight", {"kernel end", 0});
  Block& block = *self->block;
  Cluster& cluster = *block.cluster;
  if (self->unfenced_copies) --block.unfenced_copiers;
  self->finished = true;
  clear_ready(self);
  rt().idle_yields = 0;
  --block.alive;
  --cluster.alive;
  Warp& warp = block.warps[static_cast<size_t>(self->linear / 32)];
  warp.alive &= ~(1u << (self->linear % 32));
  for (size_t i = warp.meetings.size(); i-- > 0;) {  // exited lanes do not count
    if (warp.meetings[i].arrived == (warp.meetings[i].mask & warp.alive)) complete(block, self->linear / 32, i);
  }
  Barrier& all = block.barriers[0];
  if (all.count > 0 && all.count == block.alive) release(all);
  if (cluster.barrier.count > 0 && cluster.barrier.count == cluster.alive) {
    release(cluster.barrier);
    ++cluster.epoch;
  }
  if (block.alive == 0) block_finished(block);
}

// ---- shared memory --------------------------------------------------------------------------------------------------------
namespace {

void* find_or_make(Block& block, const void* key, size_t bytes, size_t alignment, const char* name) {
  for (SharedArray& s : block.shared) {
    if (s.key == key) return s.data;
  }
  void* data = nullptr;
  const Quiet quiet;
  if (posix_memalign(&data, std::max(alignment, sizeof(void*)), std::max<size_t>(bytes, 1)) != 0) data = nullptr;
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0xFF, bytes);  // NaN as a float of any width, -1 as an index
  block.shared.push_back({key, static_cast<unsigned char*>(data), bytes, name});
  return data;
}

}  // namespace

void* shared_array(const void* key, size_t bytes, size_t alignment, const char* name) {
  return find_or_make(*rt().current->block, key, bytes, alignment, name);
}
void* dynamic_shared() { return find_or_make(*rt().current->block, nullptr, rt().dynamic_bytes, 128, "dynamic"); }
// The key is the offset: no variable lives at such addresses, and the same part of a peer of the cluster has the same one.
void* carve_dynamic(size_t offset, size_t bytes, const char* name, Loc place) {
  Block& block = *rt().current->block;
  const auto* key = reinterpret_cast<const void*>(offset + 1);
  if (offset + bytes > rt().dynamic_bytes) {
    fail("carve: " + std::string(name) + " ends at byte " + std::to_string(offset + bytes) + " of " + std::to_string(rt().dynamic_bytes) +
             " bytes of dynamic shared memory",
         place);
  }
  for (const SharedArray& s : block.shared) {
    if (s.key == key && s.bytes != bytes && bytes > 0) fail("carve: " + std::string(name) + " has another size than at first", place);
  }
  if (bytes == 0) return nullptr;
  return find_or_make(block, key, bytes, offset % 128 == 0 ? 128 : 16, name);
}

bool is_shared(const void* p) {
  for (const auto& block : rt().current->block->cluster->blocks) {
    for (const SharedArray& s : block->shared) {
      if (p >= s.data && p < s.data + s.bytes) return true;
    }
  }
  return false;
}

// ---- barriers -------------------------------------------------------------------------------------------------------------
Votes block_barrier(bool vote, Loc place) {
  Block& block = *rt().current->block;
  Barrier& b = block.barriers[0];
  if (b.count > 0 && !same(b.place, place)) {
    fail("divergent __syncthreads: other threads of the block wait at " + text(b.place), place);
  }
  return arrive(b, b.count + 1 == block.alive, vote, "__syncthreads", place);
}

void group_barrier(int id, int threads, Loc place) {
  Block& block = *rt().current->block;
  if (id < 1 || id > 15) fail("named_barrier: id must be in [1, 15], got " + std::to_string(id), place);
  if (threads <= 0 || threads % 32 != 0) fail("named_barrier: needs whole warps, got " + std::to_string(threads) + " threads", place);
  Barrier& b = block.barriers[id];
  if (b.count == 0) b.expected = threads;
  if (b.expected != threads)
    fail("named_barrier: other threads expect " + std::to_string(b.expected) + " threads, not " + std::to_string(threads), place);
  arrive(b, b.count + 1 == threads, false, "named_barrier", place);
}

void cluster_barrier(Loc place) {
  Cluster& cluster = *rt().current->block->cluster;
  Barrier& b = cluster.barrier;
  if (b.count > 0 && !same(b.place, place)) fail("divergent cluster_sync: other threads wait at " + text(b.place), place);
  const bool full = b.count + 1 == cluster.alive;
  if (full) ++cluster.epoch;
  arrive(b, full, false, "cluster_sync", place);
}

int cluster_position() { return rt().current->block->rank; }
int cluster_extent() { return static_cast<int>(rt().current->block->cluster->blocks.size()); }

void* cluster_address(const void* p, int rank, Loc place) {
  Block& own = *rt().current->block;
  Cluster& cluster = *own.cluster;
  if (rank < 0 || rank >= cluster_extent())
    fail("cluster_map: rank " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_extent()), place);
  for (const SharedArray& s : own.shared) {
    if (p < s.data || p >= s.data + s.bytes) continue;
    const auto offset = static_cast<const unsigned char*>(p) - s.data;
    if (rank == own.rank) return s.data + offset;
    Block& peer = *cluster.blocks[static_cast<size_t>(rank)];
    if (cluster.epoch == 0) fail("cluster_map: no cluster_sync yet, the peer may not have started", place);
    if (peer.alive == 0) fail("cluster_map: the peer has ended", place);
    peer.mapped = true;
    peer.mapped_epoch = cluster.epoch;
    return static_cast<unsigned char*>(find_or_make(peer, s.key, s.bytes, 128, s.name)) + offset;
  }
  fail("cluster_map: the address is not in this block's shared memory", place);
}

// ---- warps ----------------------------------------------------------------------------------------------------------------
int lane_id() { return rt().current->linear % 32; }

void warp_collective(const WarpOp& op, uint32_t mask, void* arguments, Loc place) {
  Thread* self = rt().current;
  Block& block = *self->block;
  const int warp_index = self->linear / 32, lane = self->linear % 32;
  Warp& warp = block.warps[static_cast<size_t>(warp_index)];
  if ((mask >> lane & 1) == 0) fail(std::string(op.name) + ": the lane is not in its own mask", place);
  size_t which = 0;
  while (which < warp.meetings.size() && warp.meetings[which].mask != mask) ++which;
  if (which == warp.meetings.size()) {
    warp.meetings.emplace_back();
    Meeting& fresh = warp.meetings.back();
    fresh.mask = mask;
    fresh.op = &op;
    fresh.place = place;
  }
  Meeting& meeting = warp.meetings[which];
  if (meeting.op != &op || (op.aligned && !same(meeting.place, place))) {
    fail(std::string("mixed warp operations: ") + op.name + ", while other lanes of the mask wait in " + meeting.op->name + " at " +
             text(meeting.place),
         place);
  }
  meeting.arrived |= 1u << lane;
  meeting.arguments[lane] = arguments;
  const int group = __builtin_ctz(mask);
  const unsigned phase = warp.phase[group] & 1;
  if (op.orders_memory) {
    order_release(&warp.order[phase][group]);
    self->fenced = false;
  }
  if (meeting.arrived == (mask & warp.alive)) {
    complete(block, warp_index, which);
    reschedule(-1);
  } else {
    wait_here(op.name, place);
  }
  if (op.orders_memory) order_acquire(&warp.order[phase][group]);
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------------
void copy_issue(const PendingCopy& copy, Loc place) {
  if (!is_shared(copy.dst)) fail("cp_async: the destination is not shared memory", place);
  const Quiet quiet;
  Thread* self = rt().current;
  self->copies.push_back(copy);
  ++self->uncommitted;
}
void copy_commit() {
  const Quiet quiet;
  Thread* self = rt().current;
  self->copy_groups.push_back(self->uncommitted);
  self->uncommitted = 0;
}
void copy_wait(int pending_groups) {
  Thread* self = rt().current;
  int done = 0;
  size_t groups = 0;
  while (self->copy_groups.size() - groups > static_cast<size_t>(pending_groups)) done += self->copy_groups[groups++];
  for (int i = 0; i < done; ++i) {
    const PendingCopy& c = self->copies[static_cast<size_t>(i)];
    c.store(c.dst, c.data, c.bytes);
  }
  if (done > 0 && !self->unfenced_copies) ++self->block->unfenced_copiers, self->unfenced_copies = true;
  const Quiet quiet;
  self->copies.erase(self->copies.begin(), self->copies.begin() + done);
  self->copy_groups.erase(self->copy_groups.begin(), self->copy_groups.begin() + static_cast<std::ptrdiff_t>(groups));
}

// ---- flags between blocks -------------------------------------------------------------------------------------------------
void yield(Loc place) {
  Runtime& r = rt();
  Thread* self = r.current;
  if (++r.idle_yields > 100000 + 200 * static_cast<int64_t>(r.threads.size())) {
    fail("endless spin: every thread that can run only yields", place);
  }
  reschedule(self->ready_bit);
}
void memory_fence() {
  Thread* self = rt().current;
  self->fenced = true;
  for (void* address : self->observed) order_acquire(address);
  self->observed.clear();
}
void atomic_before(void* address) {
  Thread* self = rt().current;
  if (rt().config.order == Order::kRandom && next_random() >> 61 == 0) reschedule(-1);
  if (self->fenced) order_release(address);
}
void atomic_after(void* address) {
#if defined(SIMT_TSAN)
  const Quiet quiet;
  auto& observed = rt().current->observed;
  if (std::find(observed.begin(), observed.end(), address) == observed.end()) observed.push_back(address);
#else
  (void)address;
#endif
}

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

// What the emulator knows while a grid runs; shared by its own sources only.
#pragma once

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "testing/simt/fiber.h"
#include "testing/simt/runtime.h"
#include "testing/simt/wgmma_emulated.h"

namespace tokensieve {
namespace simt {
namespace host {

struct Block;
struct Cluster;

struct SharedArray {
  const void* key;
  unsigned char* data;
  size_t bytes;
  const char* name;
};

// Products in flight on one set of accumulators.
struct Chain {
  float* acc;
  int group;         // of the last of them
  float values[32];  // what the wait delivers
};

struct Thread {
  Fiber fiber;
  uint3 index = {};
  Block* block = nullptr;
  int linear = 0;     // in the block
  int ready_bit = 0;  // in Runtime::ready and Runtime::threads
  bool finished = true;
  Thread* next_waiting = nullptr;  // in the same barrier
  const char* waits_in = nullptr;
  Loc waits_at = {"", 0};
  std::vector<PendingCopy> copies;
  std::vector<int> copy_groups;  // copies of each committed group, oldest first
  int uncommitted = 0;
  bool unfenced_copies = false;  // copies have arrived since the last fence_async_shared
  std::vector<Product> products;
  std::vector<Chain> chains;
  int wgmma_groups = 0;         // committed
  bool wgmma_fenced = false;    // a wgmma_fence since the last wait
  bool fenced = false;          // a __threadfence since the last barrier: atomics publish
  std::vector<void*> observed;  // atomics since the last __threadfence: it makes their publications visible
};

struct Barrier {
  Thread* waiting = nullptr;  // a list through Thread::next_waiting: fibres should not allocate
  int count = 0;              // of them
  Loc place = {"", 0};
  int expected = 0;
  unsigned phase = 0;
  int votes = 0;
  Votes result[2] = {};  // of even and odd phases: late leavers still read the old one
  char order[2] = {};    // ThreadSanitizer sync objects, likewise
};

struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const WarpOp* op = nullptr;
  Loc place = {"", 0};
  void* arguments[32] = {};
};

struct Warp {
  uint32_t alive = 0;
  std::vector<Meeting> meetings;
  char order[2][32] = {};  // sync objects of __syncwarp by phase and lowest lane of the mask
  unsigned phase[32] = {};
  size_t wgmma_steps = 0;
};

struct Block {
  uint3 index = {};
  int rank = 0;
  int alive = 0;
  Cluster* cluster = nullptr;
  int first_bit = 0;  // ready_bit of its thread 0
  Barrier barriers[16];
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  std::vector<std::vector<Loc>> wgmma_steps;  // of each warpgroup
  int unfenced_copiers = 0;                   // threads with unfenced_copies
  bool mapped = false;                        // a peer has mapped this block's shared memory ...
  uint64_t mapped_epoch = 0;                  // ... after that many cluster_syncs
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  int alive = 0;
  uint64_t epoch = 0;  // cluster_syncs so far
};

struct Runtime {
  Config config;
  Stats stats;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  size_t dynamic_bytes = 0;
  bool running = false;
  Fiber main;
  Thread* current = nullptr;                     // null while the launching thread runs
  std::vector<std::unique_ptr<Thread>> threads;  // kept between launches
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<uint64_t> ready;
  uint64_t random = 1;
  int64_t idle_yields = 0;
  std::exception_ptr error;
  char launch_order = 0, end_order = 0;
};
extern Runtime* const runtime;  // never destroyed: sanitizers tear down first
inline Runtime& rt() { return *runtime; }

inline std::string text(uint3 v) { return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z); }
inline std::string text(Loc place) { return std::string(place.file) + ":" + std::to_string(place.line); }
inline bool same(Loc a, Loc b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// Element `which` of two in a register.
template <bool kBFloat16>
float half_of(uint32_t pair, int which) {
  const uint32_t bits = pair >> (16 * which) & 0xffffu;
  if (kBFloat16) return bit_cast<float>(bits << 16);
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}

// schedule.cpp: who runs
uint64_t next_random();
void set_ready(Thread* t);
void clear_ready(Thread* t);
void reschedule(int after);  // to the thread whose turn it is; after >= 0: one behind that ready bit
void wait_here(const char* what, Loc place);

// sync.cpp: who waits
void release(Barrier& b);
void thread_finished(Thread* self);
void free_shared(Block& block);

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

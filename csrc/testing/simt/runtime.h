// The host SIMT runtime: runs a grid with one fibre per CUDA thread, in a schedule that the caller picks, and turns misuse (divergent
// barriers, deadlock, unfinished copies, remote shared memory of a block that is gone) into exceptions that name place and thread.
// One operating-system thread; threadIdx and friends are plain globals rewritten at every switch.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace tokensieve {
namespace simt {
namespace host {

// Where in the kernel source a call stands. As a default argument `Loc place = {}` it is the caller's line.
struct Loc {
  const char* file;
  int line;
  Loc(const char* in_file = __builtin_FILE(), int in_line = __builtin_LINE()) : file(in_file), line(in_line) {}
};

enum class Order { kAscending, kDescending, kRandom };

struct Config {
  Order order = Order::kAscending;  // which of the threads that can run goes first
  uint64_t seed = 0;                // of kRandom, which also interleaves at atomics
  int resident_blocks = 1;          // blocks that run interleaved; flags and races between blocks need 2 or more
};
Config& config();

struct Stats {
  int64_t switches = 0;
  int64_t ldmatrix_conflicts = 0;  // 8x8 row groups of ldmatrix whose rows share a bank, counted per extra access
};
Stats& stats();  // of the last launch

[[noreturn]] void fail(const std::string& what, Loc place);

// ---- called by the wrappers ----------------------------------------------------------------------------------------------
void run_grid(void (*body)(void*), void* context, dim3 grid, dim3 block, int cluster, size_t smem);

// Shared memory: every variable of every block is its own heap block of the exact size, filled with 0xFF.
void* shared_array(const void* key, size_t bytes, size_t alignment, const char* name);
void* dynamic_shared();
void* carve_dynamic(size_t offset, size_t bytes, const char* name, Loc place = {});
bool is_shared(const void* p);  // of the running block, or mapped from the cluster

struct Votes {
  int count, total;  // threads that voted true, threads that arrived
};
Votes block_barrier(bool vote, Loc place);
void group_barrier(int id, int threads, Loc place);
void cluster_barrier(Loc place);
int cluster_position();
int cluster_extent();
void* cluster_address(const void* p, int rank, Loc place);

// One operation of a warp: the lanes of `mask` park with a pointer to their arguments, the last one runs `run` for all of them.
struct WarpOp {
  const char* name;
  bool aligned;        // .aligned in PTX: the whole mask at one source line
  bool orders_memory;  // __syncwarp does, shuffles and votes do not
  void (*run)(void* const lanes[32], uint32_t present);
};
void warp_collective(const WarpOp& op, uint32_t mask, void* arguments, Loc place);
int lane_id();

// The copy happens at the wait: until then the destination holds garbage. `store` is compiled with the kernel, so sanitizers see it.
struct PendingCopy {
  void* dst;
  unsigned char data[16];
  int bytes;
  void (*store)(void* dst, const unsigned char* data, int bytes);
};
void copy_issue(const PendingCopy& copy, Loc place);
void copy_commit();
void copy_wait(int pending_groups);

void yield(Loc place);  // __nanosleep: another thread's turn
void memory_fence();    // __threadfence
void atomic_before(void* address);
void atomic_after(void* address);

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

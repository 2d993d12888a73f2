// The operations of a warp. Each runs once, in the last lane that arrives, on the arguments that the parked lanes left on their stacks.
#include <cstring>

#include "testing/simt/state.h"

namespace tokensieve {
namespace simt {
namespace host {
namespace {

constexpr uint64_t kGarbage = ~uint64_t{0};  // what a lane reads from one that did not take part

struct Lane {
  uint64_t bits = 0;
  int operand = 0;
  uint64_t result = kGarbage;
};
Lane& lane_of(void* const lanes[32], int i) { return *static_cast<Lane*>(lanes[i]); }
bool in(uint32_t set, int i) { return (set >> i & 1u) != 0; }

template <typename Op>
void for_lanes(uint32_t present, Op op) {
  for (; present != 0; present &= present - 1) op(__builtin_ctz(present));
}
uint64_t meet(const WarpOp& op, uint32_t mask, uint64_t bits, int operand, Loc place) {
  Lane lane{bits, operand};
  warp_collective(op, mask, &lane, place);
  return lane.result;
}

void run_shuffle(void* const lanes[32], uint32_t present) {
  for_lanes(present, [&](int i) {
    Lane& lane = lane_of(lanes, i);
    if (lane.operand >= 0 && in(present, lane.operand)) lane.result = lane_of(lanes, lane.operand).bits;
  });
}
uint32_t true_lanes(void* const lanes[32], uint32_t present) {
  uint32_t set = 0;
  for_lanes(present, [&](int i) { set |= static_cast<uint32_t>(lane_of(lanes, i).bits != 0) << i; });
  return set;
}
void give_all(void* const lanes[32], uint32_t present, uint64_t result) {
  for_lanes(present, [&](int i) { lane_of(lanes, i).result = result; });
}
void run_ballot(void* const lanes[32], uint32_t present) { give_all(lanes, present, true_lanes(lanes, present)); }
void run_any(void* const lanes[32], uint32_t present) { give_all(lanes, present, true_lanes(lanes, present) != 0); }
void run_all(void* const lanes[32], uint32_t present) { give_all(lanes, present, true_lanes(lanes, present) == present); }
void run_match(void* const lanes[32], uint32_t present) {
  for_lanes(present, [&](int i) {
    uint64_t set = 0;
    for_lanes(present, [&](int j) { set |= uint64_t{lane_of(lanes, i).bits == lane_of(lanes, j).bits} << j; });
    lane_of(lanes, i).result = set;
  });
}

template <Reduce kOp>
void run_reduce(void* const lanes[32], uint32_t present) {
  bool first = true;
  int64_t total = 0;
  for_lanes(present, [&](int i) {
    const int64_t v = static_cast<int64_t>(lane_of(lanes, i).bits);
    if (first)
      total = v;
    else if (kOp == Reduce::kAdd)
      total += v;
    else if (kOp == Reduce::kMin)
      total = v < total ? v : total;
    else if (kOp == Reduce::kMax)
      total = v > total ? v : total;
    else if (kOp == Reduce::kAnd)
      total &= v;
    else if (kOp == Reduce::kOr)
      total |= v;
    else
      total ^= v;
    first = false;
  });
  give_all(lanes, present, static_cast<uint64_t>(total));
}

constexpr WarpOp kShuffleOps[] = {{"__shfl_sync", false, false, run_shuffle},
                                  {"__shfl_up_sync", false, false, run_shuffle},
                                  {"__shfl_down_sync", false, false, run_shuffle},
                                  {"__shfl_xor_sync", false, false, run_shuffle}};
constexpr WarpOp kReduceOps[] = {
    {"__reduce_add_sync", false, false, run_reduce<Reduce::kAdd>}, {"__reduce_min_sync", false, false, run_reduce<Reduce::kMin>},
    {"__reduce_max_sync", false, false, run_reduce<Reduce::kMax>}, {"__reduce_and_sync", false, false, run_reduce<Reduce::kAnd>},
    {"__reduce_or_sync", false, false, run_reduce<Reduce::kOr>},   {"__reduce_xor_sync", false, false, run_reduce<Reduce::kXor>}};
constexpr WarpOp kBallot = {"__ballot_sync", false, false, run_ballot};
constexpr WarpOp kAny = {"__any_sync", false, false, run_any};
constexpr WarpOp kAll = {"__all_sync", false, false, run_all};
constexpr WarpOp kMatchAny = {"__match_any_sync", false, false, run_match};
constexpr WarpOp kMatchAll = {"__match_all_sync", false, false, run_match};
constexpr WarpOp kSyncWarp = {"__syncwarp", false, true, nullptr};

}  // namespace

uint64_t shuffle_bits(Shuffle mode, uint32_t mask, uint64_t bits, int operand, int width, Loc place) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("shuffle: the width must be a power of two up to 32", place);
  const int lane = lane_id(), first = lane & ~(width - 1), last = first | (width - 1);
  int source = lane;
  switch (mode) {
    case Shuffle::kIndex:
      source = first | (operand & (width - 1));
      break;
    case Shuffle::kUp:
      source = lane - operand < first ? lane : lane - operand;
      break;
    case Shuffle::kDown:
      source = lane + operand > last ? lane : lane + operand;
      break;
    case Shuffle::kXor:
      source = (lane ^ operand) > last ? lane : lane ^ operand;
      break;
  }
  return meet(kShuffleOps[static_cast<int>(mode)], mask, bits, source, place);
}
uint32_t vote_ballot(uint32_t mask, bool predicate, Loc place) {
  return static_cast<uint32_t>(meet(kBallot, mask, predicate ? 1 : 0, 0, place));
}
bool vote_any(uint32_t mask, bool predicate, Loc place) { return meet(kAny, mask, predicate ? 1 : 0, 0, place) != 0; }
bool vote_all(uint32_t mask, bool predicate, Loc place) { return meet(kAll, mask, predicate ? 1 : 0, 0, place) != 0; }
uint32_t match_any(uint32_t mask, uint64_t bits, Loc place) { return static_cast<uint32_t>(meet(kMatchAny, mask, bits, 0, place)); }
uint32_t match_all(uint32_t mask, uint64_t bits, int* equal, Loc place) {
  *equal = static_cast<uint32_t>(meet(kMatchAll, mask, bits, 0, place)) == mask ? 1 : 0;
  return *equal != 0 ? mask : 0;
}
int64_t reduce_lanes(Reduce op, uint32_t mask, int64_t value, Loc place) {
  return static_cast<int64_t>(meet(kReduceOps[static_cast<int>(op)], mask, static_cast<uint64_t>(value), 0, place));
}
void warp_barrier(uint32_t mask, Loc place) { warp_collective(kSyncWarp, mask, nullptr, place); }

// ---- tensor cores ------------------------------------------------------------------------------------------------------------
namespace {

void need_all(uint32_t present, const char* what) {
  if (present != 0xffffffffu) fail(std::string(what) + ": needs all 32 lanes, some have ended or do not exist", {"warp operation", 0});
}

struct MatrixLane {
  const uint32_t* row;
  const void* address;
  uint32_t* result;
};
uint32_t half_at(void* const lanes[32], int row_lane, int column) {
  return static_cast<MatrixLane*>(lanes[row_lane])->row[column / 2] >> (16 * (column % 2)) & 0xffffu;
}

// Eight rows of 16 bytes go through 32 banks at once if no two start in the same 16 of 128 bytes.
void count_conflicts(void* const lanes[32], int first) {
  const void* seen[8] = {};
  for (int i = first; i < first + 8; ++i) {
    const void* address = static_cast<MatrixLane*>(lanes[i])->address;
    const void*& slot = seen[reinterpret_cast<uintptr_t>(address) / 16 % 8];
    if (slot != nullptr && slot != address) ++stats().ldmatrix_conflicts;
    slot = address;
  }
}

template <int kMatrices, bool kTransposed>
void run_ldmatrix(void* const lanes[32], uint32_t present) {
  need_all(present, "ldmatrix");
  for (int m = 0; m < kMatrices; ++m) {
    count_conflicts(lanes, 8 * m);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = kTransposed ? half_at(lanes, 8 * m + t, g) : half_at(lanes, 8 * m + g, t);
      const uint32_t high = kTransposed ? half_at(lanes, 8 * m + t + 1, g) : half_at(lanes, 8 * m + g, t + 1);
      static_cast<MatrixLane*>(lanes[lane])->result[m] = high << 16 | low;
    }
  }
}

struct MmaLane {
  float* acc;
  const uint32_t *a, *b;
};
// Accumulates in float32, k ascending; a tensor core's order and rounding are its own.
template <bool kBFloat16>
void run_mma(void* const lanes[32], uint32_t present) {
  need_all(present, "mma_m16n8k16");
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + i + 8 * (r / 2)] = half_of<kBFloat16>(l.a[r], i);
      for (int r = 0; r < 2; ++r) b[t + i + 8 * r][g] = half_of<kBFloat16>(l.b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<MmaLane*>(lanes[lane]);
    for (int c = 0; c < 4; ++c) {
      const int row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
      float sum = l.acc[c];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      l.acc[c] = sum;
    }
  }
}

constexpr WarpOp kLdmatrix[] = {{"ldmatrix_x2", true, false, run_ldmatrix<2, false>},
                                {"ldmatrix_x2_trans", true, false, run_ldmatrix<2, true>},
                                {"ldmatrix_x4", true, false, run_ldmatrix<4, false>},
                                {"ldmatrix_x4_trans", true, false, run_ldmatrix<4, true>}};
constexpr WarpOp kMma[] = {{"mma_m16n8k16<half>", true, false, run_mma<false>}, {"mma_m16n8k16<bfloat16>", true, false, run_mma<true>}};

}  // namespace

void ldmatrix(uint32_t* r, const uint32_t (&row)[4], const void* address, int matrices, bool transposed, Loc place) {
  MatrixLane lane{row, address, r};
  const WarpOp& op = kLdmatrix[(matrices == 4 ? 2 : 0) + (transposed ? 1 : 0)];
  warp_collective(op, 0xffffffffu, &lane, place);
}
void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16, Loc place) {
  MmaLane lane{acc, a, b};
  const WarpOp& op = kMma[bfloat16 ? 1 : 0];
  warp_collective(op, 0xffffffffu, &lane, place);
}

}  // namespace host
}  // namespace simt
}  // namespace tokensieve

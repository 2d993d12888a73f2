// Workspace and limits that plan, launcher and kernels of select_diverse on CUDA share. Internal to the room.
#pragma once

#include "similarity/diverse.h"

namespace tokensieve {
namespace diverse {

constexpr int kStepRows = 64;                       // tokens of a block of the step kernel
constexpr int64_t kMatrixLimit = int64_t{8} << 30;  // bytes of distances that a call may take; beyond, one launch a pick
constexpr int kMaxItems = 8, kMaxThreads = 1024;  // tokens in registers: 8192 (16 a thread spill at 64 registers); beyond, in the workspace
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Layout {
  int64_t dots = 0;     // float [B][N][N], where stored
  int64_t squares = 0;  // float [B][N], dot(i, i) as the tiles sum it
  int64_t nearest = 0;  // float [B][N], distance to the nearest other token; without the matrix, later dot(i, i) as the steps sum it
  int64_t best = 0;     // float [B][N], distance to the nearest pick; used beyond 8192 tokens and by the steps
  int64_t picked = 0;   // uint32 [B][words], a bit a token
  int64_t winners = 0;  // uint64 [2][B][step blocks], the steps' best keys
  int64_t words = 0, step_blocks = 0;
  int64_t bytes = 0;
};

constexpr Layout layout(const DiverseParams& p, bool store) {
  Layout at;
  const auto take = [&](int64_t bytes) {
    const int64_t from = at.bytes;
    at.bytes += (bytes + 255) / 256 * 256;
    return from;
  };
  at.words = ceil_div(p.N, 32);
  at.step_blocks = ceil_div(p.N, kStepRows);
  at.dots = take(store ? p.B * p.N * p.N * 4 : 0);
  at.squares = take(p.B * p.N * 4);
  at.nearest = take(p.B * p.N * 4);
  at.best = take(p.B * p.N * 4);
  at.picked = take(p.B * at.words * 4);
  at.winners = take(store ? 0 : 2 * p.B * at.step_blocks * 8);
  return at;
}

}  // namespace diverse
}  // namespace tokensieve

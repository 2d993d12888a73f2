// Workspaces that plans, launchers and kernels of knn_density and nearest_center on CUDA share. Internal to the room.
#pragma once

#include "similarity/density.h"

namespace tokensieve {
namespace density {

constexpr int64_t kMatrixLimit = int64_t{8} << 30;  // bytes of products that a call may take; beyond, strips of rows, computed twice
constexpr int kListNeighbours = 32;                 // so many fit a warp, one a lane; beyond, a bisection of the row
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Offsets in bytes, each rounded up to 256.
struct Bytes {
  int64_t all = 0;
  constexpr int64_t take(int64_t bytes) {
    const int64_t from = all;
    all += (bytes + 255) / 256 * 256;
    return from;
  }
};

// float32 alone: tokens less their mean, rows of whole 16 bytes. The values of 16-bit tokens are as coarse as what the mean would save.
constexpr int64_t centered_stride(int64_t C) { return ceil_div(C, 4) * 4; }
constexpr int64_t centered_bytes(DType dtype, int64_t B, int64_t N, int64_t C) {
  return dtype == DType::kFloat32 ? B * N * centered_stride(C) * 4 : 0;
}

struct Layout {
  int64_t centered = 0;  // float [B][N][centered_stride]
  int64_t dots = 0;      // float [B][N][N], or [strip_rows][N]
  int64_t squares = 0;   // float [B][N], dot(i, i) as the tiles sum it
  int64_t sums = 0;      // float [B][N], of the squared distances to the near tokens
  int64_t missing = 0;   // float [B][N], of the k, those that are padding
  int64_t largest = 0;   // float [B][N], the largest finite squared distance of a row
  int64_t density = 0;   // float [B][N], -1 for padding
  int64_t most = 0;      // float [B], distance of a token without a denser one
  int64_t bytes = 0;
};

constexpr Layout layout(const DensityParams& p, const DensityPlan& plan) {
  Layout at;
  Bytes bytes;
  at.centered = bytes.take(centered_bytes(p.dtype, p.B, p.N, p.C));
  at.dots = bytes.take((plan.store_distances ? p.B * p.N : plan.strip_rows) * p.N * 4);
  at.squares = bytes.take(p.B * p.N * 4);
  at.sums = bytes.take(p.B * p.N * 4);
  at.missing = bytes.take(p.B * p.N * 4);
  at.largest = bytes.take(p.B * p.N * 4);
  at.density = bytes.take(p.B * p.N * 4);
  at.most = bytes.take(p.B * 4);
  at.bytes = bytes.all;
  return at;
}

struct NearestLayout {
  int64_t centered = 0;  // as above
  int64_t squares = 0;   // float [B][K], of the centres; infinite where there is none
  int64_t bytes = 0;
};

constexpr NearestLayout nearest_layout(const NearestParams& p) {
  NearestLayout at;
  Bytes bytes;
  at.centered = bytes.take(centered_bytes(p.dtype, p.B, p.N, p.C));
  at.squares = bytes.take(p.B * p.K * 4);
  at.bytes = bytes.all;
  return at;
}

}  // namespace density
}  // namespace tokensieve

// knn_density and nearest_center: x [B, N, C] -> density and distance to the nearest denser token [B, N]; the nearest of K centres [B, N].
// Source: DPC-KNN as in TCFormer (arXiv 2204.08680, section 3.2).
//
// Algorithm: (0) float32 alone, center_kernel: tokens less their mean; (1) gram_kernel (gram.cuh): products of all pairs, half of them
//   computed; (2) sums_kernel, a warp a row: the k smallest squared distances, one a lane (a ballot finds what enters: k ln(N / k) of N on
//   random data), and the row's largest; k > 32: a bisection of the distances' bits; (3) finish_kernel, a block an image: densities and the
//   largest distance; (4) denser_kernel, a warp a row: the nearest denser token. Products say which tokens (2) and (4) may mean, differences
//   decide among them and are what is summed (k > 32: summed alone). A matrix beyond 8 GiB: strips of its rows, (1) and (2), and again (1) and (4).
//   nearest_center: centers_kernel, squares of the centres; label_kernel: 64 tokens x all tiles of centres, the best of a thread's two rows
//   in registers, differences where products cannot tell; own_kernel: centres get their own label.
// Work: N^2 C flops, 4 N^2 bytes written and read twice from L2, (k + 1) N rows of C. Floor on H200, 2880 x 1024 bfloat16: 11 us of tensor
//   cores (790 TF/s), 33 MB through L2 three times 20 us. ESTIMATE, nothing was measured: 70 us. Bound by L2.
// Deterministic: fixed orders, no atomics. Ties to the lowest index.
// Limits: N < 2^31 - 1.
#pragma once

#include "similarity/density_args.h"
#include "similarity/gram.cuh"

namespace tokensieve {
namespace density {

using similarity::kThreads;
using similarity::kTile;
using similarity::kWarps;

constexpr int kCenterChannels = 32;

struct Args {
  DensityParams p;
  float *dots, *squares, *sums, *missing, *largest, *density, *most;
  int64_t first_image, first_row, rows,
      count;  // in hand: `rows` rows from first_row on, of every image from first_image; count: all of them
};

struct NearestArgs {
  NearestParams p;
  const void* x;  // the tokens, or what is left of them without their mean
  int64_t batch_stride, row_stride;
  float* squares;
  int tiles, center_tiles;
  bool wide;
};

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Never negative; infinite where a token is not finite. Rows of the same values have a == b == dot: exactly 0.
__device__ __forceinline__ float squared_distance(float dot, float a, float b) {
  const float d = a + b - (dot + dot);
  return d == d ? (d > 0.0f ? d : 0.0f) : infinity();
}

// By how much of a + b it may be off: a + b and two dots by as much each. Tensor cores cut off where FFMA rounds: 17 numbers and the sum of
// 16 channels lose up to 19 x 2^-24 of the largest, which makes 1.2 C of a dot product's share where C roundings would be C.
__device__ __forceinline__ float doubt_of(int64_t C) { return static_cast<float>(3 * C + 16) * 0x1p-24f; }

__device__ __forceinline__ uint64_t pack_key(float distance, int64_t token) {
  return static_cast<uint64_t>(__float_as_uint(distance)) << 32 | static_cast<uint32_t>(token);
}

__device__ __forceinline__ bool is_real(const DensityParams& p, int64_t b, int64_t n) {
  return p.mask == nullptr || p.mask[b * p.mask_stride + n] != 0;
}

// |x_i - x_j|^2 by a warp; infinite where it is no number.
template <typename T, typename Params>
__device__ __forceinline__ float difference(const Params& p, int64_t b, int64_t i, int64_t j) {
  const T* const base = static_cast<const T*>(p.x) + b * p.x_stride[0];
  const T *const own = base + i * p.x_stride[1], *const other = base + j * p.x_stride[1];
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t c = lane_of_thread(); c < p.C; c += 32) {
    const float d = similarity::to_float(own[c]) - similarity::to_float(other[c]);
    sum = fmaf(d, d, sum);
  }
  sum = simt::warp::sum(sum);
  return sum == sum ? sum : infinity();
}

// ---- (0) less the mean -----------------------------------------------------------------------------------------------------------------
// A block takes 32 channels of an image: their means over the finite values, then the rows. out [B][N][stride], zeros behind C.
static __global__ void __launch_bounds__(kThreads)
    center_kernel(const float* x, int64_t batch_stride, int64_t row_stride, int64_t N, int64_t C, float* out, int64_t stride) {
  SIMT_SHARED(float, partial, [kWarps][kCenterChannels]);
  const int64_t parts = ceil_div(stride, kCenterChannels), b = blockIdx.x / parts;
  const int64_t c = static_cast<int64_t>(blockIdx.x % parts) * kCenterChannels + lane_of_thread();
  const float* const from = x + b * batch_stride + c;
  float sum = 0.0f;
  for (int64_t n = warp_of_thread(); c < C && n < N; n += kWarps) {
    const float value = from[n * row_stride];
    sum += value - value == 0.0f ? value : 0.0f;
  }
  partial[warp_of_thread()][lane_of_thread()] = sum;
  __syncthreads();
  float mean = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) mean += partial[w][lane_of_thread()];
  mean /= static_cast<float>(N);
  float* const to = out + b * N * stride + c;
  for (int64_t n = warp_of_thread(); c < stride && n < N; n += kWarps) to[n * stride] = c < C ? from[n * row_stride] - mean : 0.0f;
}

// ---- (2) the nearest tokens ------------------------------------------------------------------------------------------------------------
struct Bounds {
  float least, most;
};

// A warp's row of the matrix: squared distances from token i.
struct Row {
  const DensityParams& p;
  const float *dots, *squares;
  int64_t b, i;
  float own, doubt;

  __device__ Row(const Args& a, int64_t at) : p(a.p) {
    b = a.first_image + at / a.rows;
    i = a.first_row + at % a.rows;
    dots = a.dots + at * p.N;
    squares = a.squares + b * p.N;
    own = squares[i];
    doubt = doubt_of(p.C);
  }
  __device__ __forceinline__ float distance(int64_t j) const { return j == i ? 0.0f : squared_distance(dots[j], own, squares[j]); }
  __device__ __forceinline__ Bounds bounds(int64_t j) const {
    const float d = distance(j), off = doubt * (own + squares[j]);
    if (!(d < infinity())) return {d, d};
    return {d > off ? d - off : 0.0f, d + off};
  }
  __device__ __forceinline__ bool is_other(int64_t j) const { return j < p.N && j != i && is_real(p, b, j); }
  // Distance and token: smaller is nearer, then lower. All ones: no other token.
  __device__ __forceinline__ uint64_t key(int64_t j) const { return is_other(j) ? pack_key(distance(j), j) : ~uint64_t{0}; }
};

// x enters the list, which has one place a lane in ascending order.
__device__ __forceinline__ void insert_one(uint64_t& list, uint64_t x) {
  const int place = __popc(simt::warp::ballot(list < x));
  const uint64_t shifted = simt::warp::shfl_up(list, 1);
  if (lane_of_thread() >= place) list = lane_of_thread() == place ? x : shifted;
}

// Keys below the list's place `keep - 1` enter it.
__device__ __forceinline__ void insert(uint64_t& list, int keep, uint64_t key) {
  uint64_t last = simt::warp::shfl(list, keep - 1);
  unsigned pending = simt::warp::ballot(key < last);
  for (; pending != 0; pending &= pending - 1) {
    const uint64_t x = simt::warp::shfl(key, __ffs(static_cast<int>(pending)) - 1);
    if (!(x < last)) continue;
    insert_one(list, x);
    last = simt::warp::shfl(list, keep - 1);
  }
}

__device__ __forceinline__ unsigned distance_bits(uint64_t key) { return static_cast<unsigned>(key >> 32); }

struct Near {
  float sum = 0.0f;
  int64_t have = 0;
};

// The k - 1 nearest other tokens. All of those that may be among them, as the products say, are measured.
template <typename T>
__device__ __forceinline__ Near nearest_by_list(const Row& row) {
  const int keep = static_cast<int>(row.p.k) - 1;
  Near near;
  if (keep == 0) return near;
  uint64_t list = ~uint64_t{0};
  for (int64_t first = 0; first < row.p.N; first += 32) {
    const int64_t j = first + lane_of_thread();
    insert(list, keep, row.is_other(j) ? pack_key(row.bounds(j).most, j) : ~uint64_t{0});
  }
  const unsigned limit = distance_bits(simt::warp::shfl(list, keep - 1));  // all ones: there are fewer
  uint64_t last = list = ~uint64_t{0};
  for (int64_t first = 0; first < row.p.N; first += 32) {
    const int64_t j = first + lane_of_thread();
    const unsigned least = row.is_other(j) ? __float_as_uint(row.bounds(j).least) : ~0u;
    unsigned pending = simt::warp::ballot(least <= limit && least < distance_bits(last));
    for (; pending != 0; pending &= pending - 1) {
      const int source = __ffs(static_cast<int>(pending)) - 1;
      if (simt::warp::shfl(least, source) >= distance_bits(last)) continue;
      insert_one(list, pack_key(difference<T>(row.p, row.b, row.i, first + source), first + source));
      last = simt::warp::shfl(list, keep - 1);
    }
  }
  for (int n = 0; n < keep; ++n) {
    const uint64_t key = simt::warp::shfl(list, n);
    if (key == ~uint64_t{0}) break;
    ++near.have;
    near.sum += __uint_as_float(distance_bits(key));
  }
  return near;
}

// Keys up to `limit`, of the warp's row.
__device__ __forceinline__ int64_t count_up_to(const Row& row, uint64_t limit) {
  int count = 0;
  for (int64_t j = lane_of_thread(); j < row.p.N; j += 32) count += row.key(j) <= limit ? 1 : 0;
  return simt::warp::sum(count);
}

template <typename T>
__device__ __forceinline__ Near nearest_by_bisection(const Row& row) {
  Near near;
  uint64_t low = 0, high = uint64_t{0x7f800001} << 32;  // the limit is in (low - 1, high]: every key of another token is below high
  near.have = count_up_to(row, high);
  near.have = near.have < row.p.k - 1 ? near.have : row.p.k - 1;
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    if (count_up_to(row, middle) >= near.have) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  for (int64_t first = 0; first < row.p.N; first += 32) {
    unsigned taken = simt::warp::ballot(row.key(first + lane_of_thread()) <= high);
    for (; taken != 0; taken &= taken - 1) {
      near.sum += difference<T>(row.p, row.b, row.i, first + __ffs(static_cast<int>(taken)) - 1);
    }
  }
  return near;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const Args a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (at >= a.count) return;
  const Row row(a, at);
  const Near near = a.p.k <= kListNeighbours ? nearest_by_list<T>(row) : nearest_by_bisection<T>(row);
  float largest = 0.0f;
  for (int64_t j = lane_of_thread(); j < a.p.N; j += 32) {
    const float d = row.distance(j);
    largest = d > largest && d < infinity() ? d : largest;
  }
  largest = simt::warp::max(largest);
  if (lane_of_thread() != 0) return;
  const int64_t to = row.b * a.p.N + row.i;
  a.sums[to] = near.sum;
  a.missing[to] = static_cast<float>(a.p.k - 1 - near.have);
  a.largest[to] = largest;
}

// ---- (3) densities ---------------------------------------------------------------------------------------------------------------------
__device__ inline float block_max(float value) {
  SIMT_SHARED(float, of_warp, [kWarps]);
  value = simt::warp::max(value);
  if (lane_of_thread() == 0) of_warp[warp_of_thread()] = value;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value = of_warp[w] > value ? of_warp[w] : value;
  __syncthreads();  // of_warp may be used again
  return value;
}

static __global__ void __launch_bounds__(kThreads) finish_kernel(const Args a) {
  const DensityParams& p = a.p;
  const int64_t b = blockIdx.x, me = static_cast<int>(threadIdx.x);
  const float channels = static_cast<float>(p.C), k = static_cast<float>(p.k);
  float largest = 0.0f, of_all = 0.0f, padding = 0.0f;
  for (int64_t n = me; n < p.N; n += kThreads) {
    largest = fmaxf(largest, a.largest[b * p.N + n]);
    if (!is_real(p, b, n)) padding = 1.0f;
  }
  for (int64_t n = me; p.mask != nullptr && n < p.B * p.N; n += kThreads) of_all = fmaxf(of_all, a.largest[n]);
  largest = block_max(largest);
  of_all = block_max(of_all);
  padding = block_max(padding);
  const float far = (p.C > 0 ? sqrtf(of_all / channels) : 0.0f) + 1.0f;
  if (me == 0) a.most[b] = padding > 0.0f ? far : p.C > 0 ? sqrtf(largest / channels) : 0.0f;
  for (int64_t n = me; n < p.N; n += kThreads) {
    const int64_t at = b * p.N + n;
    const float mean = p.C > 0 ? a.sums[at] / (channels * k) : 0.0f, missing = a.missing[at];
    float density = expf(-(missing > 0.0f ? fmaf(missing / k, far * far, mean) : mean));
    if (p.noise != nullptr) density = fmaf(p.noise[at], 1e-6f, density);
    const bool real = is_real(p, b, n);
    p.density[at] = real ? density : 0.0f;
    a.density[at] = real ? density : -1.0f;
  }
}

// ---- (4) the nearest denser token ------------------------------------------------------------------------------------------------------
template <typename T>
__global__ void __launch_bounds__(kThreads) denser_kernel(const Args a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (at >= a.count) return;
  const Row row(a, at);
  const DensityParams& p = a.p;
  const float* const density = a.density + row.b * p.N;
  const float own = density[row.i] > 0.0f ? density[row.i] : 0.0f;
  const auto is_denser = [&](int64_t j) {
    if (j >= p.N) return false;
    return density[j] > own || (p.noise == nullptr && density[j] == own && j < row.i);
  };
  float bound = infinity(), best = infinity();
  for (int64_t j = lane_of_thread(); j < p.N; j += 32) {
    if (is_denser(j)) bound = fminf(bound, row.bounds(j).most);
  }
  bound = simt::warp::min(bound);
  for (int64_t first = 0; bound < infinity() && first < p.N; first += 32) {
    const float least = is_denser(first + lane_of_thread()) ? row.bounds(first + lane_of_thread()).least : infinity();
    unsigned pending = simt::warp::ballot(least <= bound && least < best);
    for (; pending != 0; pending &= pending - 1) {
      const int source = __ffs(static_cast<int>(pending)) - 1;
      if (simt::warp::shfl(least, source) < best) best = fminf(best, difference<T>(p, row.b, row.i, first + source));
    }
  }
  float distance = a.most[row.b];
  if (best < infinity()) distance = fminf(distance, p.C > 0 ? sqrtf(best / static_cast<float>(p.C)) : 0.0f);
  if (lane_of_thread() == 0) p.distance[row.b * p.N + row.i] = distance;
}

// ---- nearest_center --------------------------------------------------------------------------------------------------------------------
// Centres as rows of a tile (similarity::Rows): tokens that a list names.
template <typename T>
struct Centers {
  const T* base;
  int64_t stride;
  int64_t first, count;
  bool wide;
  const int64_t* list;
  int64_t N;

  __device__ __forceinline__ int64_t place(int64_t row) const { return list[row] < N ? list[row] : -1; }
};

// x . x of a token, by a warp.
template <typename T>
__device__ __forceinline__ float square_of(const NearestArgs& a, int64_t b, int64_t token) {
  const T* const row = static_cast<const T*>(a.x) + b * a.batch_stride + token * a.row_stride;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t c = lane_of_thread(); c < a.p.C; c += 32) {
    const float value = similarity::to_float(row[c]);
    sum = fmaf(value, value, sum);
  }
  return simt::warp::sum(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) centers_kernel(const NearestArgs a) {
  const NearestParams& p = a.p;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (at >= p.B * p.K) return;
  const int64_t token = p.centers[at];
  const bool exists = token >= 0 && token < p.N;
  const float square = square_of<T>(a, at / p.K, exists ? token : 0);
  if (lane_of_thread() == 0) a.squares[at] = !exists ? infinity() : square < infinity() ? square : __uint_as_float(0x7fc00000u);
}

// The centre that may be the nearest one to a token, and how near another may be.
struct Label {
  float own = infinity();                         // the token's square; distances are without it
  float least = infinity(), second = infinity();  // the two smallest that a distance may be
  float bound = infinity();                       // the smallest that one may be at most
  int place = -1;

  // square: of the centre, infinite where there is none. No number is infinitely far.
  __device__ __forceinline__ void meet(float square, float dot, int center, float doubt) {
    if (square == infinity()) return;
    const float d = square - (dot + dot), off = doubt * (own + square);
    const bool near = d == d && off < infinity();
    take(near ? d - off : infinity(), center);
    bound = fminf(bound, near ? d + off : infinity());
  }
  __device__ __forceinline__ void take(float value, int center) {
    const bool first = place < 0 || value < least || (value == least && center < place);
    second = fminf(second, first ? least : value);
    least = first ? value : least;
    place = first ? center : place;
  }
  __device__ __forceinline__ void meet_lane(int lane_mask) {
    const float other = simt::tile<4>::shfl_xor(least, lane_mask), next = simt::tile<4>::shfl_xor(second, lane_mask);
    const int center = simt::tile<4>::shfl_xor(place, lane_mask);
    bound = fminf(bound, simt::tile<4>::shfl_xor(bound, lane_mask));
    if (center >= 0) take(other, center);
    second = fminf(second, next);
  }
  __device__ __forceinline__ bool unsure() const { return bound < infinity() && second <= bound; }
};

// The nearest centre by differences, of a warp's token.
template <typename T>
__device__ __forceinline__ int64_t nearest_by_differences(const NearestParams& p, int64_t b, int64_t token) {
  int64_t place = -1;
  float least = infinity();
  for (int64_t c = 0; c < p.K && least > 0.0f; ++c) {
    const int64_t center = p.centers[b * p.K + c];
    if (center < 0 || center >= p.N) continue;
    const float d = difference<T>(p, b, token, center);
    if (d < least) place = c;
    least = fminf(least, d);
  }
  return place;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) label_kernel(const NearestArgs a) {
  SIMT_DYN_SHARED(unsigned char, shared);
  const NearestParams& p = a.p;
  const int64_t b = blockIdx.x / a.tiles, first = static_cast<int64_t>(blockIdx.x % a.tiles) * kTile;
  const T* const base = static_cast<const T*>(a.x) + b * a.batch_stride;
  const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
  const float doubt = doubt_of(p.C);
  const int64_t first_row = first + warp_of_thread() * 16;
  Label best[2];
  for (int r = 0; r < 16 && p.K > 0 && first_row + r < p.N; ++r) {
    const float square = square_of<T>(a, b, first_row + r);
    if (r == g) best[0].own = square;
    if (r == g + 8) best[1].own = square;
  }
  for (int tile = 0; tile < a.center_tiles; ++tile) {
    float acc[8][4];
    const Centers<T> centers = {base, a.row_stride, int64_t{tile} * kTile, p.K, a.wide, p.centers + b * p.K, p.N};
    similarity::tile_dots<T>(acc, shared, similarity::Rows<T>{base, a.row_stride, first, p.N, a.wide}, centers, p.C);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int center = tile * kTile + 8 * n + 2 * t + i % 2;
        if (center < p.K) best[i / 2].meet(a.squares[b * p.K + center], acc[n][i], center, doubt);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) best[i].meet_lane(step);
    unsigned unsure = simt::warp::ballot(t == 0 && best[i].unsure());
    for (; unsure != 0; unsure &= unsure - 1) {
      const int lane = __ffs(static_cast<int>(unsure)) - 1;
      const int64_t place = nearest_by_differences<T>(p, b, first_row + lane / 4 + 8 * i);
      if (lane_of_thread() == lane) best[i].place = static_cast<int>(place);
    }
    const int64_t row = first_row + g + 8 * i;
    if (t == 0 && row < p.N) p.labels[b * p.N + row] = best[i].place;
  }
}

// A centre has its own label; a token that is listed twice the first place.
static __global__ void __launch_bounds__(kThreads) own_kernel(const NearestParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.B * p.K) return;
  const int64_t b = at / p.K, place = at % p.K, token = p.centers[at];
  if (token < 0 || token >= p.N) return;
  for (int64_t earlier = 0; earlier < place; ++earlier) {
    if (p.centers[b * p.K + earlier] == token) return;
  }
  p.labels[b * p.N + token] = place;
}

}  // namespace density
}  // namespace tokensieve

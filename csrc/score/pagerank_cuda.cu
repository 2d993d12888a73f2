// attention_pagerank on CUDA: the rows' normalisers once, then a sweep of weighted column sums per iteration; 1 + iterations launches.
//
// In: query [B, H, N, D], key [B, Hkv, N, D]; out: rank [B, H, N]. Algorithm: the two sweeps of colsum_kernel.cuh, whose row weights are
//   the last vector; the map is computed 1 + iterations times and never stored. The vectors go back and forth between `rank` and the
//   workspace, so that the last iteration writes `rank`. No host synchronisation: the number of launches depends on `iterations` alone.
//   A mask of keys is a bias of the normalisers; their own ranks are set to 0 at the end of an iteration.
// Work: (1 + iterations) x 2 D B H N^2 flops and B H N^2 exponentials. Floor on H200 at 28 heads x 1024 x 128 bf16, 5 iterations, causal
//   half not taken off: 6 x 9.5 us (tensor cores), 6 x 7.9 us (exponentials). ESTIMATE at 0.6 of the wgmma rate: 100 us, nothing measured.
// Storing the map in 16 bits (59 MB at that shape) and streaming it 5 times would take 5 x 14 us at 4.3 TB/s, and O(N^2) memory.
// Deterministic, as the sweeps. Limits: D <= 256.
#include "device/simt.h"
#include "score/pagerank_args.h"

namespace tokensieve {
namespace pagerank {

// No iteration: every head starts, and ends, with `start`.
__global__ void start_kernel(float* rank, const float* start, int64_t H, int64_t N, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) rank[i] = start == nullptr ? 1.0f / static_cast<float>(N) : start[i / (H * N) * N + i % N];
}

}  // namespace pagerank

Status pagerank_cuda(const PagerankParams& r, const PagerankPlan& plan, void* stream) {
  const int64_t size = r.B * r.H * r.N;
  if (size == 0) return Status::success();
  if (size / 256 >= 0x7fffffff || r.N >= int64_t{1} << 31) return Status::error("B * H * N is too large");
  if (r.iterations <= 0) {
    const dim3 grid(static_cast<unsigned>((size + 255) / 256));
    return simt::launch(pagerank::start_kernel, grid, dim3(256), 0, stream, r.rank, r.start, r.H, r.N, size);
  }
  if (plan.threads == 0) return Status::error("D must be in [1, 256] and its tiles must fit shared memory");
  const ScoreParams p = pagerank::score_params(r);
  colsum::Args a = colsum::make_args(p, plan.row_splits, plan.col_splits);
  const colsum::Parts parts = colsum::two_pass_parts(p, plan.row_splits, plan.col_splits);
  float* other = static_cast<float*>(r.workspace) + parts.stats + (parts.split_stats > parts.partial ? parts.split_stats : parts.partial);
  a.wgmma = plan.wgmma;
  Status status = colsum::run_rows(a, stream);
  a.weights = r.start;
  a.weight_stride[0] = r.N;
  a.factor = r.start == nullptr ? 1.0f / static_cast<float>(r.N) : 1.0f;
  for (int64_t i = 0; i < r.iterations && status.ok(); ++i) {
    a.p.scores = (r.iterations - i) % 2 == 1 ? r.rank : other;
    status = colsum::run_columns(a, stream);
    a.weights = a.p.scores;
    a.weight_stride[0] = r.H * r.N, a.weight_stride[1] = r.N;
    a.factor = 1.0f;
  }
  return status;
}

}  // namespace tokensieve

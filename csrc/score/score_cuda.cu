// attention_scores on CUDA: parameters and plan -> kernel arguments, one or two launches.
#include "device/simt.h"
#include "score/colsum_args.h"
#include "score/score_args.h"

namespace tokensieve {
namespace score {

// No query rows (or no heads): every score is an empty sum.
__global__ void zero_kernel(float* out, const float* accumulate, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = accumulate == nullptr ? 0.0f : accumulate[i];
}

namespace {

template <typename T>
Status launch_rows(const Args& a, int threads, int cluster, int64_t smem, void* stream) {
  switch (row_tiles(a.rows_per_pass)) {
    case 1:
      return launch<T, 1>(a, threads, cluster, smem, stream);
    case 2:
      return launch<T, 2>(a, threads, cluster, smem, stream);
    case 4:
      return launch<T, 4>(a, threads, cluster, smem, stream);
    default:
      return launch<T, 8>(a, threads, cluster, smem, stream);
  }
}

Status launch_dtype(const Args& a, const ScorePlan& plan, void* stream) {
  const int cluster = a.mode == Mode::kWhole ? a.num_chunks : 1;
  switch (a.p.dtype) {
    case DType::kFloat32:
      return launch<float, 1>(a, plan.threads, cluster, plan.smem_bytes, stream);
    case DType::kFloat16:
      return launch_rows<__half>(a, plan.threads, cluster, plan.smem_bytes, stream);
    case DType::kBFloat16:
      return launch_rows<__nv_bfloat16>(a, plan.threads, cluster, plan.smem_bytes, stream);
    default:
      return Status::error("query and key must be float32, float16 or bfloat16");
  }
}

bool aligned16(const void* p, const int64_t (&strides)[3], int64_t D, int64_t element) {
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) | D * element;
  for (int64_t stride : strides) bits |= stride * element;
  return bits % 16 == 0;
}

int64_t chunks_of(int64_t keys, int64_t chunk) { return keys <= 0 ? 1 : (keys + chunk - 1) / chunk; }

const char* refusal(const ScoreParams& p, const ScorePlan& plan) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (p.D > kMaxDim) return "D must be at most 2048";
  if (p.N >= kLimit || p.H / p.Hkv * p.L >= kLimit) return "N and H / Hkv * L must be below 2^31";
  const int most = p.dtype == DType::kFloat32 ? kMaxThreads : max_threads(row_tiles(plan.rows_per_pass));
  if (plan.threads < kMaxRows || plan.threads > most || plan.threads % 32 != 0) return "the plan is not one of CUDA";
  if (plan.rows_per_pass < 1 || plan.rows_per_pass > kMaxRows) return "rows_per_pass must be in [1, 64]";
  if (plan.chunk_keys < 1 || plan.chunk_keys % kKeyTile != 0) return "chunk_keys must be a positive multiple of 16";
  return nullptr;
}

}  // namespace
}  // namespace score

Status score_cuda(const ScoreParams& p, const ScorePlan& plan, void* stream) {
  const int64_t R = p.range_end - p.range_begin;
  if (p.B == 0) return Status::success();
  if (p.H == 0 || p.L == 0) {
    const int64_t n = p.B * (p.head_reduction == Reduction::kNone ? p.H : 1) * (p.query_reduction == Reduction::kNone ? p.L : 1) * R;
    if (n == 0) return Status::success();
    return simt::launch(score::zero_kernel, dim3(static_cast<unsigned>((n + 255) / 256)), dim3(256), 0, stream, p.scores, p.accumulate, n);
  }
  if (plan.algo == ScoreAlgo::kTwoPass) return colsum::score_two_pass(p, plan, stream);
  if (plan.algo == ScoreAlgo::kStrip) return colsum::score_strip(p, plan, stream);
  if (const char* why = score::refusal(p, plan)) return Status::error(why);

  score::Args a;
  a.p = p;
  a.chunk_keys = static_cast<int>(plan.chunk_keys);
  a.rows_per_pass = static_cast<int>(plan.rows_per_pass);
  const int64_t element = dtype_bytes(p.dtype);
  a.padded_rows = static_cast<int>(score::padded_rows(plan.rows_per_pass, element));
  a.wide_loads = score::aligned16(p.query, p.query_stride, p.D, element) && score::aligned16(p.key, p.key_stride, p.D, element);
  const bool range_only = p.normalize == Normalize::kRange;
  a.scan_begin = range_only ? p.range_begin : 0;
  a.scan_end = range_only ? p.range_end : p.N;
  if (p.lse_in == nullptr && plan.num_chunks * plan.chunk_keys < a.scan_end - a.scan_begin) {
    return Status::error("the plan's chunks do not cover the keys");
  }
  const int64_t rows = p.H / p.Hkv * p.L, stats_floats = p.B * p.Hkv * rows * plan.num_chunks * 2;
  float* workspace = static_cast<float*>(p.workspace);

  if (plan.algo == ScoreAlgo::kCluster) {
    if (p.lse_in != nullptr) return Status::error("a given lse needs algorithm kSplit");
    a.mode = score::Mode::kWhole;
    a.num_chunks = static_cast<int>(plan.num_chunks);
    a.partial = workspace;
    return score::launch_dtype(a, plan, stream);
  }
  if (plan.algo != ScoreAlgo::kSplit) return Status::error("the plan is not one of CUDA");
  if (p.lse_in == nullptr && (p.activation == Activation::kSoftmax || p.lse_out != nullptr)) {
    a.mode = score::Mode::kStats;
    a.num_chunks = static_cast<int>(plan.num_chunks);
    a.stats = workspace;
    a.stats_chunks = a.num_chunks;
    const Status status = score::launch_dtype(a, plan, stream);
    if (!status.ok()) return status;
  }
  a.mode = score::Mode::kApply;
  a.scan_begin = p.range_begin;
  a.scan_end = p.range_end;
  a.num_chunks = static_cast<int>(score::chunks_of(R, plan.chunk_keys));
  a.partial = workspace + (p.lse_in == nullptr ? (stats_floats + 15) / 16 * 16 : 0);
  return score::launch_dtype(a, plan, stream);
}

}  // namespace tokensieve

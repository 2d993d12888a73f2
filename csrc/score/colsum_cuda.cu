// Scores of all query rows on CUDA: parameters and plan -> kernel arguments, one or two launches.
#include "device/simt.h"
#include "score/colsum_finish.cuh"

namespace tokensieve {
namespace colsum {

// Partial results -> scores: 32 keys a block. Linear: eight threads share the units of a key and meet in shared memory.
constexpr int kFinishGroups = 8;
__global__ void __launch_bounds__(32 * kFinishGroups) finish_kernel(const Args a, int blocks_per_batch) {
  SIMT_SHARED(float, parts, [kFinishGroups][32]);
  SIMT_SHARED(float, divisor_parts, [kFinishGroups]);
  const ScoreParams& p = a.p;
  const int b = static_cast<int>(blockIdx.x) / blocks_per_batch, x = static_cast<int>(threadIdx.x) % 32,
            y = static_cast<int>(threadIdx.x) / 32;
  const int64_t R = p.range_end - p.range_begin, n = static_cast<int64_t>(static_cast<int>(blockIdx.x) % blocks_per_batch) * 32 + x;
  const float rows = row_divisor(p, b, divisor_parts), heads = score::head_divisor(p, b);
  if (a.per_head) {
    if (y == 0 && n < R) finish_key(a, b, n, rows, heads);
    return;
  }
  float acc = 0.0f;
  if (n < R) {
    for (int64_t u = y; u < p.Hkv * a.col_splits; u += kFinishGroups) acc += a.partial[(u * p.B + b) * R + n];
  }
  parts[y][x] = acc;
  __syncthreads();
  if (y != 0 || n >= R) return;
  for (int i = 1; i < kFinishGroups; ++i) acc += parts[i][x];
  emit(p, b * R + n, is_hidden(a, b, n) ? 0.0f : divide_or_zero(divide_or_zero(acc, rows), heads));
}

namespace {

bool aligned16(const void* p, const int64_t (&strides)[3], int64_t D, int64_t element) {
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) | D * element;
  for (int64_t stride : strides) bits |= stride * element;
  return bits % 16 == 0;
}

template <typename T>
Status dispatch_wgmma(const Args& a, bool columns, void* stream) {
  switch (steps_of(a.p.dtype, a.p.D)) {
    case 4:
      return columns ? launch_wgmma_columns<T, 4>(a, stream) : launch_wgmma_rows<T, 4>(a, stream);
    case 5:
      return columns ? launch_wgmma_columns<T, 5>(a, stream) : launch_wgmma_rows<T, 5>(a, stream);
    default:
      return columns ? launch_wgmma_columns<T, 8>(a, stream) : launch_wgmma_rows<T, 8>(a, stream);
  }
}

template <typename T>
Status dispatch(const Args& a, bool columns, void* stream) {
  if (a.wgmma && a.wide_loads && a.p.bias == nullptr) return dispatch_wgmma<T>(a, columns, stream);
  const int64_t smem = shared_bytes(a.p.dtype, a.p.D);
  switch (steps_of(a.p.dtype, a.p.D)) {
    case 4:
      return columns ? launch_columns<T, 4>(a, smem, stream) : launch_rows<T, 4>(a, smem, stream);
    case 5:
      return columns ? launch_columns<T, 5>(a, smem, stream) : launch_rows<T, 5>(a, smem, stream);
    case 8:
      return columns ? launch_columns<T, 8>(a, smem, stream) : launch_rows<T, 8>(a, smem, stream);
    default:
      return columns ? launch_columns<T, 16>(a, smem, stream) : launch_rows<T, 16>(a, smem, stream);
  }
}

Status run(const Args& in, bool columns, void* stream) {
  Args a = in;
  const int64_t element = dtype_bytes(a.p.dtype);
  a.wide_loads = aligned16(a.p.query, a.p.query_stride, a.p.D, element) && aligned16(a.p.key, a.p.key_stride, a.p.D, element);
  switch (a.p.dtype) {
    case DType::kFloat16:
      return dispatch<__half>(a, columns, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(a, columns, stream);
    case DType::kFloat32: {
      const int64_t smem = shared_bytes(a.p.dtype, a.p.D);
      return columns ? launch_columns<float, 0>(a, smem, stream) : launch_rows<float, 0>(a, smem, stream);
    }
    default:
      return Status::error("query and key must be float32, float16 or bfloat16");
  }
}

int tiles_of(int64_t n, int64_t rows) { return static_cast<int>((n + rows - 1) / rows); }

}  // namespace

Args make_args(const ScoreParams& p, int64_t row_splits, int64_t col_splits) {
  const int rows = stationary_rows(steps_of(p.dtype, p.D));
  const bool range_only = p.normalize == Normalize::kRange;
  const Parts parts = two_pass_parts(p, row_splits, col_splits);
  float* workspace = static_cast<float*>(p.workspace);
  Args a;
  a.p = p;
  a.weights = p.row_weights;
  a.weight_stride[0] = p.L;
  a.per_head = !is_linear(p);
  a.row_tiles = tiles_of(p.L, rows), a.row_splits = static_cast<int>(row_splits);
  a.key_tiles = tiles_of(p.range_end - p.range_begin, rows), a.col_splits = static_cast<int>(col_splits);
  a.scan_begin = range_only ? p.range_begin : 0;
  a.scan_end = range_only ? p.range_end : p.N;
  a.stats = parts.stats > 0 ? workspace : nullptr;
  a.split_stats = a.partial = workspace + parts.stats;  // the one is read before the other is written
  return a;
}

Status run_rows(const Args& a, void* stream) { return run(a, false, stream); }
Status run_columns(const Args& in, void* stream) {
  Args a = in;
  if (hides_keys(a.p)) {
    a.key_mask = static_cast<const uint8_t*>(a.p.bias), a.key_mask_stride = a.p.bias_stride[0];
    a.p.bias = nullptr;
  }
  return run(a, true, stream);
}

Status score_two_pass(const ScoreParams& p, const ScorePlan& plan, void* stream) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (p.D > kMaxDim) return Status::error("the plan's algorithm needs D <= 256");
  if (p.N >= kLimit || p.H / p.Hkv * p.L >= kLimit) return Status::error("N and H / Hkv * L must be below 2^31");
  if (p.query_reduction == Reduction::kNone && p.range_end > p.range_begin) return Status::error("the plan's algorithm reduces query rows");
  if (plan.row_splits < 1 || plan.col_splits < 1) return Status::error("the plan's splits must be positive");
  Args a = make_args(p, plan.row_splits, plan.col_splits);
  if (plan.wgmma && !takes_wgmma(p))
    return Status::error("the plan's wgmma needs 16-bit types, D <= 128, softmax, sums over rows and no bias");
  a.wgmma = plan.wgmma;
  a.with_lse = p.lse_in != nullptr && p.lse_out != nullptr;
  if (p.lse_in == nullptr && (a.stats != nullptr || p.lse_out != nullptr)) {
    const Status status = run_rows(a, stream);
    if (!status.ok()) return status;
  }
  return p.range_end > p.range_begin ? run_columns(a, stream) : Status::success();
}

Status launch_finish(const Args& a, void* stream) {
  const int64_t per_batch = (a.p.range_end - a.p.range_begin + 31) / 32;
  if (a.p.B * per_batch > 0x7fffffff) return Status::error("more than 2^31 - 1 blocks");
  return simt::launch(finish_kernel, dim3(static_cast<unsigned>(a.p.B * per_batch)), dim3(32 * kFinishGroups), 0, stream, a,
                      static_cast<int>(per_batch));
}

Status score_strip(const ScoreParams& p, const ScorePlan& plan, void* stream) {
  const int steps = steps_of(p.dtype, p.D);
  const int64_t scan = p.normalize == Normalize::kRange ? p.range_end - p.range_begin : p.N, warps = plan.threads / 32;
  const bool sums = p.query_reduction == Reduction::kMean || p.query_reduction == Reduction::kSum;
  if (steps != 4 && steps != 5) return Status::error("strips need float16 or bfloat16 and D <= 80");
  if (warps < 1 || warps > max_strip_warps(steps) || warps * kStripKeys < scan)
    return Status::error("the plan's strip does not hold the keys");
  if (p.lse_in != nullptr || !sums || p.activation != Activation::kSoftmax || (p.bias != nullptr && !hides_keys(p))) {
    return Status::error("strips sum over rows, with no bias but a mask of keys and no lse");
  }
  if (plan.rows_per_pass < 1 || plan.col_splits * plan.rows_per_pass < p.L) return Status::error("the plan's splits do not cover the rows");
  Args a = make_args(p, 1, plan.col_splits);
  a.partial = static_cast<float*>(p.workspace);
  a.rows_per_split = static_cast<int>(plan.rows_per_pass);
  const int64_t element = dtype_bytes(p.dtype);
  a.wide_loads = aligned16(p.query, p.query_stride, p.D, element) && aligned16(p.key, p.key_stride, p.D, element);
  if (p.bias != nullptr) a.key_mask = static_cast<const uint8_t*>(p.bias), a.key_mask_stride = p.bias_stride[0];
  const int w = static_cast<int>(warps);
  if (p.dtype == DType::kFloat16) return steps == 4 ? launch_strips<__half, 4>(a, w, stream) : launch_strips<__half, 5>(a, w, stream);
  return steps == 4 ? launch_strips<__nv_bfloat16, 4>(a, w, stream) : launch_strips<__nv_bfloat16, 5>(a, w, stream);
}

}  // namespace colsum
}  // namespace tokensieve

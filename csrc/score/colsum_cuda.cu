// Scores of all query rows on CUDA: parameters and plan -> kernel arguments, one or two launches.
#include "device/simt.h"
#include "score/colsum_args.h"

namespace tokensieve {
namespace colsum {
namespace {

bool aligned16(const void* p, const int64_t (&strides)[3], int64_t D, int64_t element) {
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) | D * element;
  for (int64_t stride : strides) bits |= stride * element;
  return bits % 16 == 0;
}

template <typename T>
Status dispatch(const Args& a, bool columns, void* stream) {
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
      return Status::error("attention_scores: query and key must be float32, float16 or bfloat16");
  }
}

int tiles_of(int64_t n, int64_t rows) { return static_cast<int>((n + rows - 1) / rows); }

// A bool bias of the keys alone hides them from every row: the second sweep leaves it to the last step and stays lean.
bool hides_keys(const ScoreParams& p) {
  const bool sums = p.query_reduction == Reduction::kMean || p.query_reduction == Reduction::kSum;
  return p.bias != nullptr && p.bias_dtype == DType::kBool && p.bias_stride[1] == 0 && p.bias_stride[2] == 0 && p.bias_stride[3] == 1 &&
         sums && p.activation == Activation::kSoftmax;
}

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
  if (p.D > kMaxDim) return Status::error("attention_scores: the plan's algorithm needs D <= 256");
  if (p.N >= kLimit || p.H / p.Hkv * p.L >= kLimit) return Status::error("attention_scores: N and H / Hkv * L must be below 2^31");
  if (p.query_reduction == Reduction::kNone && p.range_end > p.range_begin)
    return Status::error("attention_scores: the plan's algorithm reduces query rows");
  if (plan.row_splits < 1 || plan.col_splits < 1) return Status::error("attention_scores: the plan's splits must be positive");
  Args a = make_args(p, plan.row_splits, plan.col_splits);
  a.with_lse = p.lse_in != nullptr && p.lse_out != nullptr;
  if (p.lse_in == nullptr && (a.stats != nullptr || p.lse_out != nullptr)) {
    const Status status = run_rows(a, stream);
    if (!status.ok()) return status;
  }
  return p.range_end > p.range_begin ? run_columns(a, stream) : Status::success();
}

}  // namespace colsum
}  // namespace tokensieve

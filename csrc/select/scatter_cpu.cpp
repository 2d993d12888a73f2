// scatter_tokens on the CPU: base [B, N, M, W bytes] strided, index [B, K], values [B, K, M, W] strided -> [B, N, M, W] contiguous.
//
// Algorithm: a task owns a slice of the output rows of one batch row, looks up which value each takes, and writes every row once, in order:
//   a copy of the base row, a copy of the value row, or their sum (16 floats at a time, one fused multiply-add an element).
// Bytes: 2 B N M W, and B K M W more for an addition. Bound by memory. The gradient reads 2 B K M W and writes B K M W.
// Deterministic: the weight's gradient sums 16 lanes over the channels, tensor by tensor, then the fixed tree of reduce_add.
#include <cstring>

#include "core/simd_narrow.h"
#include "select/positions_cpu.h"
#include "select/scatter.h"

TS_ISA_BEGIN

constexpr int64_t kSliceRows = 1024;  // rows whose values are looked up together: 8 KB of stack
constexpr int64_t kSliceBytes = 64 << 10;

template <typename T>
TS_INLINE void add_elements(T* to, const T* base, const T* value, float weight, int64_t n) {
  const Vec w = splat(weight);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, fma(w, load(value + i), load(base + i)));
  if (i < n) store_n(to + i, fma(w, load_n(value + i, n - i), load_n(base + i, n - i)), n - i);
}

static void add_bytes(DType dtype, char* to, const char* base, const char* value, float weight, int64_t bytes) {
  if (dtype == DType::kFloat32) {
    add_elements(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(base), reinterpret_cast<const float*>(value), weight,
                 bytes / 4);
  } else if (dtype == DType::kFloat16) {
    add_elements(reinterpret_cast<Half*>(to), reinterpret_cast<const Half*>(base), reinterpret_cast<const Half*>(value), weight, bytes / 2);
  } else {
    add_elements(reinterpret_cast<BFloat*>(to), reinterpret_cast<const BFloat*>(base), reinterpret_cast<const BFloat*>(value), weight,
                 bytes / 2);
  }
}

TS_INLINE void copy_row(char* to, const char* from, int64_t segments, int64_t bytes, int64_t stride) {
  if (stride == bytes) bytes *= segments, segments = 1;
  for (int64_t m = 0; m < segments; ++m) memcpy(to + m * bytes, from + m * stride, static_cast<size_t>(bytes));
}

static void scatter_slice(const ScatterParams& p, const ScatterTensor& x, int64_t b, int64_t begin, int64_t end) {
  const int64_t row = x.segments * x.segment_bytes;
  int64_t source[kSliceRows];
  for (int64_t n = 0; n < end - begin; ++n) source[n] = -1;
  const int64_t* const index = p.index + b * p.index_stride;
  for (int64_t k = 0; k < p.K; ++k) {
    if (index[k] >= begin && index[k] < end) source[index[k] - begin] = k;
  }
  char* to = static_cast<char*>(x.dst) + (b * p.N + begin) * row;
  const char* base = static_cast<const char*>(x.base) + b * x.base_b + begin * x.base_n;
  for (int64_t n = 0; n < end - begin; ++n, to += row, base += x.base_n) {
    const int64_t k = source[n];
    const char* const value = static_cast<const char*>(x.value) + b * x.value_b + (k < 0 ? 0 : k) * x.value_n;
    if (k < 0) {
      copy_row(to, base, x.segments, x.segment_bytes, x.base_m);
    } else if (!p.add) {
      copy_row(to, value, x.segments, x.segment_bytes, x.value_m);
    } else {
      const float weight = p.weights != nullptr ? p.weights[b * p.K + k] : 1.0f;
      for (int64_t m = 0; m < x.segments; ++m) {
        add_bytes(x.dtype, to + m * x.segment_bytes, base + m * x.base_m, value + m * x.value_m, weight, x.segment_bytes);
      }
    }
  }
}

Status scatter_level(const ScatterParams& p, ParallelForFn threads) {
  for (int t = 0; t < p.num_tensors; ++t) {
    const ScatterTensor& x = p.tensors[t];
    const int64_t row = x.segments * x.segment_bytes;
    if (row == 0) continue;
    const int64_t rows = larger(32, smaller(kSliceRows, kSliceBytes / row));  // every slice looks through all K indices
    const int64_t slices = (p.N + rows - 1) / rows;
    parallel_for(threads, p.B * slices, 2, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % slices * rows;
        scatter_slice(p, x, i / slices, begin, smaller(begin + rows, p.N));
      }
    });
  }
  return Status::success();
}

// to = weight * grad where wanted; returns sum + grad * value where wanted.
template <typename T>
TS_INLINE Vec grad_elements(T* to, const T* grad, const T* value, float weight, int64_t n, Vec sum) {
  const Vec w = splat(weight);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const Vec g = left >= kLanes ? load(grad + i) : load_n(grad + i, left);
    if (value != nullptr) sum = fma(g, left >= kLanes ? load(value + i) : load_n(value + i, left), sum);
    if (to == nullptr) continue;
    if (left >= kLanes) {
      store(to + i, mul(w, g));
    } else {
      store_n(to + i, mul(w, g), left);
    }
  }
  return sum;
}

template <typename T>
static Vec grad_row(const ScatterParams& p, const ScatterTensor& x, int64_t b, int64_t k, int64_t n, float weight, Vec sum) {
  const int64_t row = x.segments * x.segment_bytes, width = x.segment_bytes / static_cast<int64_t>(sizeof(T));
  char* const to = static_cast<char*>(x.dst) + (b * p.K + k) * row;
  const char* const grad = static_cast<const char*>(x.base) + (b * p.N + n) * row;
  const char* const value = static_cast<const char*>(x.value) + b * x.value_b + k * x.value_n;
  for (int64_t m = 0; m < x.segments; ++m) {
    sum = grad_elements<T>(x.dst != nullptr ? reinterpret_cast<T*>(to + m * x.segment_bytes) : nullptr,
                           reinterpret_cast<const T*>(grad + m * x.segment_bytes),
                           p.weight_grad != nullptr ? reinterpret_cast<const T*>(value + m * x.value_m) : nullptr, weight, width, sum);
  }
  return sum;
}

static void grad_slot(const ScatterParams& p, int64_t b, int64_t k) {
  const int64_t n = p.index[b * p.index_stride + k];
  const float weight = p.weights != nullptr ? p.weights[b * p.K + k] : 1.0f;
  Vec sum = zero();
  for (int t = 0; t < p.num_tensors; ++t) {
    const ScatterTensor& x = p.tensors[t];
    const int64_t row = x.segments * x.segment_bytes;
    if (n < 0) {
      if (x.dst != nullptr) memset(static_cast<char*>(x.dst) + (b * p.K + k) * row, 0, static_cast<size_t>(row));
    } else if (x.dtype == DType::kFloat32) {
      sum = grad_row<float>(p, x, b, k, n, weight, sum);
    } else if (x.dtype == DType::kFloat16) {
      sum = grad_row<Half>(p, x, b, k, n, weight, sum);
    } else {
      sum = grad_row<BFloat>(p, x, b, k, n, weight, sum);
    }
  }
  if (p.weight_grad != nullptr) {
    float& out = p.weight_grad[b * p.K + k];
    out = p.add_to_weight_grad ? out + reduce_add(sum) : reduce_add(sum);
  }
}

Status scatter_grad_level(const ScatterParams& p, ParallelForFn threads) {
  parallel_for(threads, p.B * p.K, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) grad_slot(p, i / p.K, i % p.K);
  });
  return Status::success();
}

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status scatter_level(const ScatterParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status scatter_grad_level(const ScatterParams& params, ParallelForFn threads))

static Status check(const ScatterParams& p) {
  if (p.num_tensors < 0 || p.num_tensors > kMaxScatterTensors) return Status::error("at most 8 tensors per launch");
  return check_positions(p.index, p.index_stride, p.B, p.K, p.N);
}

Status scatter_cpu(const ScatterParams& params, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, scatter_level(params, threads))
}

Status scatter_grad_cpu(const ScatterParams& params, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, scatter_grad_level(params, threads))
}
}  // namespace tokensieve
#endif

// gather_tokens on the CPU: tensors[t] [B, N, M, W bytes] strided, index [B, K] -> [B, K, M, W] contiguous, -1 gives zeros; and its
// backward, scatter_rows.
//
// Algorithm: every tensor is cut into blocks of rows of about 64 KB; one parallel loop over the blocks of all tensors copies rows.
// Bytes: 2 B K M W a tensor (640 x 4096 floats of 2880: 21 MB); no flops. Bound by memory (L3 for small outputs).
// Rows of 1 to 16 bytes (masks, position ids) go through typed loops, all others through memcpy: on Zen 5 it was within 10% of the best
// of AVX2, AVX-512 and streaming stores at 144 x 16 KB, 640 x 16 KB and 3136 x 14 KB rows, so there is no vector code here.
// Deterministic. Indices are checked before anything is written.
#include <cstring>

#include "core/simd.h"
#include "select/gather.h"
#include "select/positions_cpu.h"

TS_ISA_BEGIN

constexpr int64_t kBlockBytes = 64 << 10;

struct Blocks {                            // one tensor's share of the parallel loop
  int64_t first = 0, count = 0, rows = 1;  // block numbers [first, first + count); rows a block
};

// Cuts `rows` rows of `bytes` bytes each; returns the first block number after this tensor.
TS_INLINE int64_t cut_blocks(Blocks& blocks, int64_t first, int64_t rows, int64_t bytes) {
  blocks.rows = bytes >= kBlockBytes ? 1 : kBlockBytes / (bytes + 8);
  blocks.first = first;
  blocks.count = bytes == 0 ? 0 : (rows + blocks.rows - 1) / blocks.rows;
  return first + blocks.count;
}

template <typename T>
TS_INLINE void copy_value(char* to, const char* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(T));
  __builtin_memcpy(to, &value, sizeof(T));
}

struct Sixteen {
  uint64_t low, high;
};

TS_INLINE void copy_segments(char* to, const char* from, int64_t segments, int64_t bytes, int64_t stride) {
  for (int64_t m = 0; m < segments; ++m) memcpy(to + m * bytes, from + m * stride, static_cast<size_t>(bytes));
}

// Rows [begin, end) of B * K, one value of T a row.
template <typename T>
static void gather_values(const GatherParams& p, const GatherTensor& x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t b = i / p.K, stop = smaller((b + 1) * p.K, end);
    const int64_t* const index = p.index + b * p.index_stride - b * p.K;
    const char* const from = static_cast<const char*>(x.src) + b * x.stride_b;
    const T none = {};
    for (; i < stop; ++i) {
      char* const to = static_cast<char*>(x.dst) + i * static_cast<int64_t>(sizeof(T));
      const int64_t n = index[i];
      copy_value<T>(to, n < 0 ? reinterpret_cast<const char*>(&none) : from + n * x.stride_n);
    }
  }
}

static void gather_rows(const GatherParams& p, const GatherTensor& x, int64_t begin, int64_t end) {
  const bool whole = x.segments == 1 || x.stride_m == x.segment_bytes;  // a token is one piece
  const int64_t row = x.segments * x.segment_bytes, segments = whole ? 1 : x.segments, bytes = whole ? row : x.segment_bytes;
  if (whole && row == 1) return gather_values<uint8_t>(p, x, begin, end);
  if (whole && row == 2) return gather_values<uint16_t>(p, x, begin, end);
  if (whole && row == 4) return gather_values<uint32_t>(p, x, begin, end);
  if (whole && row == 8) return gather_values<uint64_t>(p, x, begin, end);
  if (whole && row == 16) return gather_values<Sixteen>(p, x, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.K, n = p.index[b * p.index_stride + i % p.K];
    char* const to = static_cast<char*>(x.dst) + i * row;
    if (n < 0) {
      memset(to, 0, static_cast<size_t>(row));
    } else {
      copy_segments(to, static_cast<const char*>(x.src) + b * x.stride_b + n * x.stride_n, segments, bytes, x.stride_m);
    }
  }
}

Status gather_level(const GatherParams& p, ParallelForFn threads) {
  Blocks blocks[kMaxGatherTensors];
  int64_t total = 0;
  for (int t = 0; t < p.num_tensors; ++t)
    total = cut_blocks(blocks[t], total, p.B * p.K, p.tensors[t].segments * p.tensors[t].segment_bytes);
  parallel_for(threads, total, 2, [&](int64_t begin, int64_t end) {
    for (int t = 0; t < p.num_tensors; ++t) {
      const Blocks& own = blocks[t];
      const int64_t from = larger(begin, own.first), to = smaller(end, own.first + own.count);
      if (from < to) gather_rows(p, p.tensors[t], (from - own.first) * own.rows, smaller((to - own.first) * own.rows, p.B * p.K));
    }
  });
  return Status::success();
}

constexpr int64_t kScatterRows = 1024;  // rows of N whose sources are looked up together: 8 KB of stack

// Backward of one slice of rows [begin, end) of batch b: every row is written once, in order, with its source or zeros.
static void scatter_slice(const GatherParams& p, const GatherTensor& x, int64_t b, int64_t begin, int64_t end) {
  const int64_t row = x.segments * x.segment_bytes;
  int64_t source[kScatterRows];
  for (int64_t n = 0; n < end - begin; ++n) source[n] = -1;
  const int64_t* const index = p.index + b * p.index_stride;
  for (int64_t i = 0; i < p.K; ++i) {
    if (index[i] >= begin && index[i] < end) source[index[i] - begin] = i;
  }
  char* to = static_cast<char*>(x.dst) + (b * p.N + begin) * row;
  const char* const from = static_cast<const char*>(x.src) + b * p.K * row;
  for (int64_t n = 0; n < end - begin; ++n, to += row) {
    if (source[n] < 0) {
      memset(to, 0, static_cast<size_t>(row));
    } else {
      memcpy(to, from + source[n] * row, static_cast<size_t>(row));
    }
  }
}

Status scatter_rows_level(const GatherParams& p, ParallelForFn threads) {
  for (int t = 0; t < p.num_tensors; ++t) {
    const GatherTensor& x = p.tensors[t];
    const int64_t row = x.segments * x.segment_bytes;
    if (row == 0) continue;
    const int64_t rows = larger(32, smaller(kScatterRows, kBlockBytes / row));  // every slice looks through all K indices
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

TS_ISA_END

#if TS_ISA_LEVEL == 0
namespace tokensieve {
TS_CPU_LEVELS(Status gather_level(const GatherParams& params, ParallelForFn threads))
TS_CPU_LEVELS(Status scatter_rows_level(const GatherParams& params, ParallelForFn threads))

static Status check(const GatherParams& p) {
  if (p.num_tensors < 0 || p.num_tensors > kMaxGatherTensors) return Status::error("at most 8 tensors per launch");
  return check_positions(p.index, p.index_stride, p.B, p.K, p.N);
}

Status gather_cpu(const GatherParams& params, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, gather_level(params, threads))
}

Status scatter_rows_cpu(const GatherParams& params, CpuLevel level, ParallelForFn threads) {
  const Status status = check(params);
  if (!status.ok()) return status;
  TS_CPU_SWITCH(level, scatter_rows_level(params, threads))
}
}  // namespace tokensieve
#endif

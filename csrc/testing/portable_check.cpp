// Runs the CPU kernels on generated inputs and prints a hash of every output. The same hash must come from every instruction level and
// every processor (tests/packaging/test_portable_build.py builds it with and without the x86 levels, and for aarch64 where it can).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "merge/match.h"
#include "score/pagerank.h"
#include "score/score.h"
#include "select/count.h"
#include "select/gather.h"
#include "select/quantiles.h"
#include "select/samples.h"
#include "select/topk.h"
#include "similarity/cosine.h"
#include "similarity/diverse.h"

namespace {

using namespace tokensieve;

struct Generator {  // xorshift64
  uint64_t state = 88172645463325252ull;
  float next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<float>(static_cast<double>(state >> 40) / (1 << 22)) - 2.0f;
  }
};

struct Hash {  // FNV-1a
  uint64_t value = 1469598103934665603ull;
  void add(const void* data, size_t bytes) {
    const unsigned char* at = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < bytes; ++i) value = (value ^ at[i]) * 1099511628211ull;
  }
};

std::vector<unsigned char> random_values(Generator& random, int64_t count, DType dtype) {
  std::vector<unsigned char> out(static_cast<size_t>(count * dtype_bytes(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const float x = random.next();
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == DType::kFloat32) {
      std::memcpy(&out[static_cast<size_t>(4 * i)], &bits, 4);
      continue;
    }
    const int exponent = static_cast<int>((bits >> 23) & 255) - 112;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t half = exponent <= 0 ? sign : sign | static_cast<uint32_t>(exponent) << 10 | ((bits >> 13) & 0x3ffu);
    const uint16_t narrow = static_cast<uint16_t>(dtype == DType::kBFloat16 ? bits >> 16 : half);
    std::memcpy(&out[static_cast<size_t>(2 * i)], &narrow, 2);
  }
  return out;
}

const char* run(DType dtype, int64_t L, int64_t D, CpuLevel level, Generator& random, Hash& hash) {
  constexpr int64_t B = 2, H = 4, Hkv = 2, N = 333, K = 40;
  const auto query = random_values(random, B * H * L * D, dtype), key = random_values(random, B * Hkv * N * D, dtype);
  ScoreParams p;
  p.query = query.data(), p.key = key.data(), p.dtype = dtype;
  p.B = B, p.H = H, p.Hkv = Hkv, p.L = L, p.N = N, p.D = D;
  p.query_stride[0] = H * L * D, p.query_stride[1] = L * D, p.query_stride[2] = D;
  p.key_stride[0] = Hkv * N * D, p.key_stride[1] = N * D, p.key_stride[2] = D;
  p.range_begin = 10, p.range_end = 300, p.scale = 0.2f, p.causal = true;
  const int64_t R = p.range_end - p.range_begin;
  std::vector<float> scores(static_cast<size_t>(B * R)), lse(static_cast<size_t>(B * H * L));
  p.scores = scores.data(), p.lse_out = lse.data();
  const ScorePlan score_plan = score_plan_cpu(p);
  TopkParams t;
  t.scores = scores.data(), t.B = B, t.N = R, t.K = K, t.score_stride = R, t.offset = p.range_begin;
  t.order = L % 2 ? TopkOrder::kScore : TopkOrder::kPosition;
  std::vector<int64_t> index(static_cast<size_t>(B * K));
  t.index = index.data();
  const TopkPlan topk_plan = topk_plan_cpu(t);
  const int64_t bytes = score_plan.workspace_bytes > topk_plan.workspace_bytes ? score_plan.workspace_bytes : topk_plan.workspace_bytes;
  void* workspace = std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64));
  p.workspace = t.workspace = workspace;
  GatherParams g;
  std::vector<unsigned char> rows(static_cast<size_t>(B * K * D * dtype_bytes(dtype)));
  g.tensors[0] = {key.data(), rows.data(), Hkv * N * D * dtype_bytes(dtype), D * dtype_bytes(dtype), 0, 1, D * dtype_bytes(dtype)};
  g.num_tensors = 1, g.index = index.data(), g.index_stride = K, g.B = B, g.N = N, g.K = K;
  Status status = score_cpu(p, score_plan, level, nullptr);
  if (status.ok()) status = topk_cpu(t, topk_plan, level, nullptr);
  if (status.ok()) status = gather_cpu(g, level, nullptr);
  std::free(workspace);
  hash.add(scores.data(), scores.size() * sizeof(float));
  hash.add(lse.data(), lse.size() * sizeof(float));
  hash.add(index.data(), index.size() * sizeof(int64_t));
  hash.add(rows.data(), rows.size());
  return status.message;
}

const char* run_similarity(DType dtype, int64_t C, CpuLevel level, Generator& random, Hash& hash) {
  constexpr int64_t B = 2, M = 150, N = 170, K = 30, T = 3;
  const auto a = random_values(random, B * M * C, dtype), b = random_values(random, B * N * C, dtype);
  CosineParams p;
  p.a = a.data(), p.b = b.data(), p.dtype = dtype;
  p.B = B, p.M = M, p.N = N, p.C = C, p.T = T;
  p.a_stride[0] = M * C, p.b_stride[0] = N * C, p.a_stride[1] = p.b_stride[1] = C;
  std::vector<float> value(static_cast<size_t>(B * M * T));
  std::vector<int64_t> index(static_cast<size_t>(B * M * T)), picks(static_cast<size_t>(B * K));
  p.value = value.data(), p.index = index.data();
  DiverseParams x;
  x.x = b.data(), x.dtype = dtype, x.B = B, x.N = N, x.C = C, x.K = K, x.index = picks.data();
  x.x_stride[0] = N * C, x.x_stride[1] = C, x.order = DiverseOrder::kPick;
  const DiversePlan plan = diverse_plan_cpu(x);
  const int64_t bytes = plan.workspace_bytes + cosine_plan_cpu(p).workspace_bytes;  // enough for either, and for kMean
  void* workspace = std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64));
  p.workspace = x.workspace = workspace;
  Status status;
  for (const CosineReduction reduction : {CosineReduction::kMatch, CosineReduction::kMean}) {
    p.reduction = reduction;
    if (status.ok()) status = cosine_cpu(p, cosine_plan_cpu(p), level, nullptr);
    hash.add(value.data(), value.size() * sizeof(float));
  }
  if (status.ok()) status = diverse_cpu(x, plan, level, nullptr);
  std::free(workspace);
  hash.add(index.data(), index.size() * sizeof(int64_t));
  hash.add(picks.data(), picks.size() * sizeof(int64_t));
  return status.message;
}

struct Workspace {
  void* at = nullptr;
  explicit Workspace(int64_t bytes) : at(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(at); }
};

template <class Value>
void add(Hash& hash, const std::vector<Value>& values) {
  hash.add(values.data(), values.size() * sizeof(Value));
}

// What depends on the values of a row: quantiles, top-p counts, inverse-cdf samples.
const char* run_rows(DType dtype, int64_t N, CpuLevel level, Generator& random, Hash& hash) {
  constexpr int64_t B = 3, R = 50;
  const auto scores = random_values(random, B * N, dtype);
  TopkParams rows;
  rows.scores = scores.data(), rows.B = B, rows.N = N, rows.score_stride = N, rows.dtype = dtype;
  QuantilesParams q;
  q.rows = rows, q.Q = 3, q.q[0] = 0.25f, q.q[1] = 0.5f, q.q[2] = 0.9f;
  CountParams c;
  c.rows = rows, c.level = 0.7, c.max_k = N, c.capacity = N;
  SamplesParams s;
  s.rows = rows, s.R = R, s.capacity = R;
  std::vector<float> quantiles(static_cast<size_t>(B * q.Q));
  std::vector<int64_t> counts(B), take(B), picks(static_cast<size_t>(B * R), -1), picked(B);
  bool overflow[B] = {};
  q.out = quantiles.data(), c.counts = counts.data(), c.take = take.data(), c.overflow = overflow;
  s.index = picks.data(), s.counts = picked.data(), s.overflow = overflow;
  const QuantilesPlan quantiles_plan = quantiles_plan_cpu(q);
  const CountPlan count_plan = count_plan_cpu(c);
  const SamplesPlan samples_plan = samples_plan_cpu(s);
  const Workspace workspace(quantiles_plan.workspace_bytes + count_plan.workspace_bytes + samples_plan.workspace_bytes);
  q.workspace = c.workspace = s.workspace = workspace.at;
  Status status = quantiles_cpu(q, quantiles_plan, level, nullptr);
  if (status.ok()) status = count_cpu(c, count_plan, level, nullptr);
  if (status.ok()) status = samples_cpu(s, samples_plan, level, nullptr);
  add(hash, quantiles), add(hash, counts), add(hash, take), add(hash, picks), add(hash, picked);
  return status.message;
}

const char* run_tokens(DType dtype, int64_t D, CpuLevel level, Generator& random, Hash& hash) {
  constexpr int64_t B = 2, H = 2, N = 101, r = 30;
  const auto query = random_values(random, B * H * N * D, dtype), key = random_values(random, B * H * N * D, dtype);
  PagerankParams p;
  p.query = query.data(), p.key = key.data(), p.dtype = dtype, p.B = B, p.H = p.Hkv = H, p.N = N, p.D = D, p.scale = 0.3f;
  MatchParams m;
  m.metric = key.data(), m.dtype = dtype, m.B = B, m.H = H, m.N = N, m.D = D, m.S = (N + 1) / 2, m.T = N / 2, m.r = r;
  p.query_stride[0] = p.key_stride[0] = m.metric_stride[0] = H * N * D;
  p.query_stride[1] = p.key_stride[1] = m.metric_stride[1] = N * D;
  p.query_stride[2] = p.key_stride[2] = m.metric_stride[2] = D;
  std::vector<float> rank(static_cast<size_t>(B * H * N)), similarity(static_cast<size_t>(B * r));
  std::vector<int64_t> source(static_cast<size_t>(B * r)), destination(source), index(static_cast<size_t>(B * m.rows()));
  std::vector<int64_t> inverse(static_cast<size_t>(B * N));
  p.rank = rank.data(), m.source = source.data(), m.destination = destination.data(), m.similarity = similarity.data();
  m.index = index.data(), m.inverse = inverse.data();
  const PagerankPlan pagerank_plan = pagerank_plan_cpu(p);
  const MatchPlan match_plan = match_plan_cpu(m);
  const Workspace workspace(pagerank_plan.workspace_bytes + match_plan.workspace_bytes);
  p.workspace = m.workspace = workspace.at;
  Status status = pagerank_cpu(p, pagerank_plan, level, nullptr);
  if (status.ok()) status = match_cpu(m, match_plan, level, nullptr);
  add(hash, rank), add(hash, source), add(hash, destination), add(hash, similarity), add(hash, index), add(hash, inverse);
  return status.message;
}

}  // namespace

int main(int argc, char** argv) {
  const CpuLevel level = static_cast<CpuLevel>(argc > 1 ? std::atoi(argv[1]) : 0);
  Generator random;
  Hash hash;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t L : {1, 3, 17, 60}) {  // few rows by lanes and by panels, all rows by strips
      for (const int64_t D : {20, 64, 128}) {
        if (const char* message = run(dtype, L, D, level, random, hash)) {
          std::puts(message);
          return 1;
        }
      }
    }
    for (const int64_t C : {7, 130}) {
      if (const char* message = run_similarity(dtype, C, level, random, hash)) {
        std::puts(message);
        return 1;
      }
    }
    for (const int64_t width : {17, 600}) {
      const char* message = run_rows(dtype, width, level, random, hash);
      if (!message) message = run_tokens(dtype, width / 8, level, random, hash);
      if (message) {
        std::puts(message);
        return 1;
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash.value));
}

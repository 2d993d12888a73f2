// CPU implementations of the ops, and the run-time choice of instruction level.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "bind/budget_ops.h"
#include "bind/complement_ops.h"
#include "bind/gather_ops.h"
#include "bind/match_ops.h"
#include "bind/merge_ops.h"
#include "bind/pack_ops.h"
#include "bind/pagerank_ops.h"
#include "bind/pool_ops.h"
#include "bind/prune_ops.h"
#include "bind/quantile_ops.h"
#include "bind/sample_ops.h"
#include "bind/scatter_ops.h"
#include "bind/score_grad_ops.h"
#include "bind/score_ops.h"
#include "bind/select_ops.h"
#include "bind/similarity_ops.h"

namespace tokensieve::bind {
namespace {

CpuLevel detected_level() {
#if defined(TS_HAVE_X86_LEVELS)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return CpuLevel::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? CpuLevel::kAvx512 : CpuLevel::kAvx2;
#else
  return CpuLevel::kBaseline;
#endif
}

std::atomic<int> current_level{static_cast<int>(detected_level())};

CpuLevel level() { return static_cast<CpuLevel>(current_level.load(std::memory_order_relaxed)); }

int64_t best_cpu_level() { return static_cast<int64_t>(detected_level()); }

int64_t cpu_level() { return current_level.load(std::memory_order_relaxed); }

void set_cpu_level(int64_t wanted) {
  const int64_t best = best_cpu_level();
  if (wanted < 0 || wanted > best) fail("set_cpu_level", "level must be in [0, ", best, "] on this machine, got ", wanted);
  current_level.store(static_cast<int>(wanted), std::memory_order_relaxed);
}

void torch_threads(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(context, from, to); });
}

// Fresh memory above 4 MB faults page by page (gather of 3136 x 3584 floats: 50 ms cold, 12 ms with huge pages).
void advise_huge_pages(const Tensor& t) {
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < (size_t{4} << 20)) return;
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice only; failure changes nothing
}

// Scratch memory of one call. Small ones live in a block that the calling thread keeps (an allocation is 0.4 of a call's 2 us; an op does
// not call another op, so nobody else uses it meanwhile), larger ones come from torch's allocator.
void* scratch(const Tensor& like, int64_t bytes, Tensor& keep) {
  struct alignas(64) Block {
    unsigned char bytes[256 << 10];
  };
  if (bytes <= static_cast<int64_t>(sizeof(Block))) {
    static thread_local std::unique_ptr<Block> block;
    if (!block) block.reset(new Block);
    return block->bytes;
  }
  keep = allocate_like(like, {bytes}, aoti_torch_dtype_uint8());
  advise_huge_pages(keep);
  return keep.mutable_data_ptr();
}

struct CpuBackend {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static void allocated(const Tensor& t) { advise_huge_pages(t); }

  // Plans, brings the workspace, launches: all that a family needs of a back end.
  template <typename Params, typename Plan>
  static Status run(Plan (*plan_of)(const Params&), Status (*launch)(const Params&, const Plan&, CpuLevel, ParallelForFn), Params& p,
                    const Tensor& like) {
    const Plan plan = plan_of(p);
    Tensor keep = like;
    p.workspace = scratch(like, plan.workspace_bytes, keep);
    return launch(p, plan, level(), torch_threads);
  }

  static Status score(ScoreParams& p, const Tensor& like) { return run(score_plan_cpu, score_cpu, p, like); }
  static Status pack(PackParams& p, const Tensor& like) { return run(pack_plan_cpu, pack_cpu, p, like); }
  static Status pagerank(PagerankParams& p, const Tensor& like) { return run(pagerank_plan_cpu, pagerank_cpu, p, like); }
  static Status score_grad(ScoreGradParams& p, const Tensor& like) { return run(score_grad_plan_cpu, score_grad_cpu, p, like); }
  static Status topk(TopkParams& p, const Tensor& like) { return run(topk_plan_cpu, topk_cpu, p, like); }
  static Status count(CountParams& p, const Tensor& like) { return run(count_plan_cpu, count_cpu, p, like); }
  static Status budget(const BudgetParams& p, const Tensor&) { return budget_cpu(p, level(), torch_threads); }
  static Status cosine(CosineParams& p, const Tensor& like) { return run(cosine_plan_cpu, cosine_cpu, p, like); }
  static Status density(DensityParams& p, const Tensor& like) { return run(density_plan_cpu, density_cpu, p, like); }
  static Status nearest(NearestParams& p, const Tensor& like) { return run(nearest_plan_cpu, nearest_cpu, p, like); }
  static Status diverse(DiverseParams& p, const Tensor& like) { return run(diverse_plan_cpu, diverse_cpu, p, like); }
  static Status match(MatchParams& p, const Tensor& like) { return run(match_plan_cpu, match_cpu, p, like); }
  static Status samples(SamplesParams& p, const Tensor& like) { return run(samples_plan_cpu, samples_cpu, p, like); }
  static Status quantiles(QuantilesParams& p, const Tensor& like) { return run(quantiles_plan_cpu, quantiles_cpu, p, like); }
  static Status complement(ComplementParams& p, const Tensor& like) { return run(complement_plan_cpu, complement_cpu, p, like); }
  static Status gather(const GatherParams& p, const Tensor&) { return gather_cpu(p, level(), torch_threads); }
  static Status scatter(const GatherParams& p, const Tensor&) { return scatter_rows_cpu(p, level(), torch_threads); }

  static Status merge(MergeParams& p, const Tensor& like) { return run(merge_plan_cpu, merge_cpu, p, like); }
  static Status merge_grad(MergeParams& p, const Tensor& like) { return run(merge_plan_cpu, merge_grad_cpu, p, like); }

  static Status pool(PoolParams& p, const Tensor& like) { return run(pool_plan_cpu, pool_cpu, p, like); }
  static Status pool_grad(PoolParams& p, const Tensor& like) { return run(pool_grad_plan_cpu, pool_grad_cpu, p, like); }
  static Status runs(RunsParams& p, const Tensor& like) { return run(runs_plan_cpu, runs_cpu, p, like); }
  static Status runs_grad(RunsParams& p, const Tensor& like) { return run(runs_plan_cpu, runs_grad_cpu, p, like); }
  static Status means(MeansParams& p, const Tensor& like) { return run(means_plan_cpu, means_cpu, p, like); }
  static Status means_grad(MeansParams& p, const Tensor& like) { return run(means_plan_cpu, means_grad_cpu, p, like); }

  static Status scatter_tokens(const ScatterParams& p, const Tensor&) { return scatter_cpu(p, level(), torch_threads); }
  static Status scatter_grad(const ScatterParams& p, const Tensor&) { return scatter_grad_cpu(p, level(), torch_threads); }

  static Status prune(ScoreParams& s, TopkParams& t, const GatherParams& g, const Tensor& like) {
    const ScorePlan score_plan = score_plan_cpu(s);
    const TopkPlan topk_plan = topk_plan_cpu(t);
    Tensor keep = like;  // the two steps follow each other, so they share one scratch buffer
    s.workspace = t.workspace = scratch(like, std::max(score_plan.workspace_bytes, topk_plan.workspace_bytes), keep);
    Status status = score_cpu(s, score_plan, level(), torch_threads);
    if (status.ok()) status = topk_cpu(t, topk_plan, level(), torch_threads);
    return status.ok() ? gather_cpu(g, level(), torch_threads) : status;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokensieve, CPU, m) {
  m.impl("attention_scores", TORCH_BOX(&attention_scores<CpuBackend>));
  m.impl("attention_lse", TORCH_BOX(&attention_lse<CpuBackend>));
  m.impl("attention_pagerank", TORCH_BOX(&attention_pagerank<CpuBackend>));
  m.impl("attention_scores_backward", TORCH_BOX(&attention_scores_backward<CpuBackend>));
  m.impl("select_topk", TORCH_BOX(&select_topk<CpuBackend>));
  m.impl("select_mass", TORCH_BOX(&select_mass<CpuBackend>));
  m.impl("select_threshold", TORCH_BOX(&select_threshold<CpuBackend>));
  m.impl("allocate_budget", TORCH_BOX(&allocate_budget<CpuBackend>));
  m.impl("select_samples", TORCH_BOX(&select_samples<CpuBackend>));
  m.impl("score_quantiles", TORCH_BOX(&score_quantiles<CpuBackend>));
  m.impl("complement_index", TORCH_BOX(&complement_index<CpuBackend>));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens<CpuBackend>));
  m.impl("gather_tokens_out", TORCH_BOX(&gather_tokens_out<CpuBackend>));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward<CpuBackend>));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens<CpuBackend>));
  m.impl("scatter_tokens_backward", TORCH_BOX(&scatter_tokens_backward<CpuBackend>));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens<CpuBackend>));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward<CpuBackend>));
  m.impl("unmerge_tokens", TORCH_BOX(&unmerge_tokens<CpuBackend>));
  m.impl("unmerge_tokens_backward", TORCH_BOX(&unmerge_tokens_backward<CpuBackend>));
  m.impl("merge_by_label", TORCH_BOX(&merge_by_label<CpuBackend>));
  m.impl("fuse_dropped", TORCH_BOX(&fuse_dropped<CpuBackend>));
  m.impl("merge_by_label_backward", TORCH_BOX(&merge_by_label_backward<CpuBackend>));
  m.impl("sum_pairs", TORCH_BOX(&sum_pairs<CpuBackend>));
  m.impl("pair_dots", TORCH_BOX(&pair_dots<CpuBackend>));
  m.impl("pool_grid", TORCH_BOX(&pool_grid<CpuBackend>));
  m.impl("pool_grid_backward", TORCH_BOX(&pool_grid_backward<CpuBackend>));
  m.impl("pool_runs", TORCH_BOX(&pool_runs<CpuBackend>));
  m.impl("pool_runs_backward", TORCH_BOX(&pool_runs_backward<CpuBackend>));
  m.impl("row_column_means", TORCH_BOX(&row_column_means<CpuBackend>));
  m.impl("row_column_means_backward", TORCH_BOX(&row_column_means_backward<CpuBackend>));
  m.impl("pack_index", TORCH_BOX(&pack_index<CpuBackend>));
  m.impl("prune_tokens", TORCH_BOX(&prune_tokens<CpuBackend>));
  m.impl("cosine_match", TORCH_BOX(&cosine_match<CpuBackend>));
  m.impl("cosine_scores", TORCH_BOX(&cosine_scores<CpuBackend>));
  m.impl("bipartite_match", TORCH_BOX(&bipartite_match<CpuBackend>));
  m.impl("knn_density", TORCH_BOX(&knn_density<CpuBackend>));
  m.impl("nearest_center", TORCH_BOX(&nearest_center<CpuBackend>));
  m.impl("select_diverse", TORCH_BOX(&select_diverse<CpuBackend>));
}

STABLE_TORCH_LIBRARY_IMPL(tokensieve, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("best_cpu_level", TORCH_BOX(&best_cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
}

}  // namespace tokensieve::bind

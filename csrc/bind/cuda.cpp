// CUDA implementations of the ops: device guard, current stream, scratch, semaphores. Built against CPU torch; the one CUDA symbol of
// torch is weak, so a torch without CUDA still loads the file (and never calls it).
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

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

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tokensieve::bind {
namespace {

int32_t device_of(const Tensor& t) {
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  return index;
}

void* current_stream(const Tensor& like) {
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("cuda", "this torch has no CUDA: its libtorch lacks the current-stream symbol");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_of(like), &stream));
  return stream;
}

#if defined(TOKENSIEVE_SM90A)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif
std::atomic<bool> wgmma_wanted{false};

void set_wgmma(bool wanted) {
  if (wanted && !kHasWgmma) fail("set_wgmma", "this library was not built for sm_90a");
  wgmma_wanted.store(wanted, std::memory_order_relaxed);
}

DeviceInfo device_info(const Tensor& like) {
  static std::mutex mutex;
  static std::map<int32_t, DeviceInfo> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const int32_t device = device_of(like);
  const auto with_wgmma = [](DeviceInfo info) {
    info.wgmma = info.compute_capability == 90 && wgmma_wanted.load(std::memory_order_relaxed);
    return info;
  };
  if (const auto found = known.find(device); found != known.end()) return with_wgmma(found->second);
  int major = 0, minor = 0, sms = 0, smem = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) fail("cuda", "cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return with_wgmma(known[device] = {10 * major + minor, sms, smem});
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  (void)cudaGetLastError();  // asked of the default stream while another one captures, which is no harm to either
  return false;
}

// Zeroed memory of the current device for a captured call, written before the graph runs: a memset in the graph would cost every replay a
// launch (about 1 us beside kernels of 5). It lives as long as the process, for graphs keep its address; 128 bytes and more a captured call.
// Allocating and zeroing under capture is what the relaxed mode is for, on a stream that does not capture. Null where it failed.
int32_t* graph_zeros(int32_t device, int64_t count) {
  struct Chunk {
    int32_t* next;
    int64_t left;
  };
  static std::mutex mutex;
  static std::map<int32_t, Chunk> chunks;
  const std::lock_guard<std::mutex> lock(mutex);
  Chunk& chunk = chunks[device];
  const int64_t wanted = (count + 31) / 32 * 32;
  if (chunk.left < wanted) {
    const int64_t size = std::max<int64_t>(wanted, 1 << 16);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) return nullptr;
    error = cudaMalloc(&memory, static_cast<size_t>(size) * 4);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, static_cast<size_t>(size) * 4, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (stream != nullptr) (void)cudaStreamDestroy(stream);
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return nullptr;
    }
    chunk = {static_cast<int32_t*>(memory), size};
  }
  int32_t* const taken = chunk.next;
  chunk.next += wanted;
  chunk.left -= wanted;
  return taken;
}

int32_t* zeros(const Tensor& like, int64_t count, Tensor& keep) {
  keep = torch::stable::new_zeros(like, {count}, ScalarType::Int);
  return static_cast<int32_t*>(keep.mutable_data_ptr());
}

// Semaphores are zero between calls (the last block resets them), so one zeroed buffer per stream serves every call on it. Calls on one
// stream never overlap. Buffers that grew out stay alive: work in flight may still use them. A captured call has some of its own: graphs are
// replayed in any order and on any stream, and a zeroing that was captured has not happened yet.
int32_t* semaphores(const Tensor& like, void* stream, int64_t count, Tensor& keep) {
  if (count == 0) return nullptr;
  if (is_capturing(stream)) {
    int32_t* const own = graph_zeros(device_of(like), count);
    return own != nullptr ? own : zeros(like, count, keep);
  }
  struct Pool {
    Tensor tensor;
    int64_t size;
  };
  static std::mutex mutex;
  static auto* pools = new std::map<std::pair<int32_t, void*>, std::vector<Pool>>;  // never destroyed: CUDA may be gone before statics are
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<Pool>& pool = (*pools)[{device_of(like), stream}];
  if (pool.empty() || pool.back().size < count) {
    const int64_t size = count < 4096 ? 4096 : 2 * count;
    Tensor tensor = like;
    (void)zeros(like, size, tensor);
    pool.push_back({tensor, size});
  }
  return static_cast<int32_t*>(pool.back().tensor.mutable_data_ptr());
}

void* scratch(const Tensor& like, int64_t bytes, Tensor& keep) {
  if (bytes == 0) return nullptr;
  keep = allocate_like(like, {bytes}, aoti_torch_dtype_uint8());
  return keep.mutable_data_ptr();
}

template <typename Plan, typename = void>
struct has_semaphores : std::false_type {};
template <typename Plan>
struct has_semaphores<Plan, std::void_t<decltype(Plan::num_semaphores)>> : std::true_type {};

struct CudaBackend {
  struct Guard {
    explicit Guard(const Tensor& t) : guard(device_of(t)) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  static void allocated(const Tensor&) {}

  // Plans, brings workspace and semaphores, launches: all that a family needs of a back end.
  template <typename Params, typename Plan>
  static Status run(Plan (*plan_of)(const Params&, const DeviceInfo&), Status (*launch)(const Params&, const Plan&, void*), Params& p,
                    const Tensor& like) {
    void* stream = current_stream(like);
    const Plan plan = plan_of(p, device_info(like));
    Tensor keep = like, counters = like;
    p.workspace = scratch(like, plan.workspace_bytes, keep);
    if constexpr (has_semaphores<Plan>::value) p.semaphores = semaphores(like, stream, plan.num_semaphores, counters);
    return launch(p, plan, stream);
  }

  static Status score(ScoreParams& p, const Tensor& like) { return run(score_plan_cuda, score_cuda, p, like); }
  static Status pagerank(PagerankParams& p, const Tensor& like) { return run(pagerank_plan_cuda, pagerank_cuda, p, like); }
  static Status pack(PackParams& p, const Tensor& like) { return run(pack_plan_cuda, pack_cuda, p, like); }
  static Status samples(SamplesParams& p, const Tensor& like) { return run(samples_plan_cuda, samples_cuda, p, like); }
  static Status quantiles(QuantilesParams& p, const Tensor& like) { return run(quantiles_plan_cuda, quantiles_cuda, p, like); }
  static Status complement(ComplementParams& p, const Tensor& like) { return run(complement_plan_cuda, complement_cuda, p, like); }
  static Status score_grad(ScoreGradParams& p, const Tensor& like) { return run(score_grad_plan_cuda, score_grad_cuda, p, like); }
  static Status topk(TopkParams& p, const Tensor& like) { return run(topk_plan_cuda, topk_cuda, p, like); }
  static Status count(CountParams& p, const Tensor& like) { return run(count_plan_cuda, count_cuda, p, like); }

  static Status budget(const BudgetParams& p, const Tensor& like) {
    return budget_cuda(p, budget_plan_cuda(p, device_info(like)), current_stream(like));
  }

  static Status cosine(CosineParams& p, const Tensor& like) { return run(cosine_plan_cuda, cosine_cuda, p, like); }
  static Status density(DensityParams& p, const Tensor& like) { return run(density_plan_cuda, density_cuda, p, like); }
  static Status nearest(NearestParams& p, const Tensor& like) { return run(nearest_plan_cuda, nearest_cuda, p, like); }
  static Status diverse(DiverseParams& p, const Tensor& like) { return run(diverse_plan_cuda, diverse_cuda, p, like); }
  static Status match(MatchParams& p, const Tensor& like) { return run(match_plan_cuda, match_cuda, p, like); }

  static Status gather(const GatherParams& p, const Tensor& like) {
    return gather_cuda(p, gather_plan_cuda(p, device_info(like)), current_stream(like));
  }

  static Status scatter(const GatherParams& p, const Tensor& like) {
    return scatter_rows_cuda(p, gather_plan_cuda(p, device_info(like)), current_stream(like));
  }

  static Status merge(MergeParams& p, const Tensor& like) { return run(merge_plan_cuda, merge_cuda, p, like); }
  static Status merge_grad(MergeParams& p, const Tensor& like) { return run(merge_grad_plan_cuda, merge_grad_cuda, p, like); }
  static Status pool(PoolParams& p, const Tensor& like) { return run(pool_plan_cuda, pool_cuda, p, like); }
  static Status pool_grad(PoolParams& p, const Tensor& like) { return run(pool_grad_plan_cuda, pool_grad_cuda, p, like); }
  static Status runs(RunsParams& p, const Tensor& like) { return run(runs_plan_cuda, runs_cuda, p, like); }
  static Status runs_grad(RunsParams& p, const Tensor& like) { return run(runs_grad_plan_cuda, runs_grad_cuda, p, like); }
  static Status means(MeansParams& p, const Tensor& like) { return run(means_plan_cuda, means_cuda, p, like); }
  static Status means_grad(MeansParams& p, const Tensor& like) { return run(means_grad_plan_cuda, means_grad_cuda, p, like); }

  static Status scatter_tokens(const ScatterParams& p, const Tensor& like) {
    return scatter_cuda(p, scatter_plan_cuda(p, device_info(like)), current_stream(like));
  }

  static Status scatter_grad(const ScatterParams& p, const Tensor& like) { return scatter_grad_cuda(p, current_stream(like)); }

  static Status prune(ScoreParams& s, TopkParams& t, const GatherParams& g, const Tensor& like) {
    const DeviceInfo device = device_info(like);
    void* stream = current_stream(like);
    const ScorePlan score_plan = score_plan_cuda(s, device);
    const TopkPlan topk_plan = topk_plan_cuda(t, device);
    Tensor keep = like, counters = like;  // stream order separates the two launches, so they share one scratch buffer
    s.workspace = t.workspace = scratch(like, std::max(score_plan.workspace_bytes, topk_plan.workspace_bytes), keep);
    s.semaphores = semaphores(like, stream, score_plan.num_semaphores, counters);
    const Status status = score_cuda(s, score_plan, stream);
    return status.ok() ? topk_gather_cuda(t, topk_plan, g, topk_gather_plan_cuda(g, topk_plan, device), stream) : status;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokensieve, CUDA, m) {
  m.impl("attention_scores", TORCH_BOX(&attention_scores<CudaBackend>));
  m.impl("attention_lse", TORCH_BOX(&attention_lse<CudaBackend>));
  m.impl("attention_pagerank", TORCH_BOX(&attention_pagerank<CudaBackend>));
  m.impl("attention_scores_backward", TORCH_BOX(&attention_scores_backward<CudaBackend>));
  m.impl("select_topk", TORCH_BOX(&select_topk<CudaBackend>));
  m.impl("select_mass", TORCH_BOX(&select_mass<CudaBackend>));
  m.impl("select_threshold", TORCH_BOX(&select_threshold<CudaBackend>));
  m.impl("allocate_budget", TORCH_BOX(&allocate_budget<CudaBackend>));
  m.impl("select_samples", TORCH_BOX(&select_samples<CudaBackend>));
  m.impl("score_quantiles", TORCH_BOX(&score_quantiles<CudaBackend>));
  m.impl("complement_index", TORCH_BOX(&complement_index<CudaBackend>));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens<CudaBackend>));
  m.impl("gather_tokens_out", TORCH_BOX(&gather_tokens_out<CudaBackend>));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward<CudaBackend>));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens<CudaBackend>));
  m.impl("scatter_tokens_backward", TORCH_BOX(&scatter_tokens_backward<CudaBackend>));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens<CudaBackend>));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward<CudaBackend>));
  m.impl("unmerge_tokens", TORCH_BOX(&unmerge_tokens<CudaBackend>));
  m.impl("unmerge_tokens_backward", TORCH_BOX(&unmerge_tokens_backward<CudaBackend>));
  m.impl("merge_by_label", TORCH_BOX(&merge_by_label<CudaBackend>));
  m.impl("fuse_dropped", TORCH_BOX(&fuse_dropped<CudaBackend>));
  m.impl("merge_by_label_backward", TORCH_BOX(&merge_by_label_backward<CudaBackend>));
  m.impl("sum_pairs", TORCH_BOX(&sum_pairs<CudaBackend>));
  m.impl("pair_dots", TORCH_BOX(&pair_dots<CudaBackend>));
  m.impl("pool_grid", TORCH_BOX(&pool_grid<CudaBackend>));
  m.impl("pool_grid_backward", TORCH_BOX(&pool_grid_backward<CudaBackend>));
  m.impl("pool_runs", TORCH_BOX(&pool_runs<CudaBackend>));
  m.impl("pool_runs_backward", TORCH_BOX(&pool_runs_backward<CudaBackend>));
  m.impl("row_column_means", TORCH_BOX(&row_column_means<CudaBackend>));
  m.impl("row_column_means_backward", TORCH_BOX(&row_column_means_backward<CudaBackend>));
  m.impl("pack_index", TORCH_BOX(&pack_index<CudaBackend>));
  m.impl("prune_tokens", TORCH_BOX(&prune_tokens<CudaBackend>));
  m.impl("cosine_match", TORCH_BOX(&cosine_match<CudaBackend>));
  m.impl("cosine_scores", TORCH_BOX(&cosine_scores<CudaBackend>));
  m.impl("bipartite_match", TORCH_BOX(&bipartite_match<CudaBackend>));
  m.impl("knn_density", TORCH_BOX(&knn_density<CudaBackend>));
  m.impl("nearest_center", TORCH_BOX(&nearest_center<CudaBackend>));
  m.impl("select_diverse", TORCH_BOX(&select_diverse<CudaBackend>));
}

STABLE_TORCH_LIBRARY_IMPL(tokensieve, CompositeExplicitAutograd, m) { m.impl("set_wgmma", TORCH_BOX(&set_wgmma)); }

}  // namespace tokensieve::bind

// Every op's schema, once. The same text is pinned by tests/ops/test_schema.py.
#include <torch/csrc/stable/library.h>

#define TS_SCORE_ARGUMENTS                                                                               \
  "float? scale, bool causal, Tensor? bias, Tensor? lse, Tensor? row_weights, Tensor? query_positions, " \
  "SymInt range_begin, SymInt range_end, int normalize, int query_reduction, int head_reduction"

#define TS_COUNT_ARGUMENTS "SymInt capacity, SymInt min_k, SymInt? max_k, Tensor? candidates, Tensor? always_keep, int order"

#define TS_POOL_ARGUMENTS                                                                                                                \
  "SymInt n0, SymInt n1, SymInt n2, SymInt o0, SymInt o1, SymInt o2, SymInt w0, SymInt w1, SymInt w2, SymInt s0, SymInt s1, SymInt s2, " \
  "Tensor? scores, float temperature, bool adaptive, int kind"

STABLE_TORCH_LIBRARY(tokensieve, m) {
  m.def("attention_scores(Tensor query, Tensor key, " TS_SCORE_ARGUMENTS
        ", int activation, Tensor? head_weights, Tensor? accumulate) -> (Tensor, Tensor)");
  m.def("attention_lse(Tensor query, Tensor key, float? scale, bool causal, Tensor? bias, Tensor? query_positions) -> Tensor");
  m.def(
      "attention_pagerank(Tensor query, Tensor key, float? scale, float temperature, bool causal, Tensor? mask, Tensor? start, "
      "SymInt iterations) -> Tensor");
  m.def("attention_scores_backward(Tensor grad, Tensor? grad_lse, Tensor row_lse, Tensor query, Tensor key, " TS_SCORE_ARGUMENTS
        ", int activation, Tensor? head_weights) -> (Tensor, Tensor)");
  m.def("select_topk(Tensor scores, SymInt k, Tensor? k_rows, Tensor? candidates, Tensor? always_keep, int order) -> Tensor");
  m.def("select_mass(Tensor scores, float mass, Tensor? mass_rows, bool below, " TS_COUNT_ARGUMENTS
        ", SymInt extra) -> (Tensor, Tensor, Tensor)");
  m.def("select_threshold(Tensor scores, float tau, Tensor? tau_rows, bool strict, " TS_COUNT_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  m.def(
      "allocate_budget(Tensor weights, SymInt? total, Tensor? total_rows, SymInt? cap, Tensor? cap_parts, float? ratio, int mode, "
      "int remainder, float temperature, float epsilon) -> (Tensor, Tensor)");
  m.def("select_samples(Tensor scores, SymInt count, Tensor? points, SymInt capacity, Tensor? candidates) -> (Tensor, Tensor, Tensor)");
  m.def("score_quantiles(Tensor scores, float[] q, Tensor? candidates) -> Tensor");
  m.def("complement_index(Tensor index, SymInt N, SymInt capacity) -> Tensor");
  m.def("gather_tokens(Tensor[] tensors, Tensor index) -> Tensor[]");
  m.def("gather_tokens_out(Tensor[] tensors, Tensor index, Tensor(a!)[] out) -> ()");
  m.def("gather_tokens_backward(Tensor[] grads, Tensor index, SymInt N) -> Tensor[]");
  m.def("scatter_tokens(Tensor[] tensors, Tensor index, Tensor[] values, bool add, Tensor? weights) -> Tensor[]");
  m.def(
      "scatter_tokens_backward(Tensor[] grads, Tensor index, Tensor[] values, Tensor weights, bool values_wanted, bool weights_wanted) "
      "-> (Tensor[], Tensor)");
  m.def("merge_tokens(Tensor[] tensors, Tensor index, Tensor inverse, Tensor? size, int mode) -> (Tensor[], Tensor, Tensor)");
  m.def(
      "merge_tokens_backward(Tensor[] grads, Tensor[] tensors, Tensor[] outs, Tensor index, Tensor inverse, Tensor? size, int mode) "
      "-> Tensor[]");
  m.def("unmerge_tokens(Tensor[] tensors, Tensor inverse) -> Tensor[]");
  m.def("unmerge_tokens_backward(Tensor[] grads, Tensor inverse, SymInt rows) -> Tensor[]");
  m.def("merge_by_label(Tensor x, Tensor labels, SymInt rows, Tensor? weights, int mode, float epsilon) -> (Tensor, Tensor)");
  m.def("fuse_dropped(Tensor x, Tensor weights, Tensor index, bool normalize) -> (Tensor, Tensor)");
  m.def(
      "merge_by_label_backward(Tensor grad, Tensor? total_grad, Tensor x, Tensor out, Tensor labels, bool complement, Tensor? weights, "
      "int mode, float epsilon, bool x_wanted, bool weights_wanted) -> (Tensor, Tensor)");
  m.def("sum_pairs(Tensor x, Tensor source, Tensor row, SymInt rows, Tensor? weights) -> Tensor");
  m.def("pair_dots(Tensor grad, Tensor x, Tensor source, Tensor row) -> Tensor");
  m.def("pack_index(Tensor index, SymInt N, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("prune_tokens(Tensor query, Tensor key, Tensor[] tensors, SymInt k, " TS_SCORE_ARGUMENTS
        ", bool keep_outside) -> (Tensor[], Tensor, Tensor)");
  m.def("cosine_match(Tensor a, Tensor b, SymInt k, bool largest, Tensor? candidates, bool exclude_self) -> (Tensor, Tensor)");
  m.def("cosine_scores(Tensor a, Tensor b, int reduction, Tensor? candidates, bool exclude_self) -> Tensor");
  m.def("knn_density(Tensor x, SymInt k, Tensor? noise, Tensor? mask) -> (Tensor, Tensor)");
  m.def("nearest_center(Tensor x, Tensor centers) -> Tensor");
  m.def("select_diverse(Tensor x, SymInt k, Tensor? candidates, Tensor? first, int metric, int order) -> Tensor");
  m.def(
      "bipartite_match(Tensor metric, SymInt r, SymInt prefix, Tensor? sources, Tensor? targets, Tensor? keep, Tensor? bias, "
      "Tensor? candidates, int order) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pool_grid(Tensor x, " TS_POOL_ARGUMENTS ") -> Tensor");
  m.def("pool_grid_backward(Tensor grad, Tensor? x, Tensor? out, " TS_POOL_ARGUMENTS
        ", bool x_wanted, bool scores_wanted) -> (Tensor, Tensor)");
  m.def("pool_runs(Tensor x, Tensor starts, SymInt length, SymInt stride) -> Tensor");
  m.def("pool_runs_backward(Tensor grad, Tensor starts, SymInt S, SymInt length, SymInt stride) -> Tensor");
  m.def("row_column_means(Tensor x) -> (Tensor, Tensor)");
  m.def("row_column_means_backward(Tensor rows_grad, Tensor columns_grad) -> Tensor");
  m.def("cpu_level() -> int");
  m.def("best_cpu_level() -> int");
  m.def("set_cpu_level(int level) -> ()");
  m.def("set_wgmma(bool wanted) -> ()");  // of the CUDA library alone
}

"""The schemas are frozen: a change that old callers would not survive fails here."""

from __future__ import annotations

import pytest
import tokensieve  # noqa: F401  (registers the ops)
import torch

SCORE = (
    "float? scale, bool causal, Tensor? bias, Tensor? lse, Tensor? row_weights, Tensor? query_positions, "
    "SymInt range_begin, SymInt range_end, int normalize, int query_reduction, int head_reduction"
)
SCORE_EXTRAS = "int activation, Tensor? head_weights, Tensor? accumulate"
COUNT = "SymInt capacity, SymInt min_k, SymInt? max_k, Tensor? candidates, Tensor? always_keep, int order"
POOL = (
    "SymInt n0, SymInt n1, SymInt n2, SymInt o0, SymInt o1, SymInt o2, SymInt w0, SymInt w1, SymInt w2, SymInt s0, SymInt s1, SymInt s2, "
    "Tensor? scores, float temperature, bool adaptive, int kind"
)
SCHEMAS = {
    "attention_scores": f"(Tensor query, Tensor key, {SCORE}, {SCORE_EXTRAS}) -> (Tensor, Tensor)",
    "attention_lse": "(Tensor query, Tensor key, float? scale, bool causal, Tensor? bias, Tensor? query_positions) -> Tensor",
    "attention_pagerank": (
        "(Tensor query, Tensor key, float? scale, float temperature, bool causal, Tensor? mask, Tensor? start, SymInt iterations) -> Tensor"
    ),
    "attention_scores_backward": f"(Tensor grad, Tensor? grad_lse, Tensor row_lse, Tensor query, Tensor key, {SCORE}, int activation, "
    "Tensor? head_weights) -> (Tensor, Tensor)",
    "select_topk": "(Tensor scores, SymInt k, Tensor? k_rows, Tensor? candidates, Tensor? always_keep, int order) -> Tensor",
    "select_mass": f"(Tensor scores, float mass, Tensor? mass_rows, bool below, {COUNT}, SymInt extra) -> (Tensor, Tensor, Tensor)",
    "select_threshold": f"(Tensor scores, float tau, Tensor? tau_rows, bool strict, {COUNT}) -> (Tensor, Tensor, Tensor)",
    "allocate_budget": "(Tensor weights, SymInt? total, Tensor? total_rows, SymInt? cap, Tensor? cap_parts, float? ratio, int mode, "
    "int remainder, float temperature, float epsilon) -> (Tensor, Tensor)",
    "select_samples": "(Tensor scores, SymInt count, Tensor? points, SymInt capacity, Tensor? candidates) -> (Tensor, Tensor, Tensor)",
    "score_quantiles": "(Tensor scores, float[] q, Tensor? candidates) -> Tensor",
    "complement_index": "(Tensor index, SymInt N, SymInt capacity) -> Tensor",
    "gather_tokens": "(Tensor[] tensors, Tensor index) -> Tensor[]",
    "gather_tokens_out": "(Tensor[] tensors, Tensor index, Tensor(a!)[] out) -> ()",
    "gather_tokens_backward": "(Tensor[] grads, Tensor index, SymInt N) -> Tensor[]",
    "scatter_tokens": "(Tensor[] tensors, Tensor index, Tensor[] values, bool add, Tensor? weights) -> Tensor[]",
    "scatter_tokens_backward": "(Tensor[] grads, Tensor index, Tensor[] values, Tensor weights, bool values_wanted, bool weights_wanted) "
    "-> (Tensor[], Tensor)",
    "merge_tokens": "(Tensor[] tensors, Tensor index, Tensor inverse, Tensor? size, int mode) -> (Tensor[], Tensor, Tensor)",
    "merge_tokens_backward": "(Tensor[] grads, Tensor[] tensors, Tensor[] outs, Tensor index, Tensor inverse, Tensor? size, int mode) "
    "-> Tensor[]",
    "unmerge_tokens": "(Tensor[] tensors, Tensor inverse) -> Tensor[]",
    "unmerge_tokens_backward": "(Tensor[] grads, Tensor inverse, SymInt rows) -> Tensor[]",
    "merge_by_label": "(Tensor x, Tensor labels, SymInt rows, Tensor? weights, int mode, float epsilon) -> (Tensor, Tensor)",
    "fuse_dropped": "(Tensor x, Tensor weights, Tensor index, bool normalize) -> (Tensor, Tensor)",
    "merge_by_label_backward": "(Tensor grad, Tensor? total_grad, Tensor x, Tensor out, Tensor labels, bool complement, Tensor? weights, "
    "int mode, float epsilon, bool x_wanted, bool weights_wanted) -> (Tensor, Tensor)",
    "sum_pairs": "(Tensor x, Tensor source, Tensor row, SymInt rows, Tensor? weights) -> Tensor",
    "pair_dots": "(Tensor grad, Tensor x, Tensor source, Tensor row) -> Tensor",
    "pack_index": "(Tensor index, SymInt N, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    "prune_tokens": f"(Tensor query, Tensor key, Tensor[] tensors, SymInt k, {SCORE}, bool keep_outside) -> (Tensor[], Tensor, Tensor)",
    "cosine_match": "(Tensor a, Tensor b, SymInt k, bool largest, Tensor? candidates, bool exclude_self) -> (Tensor, Tensor)",
    "cosine_scores": "(Tensor a, Tensor b, int reduction, Tensor? candidates, bool exclude_self) -> Tensor",
    "bipartite_match": "(Tensor metric, SymInt r, SymInt prefix, Tensor? sources, Tensor? targets, Tensor? keep, Tensor? bias, "
    "Tensor? candidates, int order) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "knn_density": "(Tensor x, SymInt k, Tensor? noise, Tensor? mask) -> (Tensor, Tensor)",
    "nearest_center": "(Tensor x, Tensor centers) -> Tensor",
    "select_diverse": "(Tensor x, SymInt k, Tensor? candidates, Tensor? first, int metric, int order) -> Tensor",
    "pool_grid": f"(Tensor x, {POOL}) -> Tensor",
    "pool_grid_backward": f"(Tensor grad, Tensor? x, Tensor? out, {POOL}, bool x_wanted, bool scores_wanted) -> (Tensor, Tensor)",
    "pool_runs": "(Tensor x, Tensor starts, SymInt length, SymInt stride) -> Tensor",
    "pool_runs_backward": "(Tensor grad, Tensor starts, SymInt S, SymInt length, SymInt stride) -> Tensor",
    "row_column_means": "(Tensor x) -> (Tensor, Tensor)",
    "row_column_means_backward": "(Tensor rows_grad, Tensor columns_grad) -> Tensor",
    "cpu_level": "() -> int",
    "best_cpu_level": "() -> int",
    "set_cpu_level": "(int level) -> ()",
    "set_wgmma": "(bool wanted) -> ()",
}


def registered(name: str) -> torch._C.FunctionSchema:
    return getattr(torch.ops.tokensieve, name).default._schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_backward_compatible(name: str) -> None:
    pinned = torch._C.parse_schema(f"tokensieve::{name}{SCHEMAS[name]}")
    assert registered(name).is_backward_compatible_with(pinned), f"{registered(name)} broke {pinned}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_the_pinned_one(name: str) -> None:
    assert str(registered(name)) == str(torch._C.parse_schema(f"tokensieve::{name}{SCHEMAS[name]}"))


def test_schema_of_every_op_is_pinned() -> None:
    names = {s.name.removeprefix("tokensieve::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("tokensieve::")}
    assert names == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_mutates_only_where_the_name_says_so(name: str) -> None:
    assert registered(name).is_mutable == (name == "gather_tokens_out")

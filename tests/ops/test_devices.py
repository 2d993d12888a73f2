"""Tensors that hold no data (meta), and CUDA tensors where only the CPU library loaded: every op, one table each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokensieve as ts
import torch
from every_op import GROUPS, Given, given
from tokensieve import _load
from torch._subclasses.fake_tensor import FakeTensorMode

Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 10, 8)
S = torch.zeros(2, 10)
X, I = torch.zeros(2, 10, 6), torch.zeros(2, 3, dtype=torch.int64)  # noqa: E741


@pytest.mark.parametrize("name", GROUPS)
def test_meta_tensors_give_meta_outputs(name: str) -> None:
    x = given(1, "cpu", torch.float32)
    for i, (real, meta) in enumerate(zip(GROUPS[name](x), GROUPS[name](Given(*(t.to("meta") for t in x))), strict=True)):
        assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta"), f"output {i}"


def test_meta_tensors_take_what_real_ones_take() -> None:
    """Layouts that the kernels accept must not be refused by a fake (it would break torch.compile only)."""
    for device in ("cpu", "meta"):
        query, key, x, index = (t.to(device) for t in (Q, K, X, I))
        bias = torch.zeros(2, 1, 3, 1, device=device).expand(2, 4, 3, 10)  # stride 0 over the keys
        assert ts.attention_scores(query, key, bias=bias).shape == (2, 10)
        assert ts.gather_tokens(x[:, :, None].expand(2, 10, 4, 6), index[:1].expand(2, 3)).shape == (2, 3, 4, 6)
        assert ts.select_topk(torch.zeros(1, 10, device=device).expand(2, 10), 4).shape == (2, 4)


def test_meta_tensors_obey_the_same_rules() -> None:
    with pytest.raises(ValueError, match=r"tokensieve\.select_topk: k must be in \[0, N=10\], got 11"):
        ts.select_topk(S.to("meta"), 11)
    with pytest.raises(TypeError, match=r"tokensieve\.attention_scores: key must be float32, got float16"):
        ts.attention_scores(Q.to("meta"), K.half().to("meta"))


# Device "cuda" is available to fake tensors on every machine.
CUDA_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "allocate_budget": (lambda: ts.allocate_budget(on_cuda(S), 5), "weights"),
    "attention_lse": (lambda: ts.attention_lse(on_cuda(Q), on_cuda(K)), "query"),
    "attention_pagerank": (lambda: ts.attention_pagerank(on_cuda(K), on_cuda(K)), "query"),
    "attention_scores": (lambda: ts.attention_scores(on_cuda(Q), on_cuda(K)), "query"),
    "bipartite_match": (lambda: ts.bipartite_match(on_cuda(X), 2), "metric"),
    "complement_index": (lambda: ts.complement_index(on_cuda(I), 10), "index"),
    "cosine_match": (lambda: ts.cosine_match(on_cuda(X), on_cuda(X)), "a"),
    "cosine_scores": (lambda: ts.cosine_scores(on_cuda(X), on_cuda(X)), "a"),
    "fuse_dropped": (lambda: ts.fuse_dropped(on_cuda(X), on_cuda(S), on_cuda(I)), "x"),
    "gather_tokens": (lambda: ts.gather_tokens(on_cuda(X), on_cuda(I)), "index"),
    "gather_tokens_out": (lambda: ts.gather_tokens_out([on_cuda(X)], on_cuda(I), [on_cuda(X)]), "index"),
    "cluster_tokens": (lambda: ts.cluster_tokens(on_cuda(X), 2), "x"),
    "knn_density": (lambda: ts.knn_density(on_cuda(X), 2), "x"),
    "nearest_center": (lambda: ts.nearest_center(on_cuda(X), on_cuda(I)), "x"),
    "merge_by_label": (lambda: ts.merge_by_label(on_cuda(X), on_cuda(S, dtype=torch.int64), 3), "x"),
    "merge_into_nearest": (lambda: ts.merge_into_nearest(on_cuda(X), on_cuda(X), on_cuda(I)), "x"),
    "merge_tokens": (lambda: ts.merge_tokens(on_cuda(X), plan_on_cuda()), "plan.index"),
    "pack_tokens": (lambda: ts.pack_tokens(on_cuda(X), on_cuda(I), 6), "index"),
    "pool_grid": (lambda: ts.pool_grid(on_cuda(X), (2, 5), window=2), "x"),
    "pool_runs": (lambda: ts.pool_runs(on_cuda(X), on_cuda(I), 3, 2), "x"),
    "pool_scores": (lambda: ts.pool_scores(on_cuda(S), 3), "scores"),
    "pool_windows": (lambda: ts.pool_windows(on_cuda(X), on_cuda(S), (2, 5), 2), "x"),
    "prune_tokens": (lambda: ts.prune_tokens(on_cuda(Q), on_cuda(K), [on_cuda(X)], 2), "query"),
    "row_column_means": (lambda: ts.row_column_means(on_cuda(Q)), "x"),
    "scatter_tokens": (lambda: ts.scatter_tokens(on_cuda(X), on_cuda(I), on_cuda(X, 2, 3, 6)), "index"),
    "score_quantiles": (lambda: ts.score_quantiles(on_cuda(S), (0.5,)), "scores"),
    "select_diverse": (lambda: ts.select_diverse(on_cuda(X), 2), "x"),
    "select_mass": (lambda: ts.select_mass(on_cuda(S), 0.5, capacity=4), "scores"),
    "select_samples": (lambda: ts.select_samples(on_cuda(S), 4), "scores"),
    "select_threshold": (lambda: ts.select_threshold(on_cuda(S), 0.5, capacity=4), "scores"),
    "select_topk": (lambda: ts.select_topk(on_cuda(S), 2), "scores"),
    "space_to_depth": (lambda: ts.space_to_depth(on_cuda(X), (2, 5), (2, 1)), "x"),
    "tukey_fence": (lambda: ts.tukey_fence(on_cuda(S)), "scores"),
    "unmerge_tokens": (lambda: ts.unmerge_tokens(on_cuda(X), plan_on_cuda()), "plan.inverse"),
    "unpack_tokens": (lambda: ts.unpack_tokens(on_cuda(X, 10, 6), on_cuda(I)), "slots"),
}
TORCH_ALONE = {"assignment_matrix", "debug_checks", "run_labels", "trace_tokens"}


def on_cuda(t: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape or t.shape, dtype=dtype or t.dtype, device="cuda")


def plan_on_cuda() -> ts.MergePlan:
    slots = on_cuda(I)
    return ts.MergePlan(slots, slots, on_cuda(I, dtype=torch.float32), on_cuda(I, 2, 7), on_cuda(S, dtype=torch.int64))


@pytest.mark.parametrize("op", CUDA_CALLS)
def test_cuda_tensor_without_the_cuda_library_says_why(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load.STATE, "cuda_loaded", False)
    monkeypatch.setattr(_load.STATE, "cuda_error", "this wheel was built without nvcc and holds no CUDA library")
    call, argument = CUDA_CALLS[op]
    rule = rf"^tokensieve\.{op}: {argument} is on cuda:0, but the CUDA library is not loaded: this wheel was built without nvcc"
    with FakeTensorMode(), pytest.raises(RuntimeError, match=rule):
        call()


def test_heads_too_wide_for_cuda_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest heads that the kernels take pass; one more channel is an error that names the limit, from the fakes too."""
    monkeypatch.setattr(_load.STATE, "cuda_loaded", True)
    with FakeTensorMode():
        for D, wide in ((2048, False), (2049, True)):
            q, k, x = on_cuda(Q, 2, 4, 3, D), on_cuda(K, 2, 2, 10, D), on_cuda(X)
            calls: dict[str, Callable[[], Any]] = {
                "attention_lse": lambda q=q, k=k: ts.attention_lse(q, k),  # type: ignore[misc]
                "attention_scores": lambda q=q, k=k: ts.attention_scores(q, k),  # type: ignore[misc]
                "prune_tokens": lambda q=q, k=k, x=x: ts.prune_tokens(q, k, [x], 2),  # type: ignore[misc]
            }
            for op, call in calls.items():
                if not wide:
                    call()
                    continue
                with pytest.raises(ValueError, match=rf"^tokensieve\.{op}: query must have D <= 2048 on CUDA, got D=2049"):
                    call()
        ts.attention_pagerank(on_cuda(K, 2, 2, 10, 256), on_cuda(K, 2, 2, 10, 256))
        k = on_cuda(K, 2, 2, 10, 257)
        with pytest.raises(ValueError, match=r"^tokensieve\.attention_pagerank: query must have D <= 256 on CUDA, got D=257"):
            ts.attention_pagerank(k, k)


def test_cuda_calls_name_every_op() -> None:
    assert {name for name in ts.ops.__all__ if name[0].islower()} - set(CUDA_CALLS) == TORCH_ALONE

"""torch.compile(fullgraph=True, dynamic=True): one compilation serves every shape, with the results of eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokensieve as ts
import torch
import torch._dynamo
from reference.compare import assert_equal
from reference.inputs import normal, queries_and_keys, seeded
from torch import Tensor


@pytest.fixture(autouse=True)
def recompiles_are_errors() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def pipeline(query: Tensor, key: Tensor, hidden: Tensor, ids: Tensor, k: int) -> tuple[Tensor, ...]:
    """Every op, between operations that Inductor owns."""
    start = query.shape[2]
    scores = ts.attention_scores(query * 1.5, key, key_range=(start, key.shape[2]), causal=True)
    index = ts.select_topk(scores + 1.0, k) + start
    kept, kept_ids = ts.gather_tokens((hidden.sin(), ids), index)
    pruned = ts.prune_tokens(query, key, [hidden, ids], k, key_range=(start, key.shape[2]))
    return kept * 2, kept_ids, pruned.tensors[0] + 1, pruned.tensors[1], pruned.index, scores


def arguments(B: int, H: int, L: int, N: int, D: int, C: int, k: int, device: str) -> tuple[Any, ...]:
    query, key = queries_and_keys(seeded(N), B, H, H // 2, L, N, D, torch.float32, device)
    return query, key, normal(seeded(C), B, N, C, device=device), torch.arange(N, device=device).repeat(B, 1), k


# (B, H, L, N, D, C, k). All sizes of the first differ: dynamo takes equal sizes for one symbol.
SHAPES = [(2, 10, 3, 40, 16, 8, 12), (3, 8, 5, 77, 32, 14, 21), (4, 12, 2, 130, 24, 20, 64)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_dynamic_shapes_without_recompiles(backend: str, device: str) -> None:
    function = compiled(pipeline, backend)
    for shape in SHAPES:
        given = arguments(*shape, device)
        want = pipeline(*given)
        for i, (g, w) in enumerate(zip(function(*given), want, strict=True)):
            if backend == "inductor" and w.is_floating_point():
                torch.testing.assert_close(g, w)  # its sin differs in the last bit
            else:
                assert_equal(g, w, f"output {i} of {shape}")


def test_compile_gradients(device: str) -> None:
    def loss(query: Tensor, key: Tensor, hidden: Tensor, index: Tensor, k: int) -> Tensor:
        pruned = ts.prune_tokens(query, key, [hidden * 2], k).tensors[0]
        return pruned.square().sum() + ts.gather_tokens(hidden, index).sum()

    function = compiled(loss)
    for shape in SHAPES:
        query, key, hidden, _, k = arguments(*shape, device)
        index = torch.arange(k, device=device).flip(0).repeat(hidden.shape[0], 1)
        mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        function(query, key, mine, index, k).backward()
        loss(query, key, theirs, index, k).backward()
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_compile_masks_and_per_row_k(device: str) -> None:
    def masked(query: Tensor, key: Tensor, visible: Tensor, counts: Tensor, max_k: int) -> tuple[Tensor, Tensor, Tensor]:
        scores, lse = ts.attention_scores(query, key, bias=visible[:, None, None], query_reduction="max", return_lse=True)
        return scores, lse, ts.select_topk(scores, counts, max_k=max_k, candidates=visible, always_keep=~visible, order="score")

    function = compiled(masked)
    for shape in SHAPES:
        query, key, _, _, k = arguments(*shape, device)
        B, N = key.shape[0], key.shape[2]
        given = (query, key, torch.rand(B, N, generator=seeded(N)).to(device) > 0.4, torch.arange(B, device=device), k)
        for g, w in zip(function(*given), masked(*given), strict=True):
            assert_equal(g, w, f"{shape}")


def test_compile_similarity(device: str) -> None:
    def similar(x: Tensor, y: Tensor, visible: Tensor, first: Tensor, k: int) -> tuple[Tensor, ...]:
        value, index = ts.cosine_match(x * 2, y, candidates=visible)
        lowest, _ = ts.cosine_match(x, y, k=3, largest=False)
        scores = [ts.cosine_scores(x, y, reduction=how, candidates=visible) for how in ("mean", "max", None)]
        bottom = ts.cosine_scores(y, y, reduction="bottom", t=2, exclude_self=True)
        picks = ts.select_diverse(y + 1, k, candidates=visible, first=first, order="pick")
        clusters = ts.cluster_tokens(y * 2, k, k=3, mask=visible)
        return value + 1, index, lowest, *scores, bottom, picks, ts.select_diverse(x, 3, metric="euclidean"), *clusters

    function = compiled(similar)
    for B, _, L, N, _, C, k in SHAPES:
        x, y = normal(seeded(N), B, L + 4, C, device=device), normal(seeded(C), B, N, C, device=device)
        given = (x, y, torch.rand(B, N, generator=seeded(N)).to(device) > 0.3, torch.arange(B, device=device), k)
        for i, (g, w) in enumerate(zip(function(*given), similar(*given), strict=True)):
            assert_equal(g, w, f"output {i} of {(B, L + 4, N, C)}")


def test_compile_bipartite_match(device: str) -> None:
    def match(x: Tensor, r: int, visible: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ids = torch.arange(x.shape[1], device=x.device)
        lists = ts.bipartite_match(x, r, sources=ids[: x.shape[1] // 2], targets=ids[x.shape[1] // 2 :], bias=bias, order="score")
        plan = ts.bipartite_match(x * 2, r, keep=1, candidates=visible)
        return plan.source + 1, plan.similarity, plan.index, plan.inverse, lists.index, lists.inverse

    function = compiled(match)
    for B, N, r in ((2, 40, 5), (3, 57, 11), (4, 80, 20)):
        x, bias = normal(seeded(N), B, N, 16, device=device), normal(seeded(r), B, N // 2, device=device)
        given = (x, r, torch.rand(B, N, generator=seeded(N)).to(device) > 0.3, bias)
        for i, (g, w) in enumerate(zip(function(*given), match(*given), strict=True)):
            assert_equal(g, w, f"output {i} of {(B, N, r)}")


def test_compile_pooling(device: str) -> None:
    def pool(x: Tensor, h: int, w: int, scores: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        parts = ts.pool_grid(y, (h, w), window=2), ts.pool_grid(y, (h, w), size=(3, 2), kind="max")
        resized = ts.pool_grid(y, (h, w), size=((h + 1) // 2, (w + 1) // 2), kind="bilinear")
        weighted, folded = ts.pool_windows(y, scores, (h, w), (2, 3), temperature=0.1), ts.space_to_depth(y, (h, w), (2, 1))
        return *parts, resized, weighted, folded, ts.pool_runs(y, starts, 6, 4), *ts.row_column_means(y.unflatten(1, (h, w)))

    function = compiled(pool)
    for B, h, w, C in ((2, 4, 9, 16), (3, 6, 5, 20), (4, 8, 7, 33)):
        x, starts = normal(seeded(h), B, h * w, C, device=device), torch.tensor([[1]] * B, device=device)
        given = (x, h, w, torch.rand(B, h * w, generator=seeded(w)).to(device), starts)
        for i, (g, y) in enumerate(zip(function(*given), pool(*given), strict=True)):
            assert_equal(g, y, f"output {i} of {(B, h, w, C)}")


def test_compile_out_variant_writes_its_buffers(device: str) -> None:
    def fill(hidden: Tensor, index: Tensor, out: Tensor) -> Tensor:
        ts.gather_tokens_out([hidden], index, [out])
        return out + 1

    function = compiled(fill)
    for B, N, K, C in ((2, 10, 4, 6), (3, 20, 7, 9)):
        hidden, index = normal(seeded(N), B, N, C, device=device), torch.arange(K, device=device).repeat(B, 1)
        out = torch.zeros(B, K, C, device=device)
        assert_equal(function(hidden, index, out), hidden[:, :K] + 1)
        assert_equal(out, hidden[:, :K])


def test_compile_bad_input_is_still_an_error(device: str) -> None:
    with pytest.raises(Exception, match=r"k must be in \[0, N=8\], got 9"):
        torch.compile(lambda x: ts.select_topk(x, 9), fullgraph=True, backend="aot_eager")(torch.zeros(2, 8, device=device))

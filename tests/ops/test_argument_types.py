"""Arguments that C++ would take for something else: a bool for a number, a tensor of another device. One table each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tokensieve as ts
import torch

Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 10, 8)
S = torch.rand(2, 10)
X, I = torch.zeros(2, 10, 6), torch.tensor([[0, 1, 2], [3, 4, 5]])  # noqa: E741
ROWS, MASK, COUNTS = torch.full((2,), 0.5), torch.ones(2, 10, dtype=torch.bool), torch.ones(2, dtype=torch.int64)

# op and what the message says in front of ", got bool": the call
BOOLS: dict[tuple[str, str], Callable[[], Any]] = {
    ("allocate_budget", "total must be an int"): lambda: ts.allocate_budget(S, True),
    ("allocate_budget", "cap must be an int"): lambda: ts.allocate_budget(S, 5, cap=True),
    ("allocate_budget", "ratio must be a float"): lambda: ts.allocate_budget(S, mode="adjusted", cap=5, ratio=True),
    ("allocate_budget", "temperature must be a float"): lambda: ts.allocate_budget(S, 5, mode="softmax", temperature=True),
    ("allocate_budget", "epsilon must be a float"): lambda: ts.allocate_budget(S, 5, mode="softmax", epsilon=False),
    ("attention_pagerank", "iterations must be an int"): lambda: ts.attention_pagerank(K, K, iterations=True),
    ("attention_pagerank", "temperature must be a float"): lambda: ts.attention_pagerank(K, K, temperature=True),
    ("attention_pagerank", "scale must be a float or None"): lambda: ts.attention_pagerank(K, K, scale=True),
    ("attention_scores", "key_range must be an int"): lambda: ts.attention_scores(Q, K, key_range=(False, 5)),
    ("complement_index", "N must be an int"): lambda: ts.complement_index(I[:, :0], True),
    ("complement_index", "capacity must be an int"): lambda: ts.complement_index(I, 4, capacity=True),
    ("cosine_match", "k must be an int"): lambda: ts.cosine_match(X, X, k=True),
    ("cosine_scores", "t must be an int"): lambda: ts.cosine_scores(X, X, reduction="bottom", t=True),
    ("pack_tokens", "capacity must be an int"): lambda: ts.pack_tokens(X, I, True),
    ("pool_grid", "grid must be an int"): lambda: ts.pool_grid(X, (10, True), window=1),
    ("pool_grid", "size must be an int"): lambda: ts.pool_grid(X, (10,), size=(True,)),
    ("pool_grid", "window must be an int"): lambda: ts.pool_grid(X, (10,), window=(True,)),
    ("pool_grid", "stride must be an int"): lambda: ts.pool_grid(X, (10,), window=1, stride=(True,)),
    ("pool_runs", "length must be an int"): lambda: ts.pool_runs(X, I[:, :1], True, 1),
    ("pool_runs", "stride must be an int"): lambda: ts.pool_runs(X, I[:, :1], 2, True),
    ("pool_windows", "temperature must be a float"): lambda: ts.pool_windows(X, S, (10,), 2, temperature=True),
    ("pool_scores", "width must be an int"): lambda: ts.pool_scores(S, True),
    ("prune_tokens", "k must be an int"): lambda: ts.prune_tokens(Q, K, [X], True),
    ("prune_tokens", "key_range must be an int"): lambda: ts.prune_tokens(Q, K, [X], 1, key_range=(0, True)),
    ("score_quantiles", "q must be a sequence of floats"): lambda: ts.score_quantiles(S, (0.5, True)),
    ("select_diverse", "k must be an int"): lambda: ts.select_diverse(X, True),
    ("select_mass", "mass must be a number or a tensor"): lambda: ts.select_mass(S, True, capacity=4),
    ("select_mass", "capacity must be an int"): lambda: ts.select_mass(S, 0.5, capacity=True),
    ("select_mass", "extra must be an int"): lambda: ts.select_mass(S, 0.5, capacity=4, extra=True),
    ("select_mass", "min_k must be an int"): lambda: ts.select_mass(S, 0.5, capacity=4, min_k=True),
    ("select_mass", "max_k must be an int"): lambda: ts.select_mass(S, 0.5, capacity=4, max_k=True),
    ("select_samples", "points must be an int"): lambda: ts.select_samples(S, True),
    ("select_samples", "capacity must be an int"): lambda: ts.select_samples(S, 3, capacity=True),
    ("select_threshold", "tau must be a number or a tensor"): lambda: ts.select_threshold(S, False, capacity=4),
    ("select_threshold", "capacity must be an int"): lambda: ts.select_threshold(S, 0.5, capacity=True),
    ("select_threshold", "min_k must be an int"): lambda: ts.select_threshold(S, 0.5, capacity=4, min_k=True),
    ("select_topk", "k must be an int"): lambda: ts.select_topk(S, True),
    ("select_topk", "max_k must be an int"): lambda: ts.select_topk(S, COUNTS, max_k=True),
    ("tukey_fence", "factor must be a float"): lambda: ts.tukey_fence(S, factor=True),
}

# op, argument on another device, whose device it must have: the call
DEVICES: dict[tuple[str, str, str], Callable[[], Any]] = {
    ("allocate_budget", "total", "weights"): lambda: ts.allocate_budget(S, COUNTS.to("meta")),
    ("attention_lse", "key", "query"): lambda: ts.attention_lse(Q, K.to("meta")),
    ("attention_lse", "query_positions", "query"): lambda: ts.attention_lse(Q, K, query_positions=I.to("meta")),
    ("attention_pagerank", "key", "query"): lambda: ts.attention_pagerank(K, K.to("meta")),
    ("attention_pagerank", "mask", "query"): lambda: ts.attention_pagerank(K, K, mask=MASK.to("meta")),
    ("attention_pagerank", "start", "query"): lambda: ts.attention_pagerank(K, K, start=S.to("meta")),
    ("attention_scores", "head_weights", "query"): lambda: ts.attention_scores(Q, K, head_weights=torch.ones(2, 4, device="meta")),
    ("cosine_scores", "candidates", "b"): lambda: ts.cosine_scores(X, X, candidates=MASK.to("meta")),
    ("pack_tokens", "tensors[0]", "index"): lambda: ts.pack_tokens(X.to("meta"), I, 6),
    ("pool_runs", "starts", "x"): lambda: ts.pool_runs(X, I[:, :1].to("meta"), 3, 2),
    ("pool_windows", "scores", "x"): lambda: ts.pool_windows(X, S.to("meta"), (2, 5), 2),
    ("scatter_tokens", "weights", "index"): lambda: ts.scatter_tokens(X, I, X[:, :3], mode="add", weights=torch.ones(2, 3, device="meta")),
    ("score_quantiles", "candidates", "scores"): lambda: ts.score_quantiles(S, (0.5,), candidates=MASK.to("meta")),
    ("select_diverse", "candidates", "x"): lambda: ts.select_diverse(X, 2, candidates=MASK.to("meta")),
    ("select_diverse", "first", "x"): lambda: ts.select_diverse(X, 2, first=COUNTS.to("meta")),
    ("select_mass", "mass", "scores"): lambda: ts.select_mass(S, ROWS.to("meta"), capacity=4),
    ("select_mass", "always_keep", "scores"): lambda: ts.select_mass(S, 0.5, capacity=4, always_keep=MASK.to("meta")),
    ("select_samples", "candidates", "scores"): lambda: ts.select_samples(S, 3, candidates=MASK.to("meta")),
    ("select_threshold", "tau", "scores"): lambda: ts.select_threshold(S, ROWS.to("meta"), capacity=4),
    ("tukey_fence", "candidates", "scores"): lambda: ts.tukey_fence(S, candidates=MASK.to("meta")),
    ("unpack_tokens", "packed[0]", "slots"): lambda: ts.unpack_tokens(X[0].to("meta"), I),
}


@pytest.mark.parametrize(("op", "rule"), BOOLS, ids=str)
def test_a_bool_is_no_number(op: str, rule: str) -> None:
    with pytest.raises(TypeError, match=rf"^tokensieve\.{op}: {re.escape(rule)}, got bool"):
        BOOLS[op, rule]()


@pytest.mark.parametrize(("op", "argument", "reference"), DEVICES, ids=str)
def test_all_tensors_are_on_one_device(op: str, argument: str, reference: str) -> None:
    rule = re.escape(f"{argument} must be on the device of {reference} (cpu), got meta")
    with pytest.raises(ValueError, match=rf"^tokensieve\.{op}: {rule}"):
        DEVICES[op, argument, reference]()

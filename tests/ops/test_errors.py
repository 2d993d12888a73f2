"""Bad input raises TypeError or ValueError that names op, argument, rule and what came. One table for all ops."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokensieve as ts
import torch

Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 10, 8)
S = torch.zeros(2, 10)
X, I = torch.zeros(2, 10, 6), torch.zeros(2, 3, dtype=torch.int64)  # noqa: E741


def scores(query: Any = Q, key: Any = K, **options: Any) -> Callable[[], Any]:
    return lambda: ts.attention_scores(query, key, **options)


def select(x: Any = S, k: Any = 3, **options: Any) -> Callable[[], Any]:
    return lambda: ts.select_topk(x, k, **options)


def gather(tensors: Any = (X,), index: Any = I) -> Callable[[], Any]:
    return lambda: ts.gather_tokens(tensors, index)


def gather_out(tensors: Any = (X,), index: Any = I, out: Any = None) -> Callable[[], Any]:
    return lambda: ts.gather_tokens_out(tensors, index, [torch.zeros(2, 3, 6)] if out is None else out)


def prune(query: Any = Q, key: Any = K, tensors: Any = (X,), k: Any = 3, **options: Any) -> Callable[[], Any]:
    return lambda: ts.prune_tokens(query, key, tensors, k, **options)


def match(a: Any = X, b: Any = X, **options: Any) -> Callable[[], Any]:
    return lambda: ts.cosine_match(a, b, **options)


def similar(a: Any = X, b: Any = X, **options: Any) -> Callable[[], Any]:
    return lambda: ts.cosine_scores(a, b, **options)


def diverse(x: Any = X, k: Any = 3, **options: Any) -> Callable[[], Any]:
    return lambda: ts.select_diverse(x, k, **options)


# (call, exception, what the message says after "tokensieve.<op>: ")
ROWS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # attention_scores
    "query rank": (scores(Q[0]), ValueError, r"attention_scores: query must be \(B, H, L, D\), got shape \(4, 3, 8\)"),
    "key rank": (scores(key=K[0]), ValueError, r"attention_scores: key must be \(B, Hkv, N, D\), got shape \(2, 10, 8\)"),
    "query numpy": (scores(np.zeros((2, 4, 3, 8))), TypeError, r"attention_scores: query must be a torch.Tensor, got ndarray"),
    "key list": (scores(key=[[1.0]]), TypeError, r"attention_scores: key must be a torch.Tensor, got list"),
    "query sparse": (scores(Q.to_sparse()), ValueError, r"attention_scores: query must be a dense \(strided\) tensor, got sparse_coo"),
    "scores nested": (
        lambda: ts.select_topk(torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged), 1),
        ValueError,
        r"select_topk: scores must be a dense \(strided\) tensor, got a nested tensor",
    ),
    "query None": (scores(None), TypeError, r"attention_scores: query must be a torch.Tensor, got NoneType"),
    "query dtype": (scores(Q.double()), TypeError, r"attention_scores: query must be float32 or float16 or bfloat16, got float64"),
    "query int": (scores(Q.int(), K.int()), TypeError, r"attention_scores: query must be float32 .*, got int32"),
    "dtype mix": (scores(key=K.half()), TypeError, r"attention_scores: key must be float32, got float16"),
    "device mix": (scores(key=K.to("meta")), ValueError, r"attention_scores: key must be on the device of query \(cpu\), got meta"),
    "batch mix": (scores(key=K[:1]), ValueError, r"attention_scores: key must be \(B=2, Hkv, N, D=8\), got shape \(1, 2, 10, 8\)"),
    "head dim mix": (scores(key=K[..., :4]), ValueError, r"attention_scores: key must be \(B=2, Hkv, N, D=8\), got shape \(2, 2, 10, 4\)"),
    "heads": (scores(Q[:, :3]), ValueError, r"attention_scores: query heads must be a multiple of key heads, got H=3, Hkv=2"),
    "no key heads": (scores(key=K[:, :0]), ValueError, r"attention_scores: query heads must be a multiple of key heads, got H=4, Hkv=0"),
    "query last stride": (
        scores(torch.zeros(2, 4, 8, 3).transpose(2, 3)),
        ValueError,
        r"attention_scores: query must be contiguous in its last dimension \(stride 1\), got stride 3; call \.contiguous\(\)",
    ),
    "key last stride": (scores(Q[..., :4], K[..., ::2]), ValueError, r"attention_scores: key must be contiguous .* got stride 2"),
    "range end": (
        scores(key_range=(0, 11)),
        ValueError,
        r"attention_scores: key_range must satisfy 0 <= start <= end <= N=10, got \(0, 11\)",
    ),
    "range start": (scores(key_range=(-1, 4)), ValueError, r"attention_scores: key_range must satisfy .* got \(-1, 4\)"),
    "range order": (scores(key_range=(5, 4)), ValueError, r"attention_scores: key_range must satisfy .* got \(5, 4\)"),
    "range type": (scores(key_range=3), TypeError, r"attention_scores: key_range must be a pair \(start, end\) of ints, got 3"),
    "range length": (scores(key_range=(1, 2, 3)), TypeError, r"attention_scores: key_range must be a pair .* got \(1, 2, 3\)"),
    "range float": (scores(key_range=(0.0, 4.0)), TypeError, r"attention_scores: key_range must be an int, got float"),
    "normalize": (scores(normalize="column"), ValueError, r"attention_scores: normalize must be one of 'row', 'range', got 'column'"),
    "query reduction": (
        scores(query_reduction="median"),
        ValueError,
        r"attention_scores: query_reduction must be one of None, 'mean', 'sum', 'max', 'visible_mean', got 'median'",
    ),
    "head reduction": (scores(head_reduction="avg"), ValueError, r"attention_scores: head_reduction must be one of .* got 'avg'"),
    "reduction type": (scores(head_reduction=3), ValueError, r"attention_scores: head_reduction must be one of .* got 3"),
    "reduction unhashable": (scores(query_reduction=["mean"]), ValueError, r"attention_scores: query_reduction must be .* got \['mean'\]"),
    "scale type": (scores(scale="small"), TypeError, r"attention_scores: scale must be a float or None, got str"),
    "scale of no channels": (scores(Q[..., :0], K[..., :0]), ValueError, r"attention_scores: scale must be given when D = 0, got None"),
    "causal type": (scores(causal="yes"), TypeError, r"attention_scores: causal must be a bool, got str"),
    "bias rank": (
        scores(bias=torch.zeros(2, 10)),
        ValueError,
        r"attention_scores: bias must be broadcastable to \(B, H, L, N\), got .*\(2, 10\)",
    ),
    "bias shape": (
        scores(bias=torch.zeros(2, 1, 1, 9)),
        ValueError,
        r"attention_scores: bias must be broadcastable to \(B, H, L, N\) = \(2, 4, 3, 10\), got shape \(2, 1, 1, 9\)",
    ),
    "bias dtype": (
        scores(bias=torch.zeros(2, 1, 1, 10).long()),
        TypeError,
        r"attention_scores: bias must be float32 .* or bool, got int64",
    ),
    "bias double": (scores(bias=torch.zeros(2, 1, 1, 10).double()), TypeError, r"attention_scores: bias must be .*, got float64"),
    "bias device": (
        scores(bias=torch.zeros(1, 1, 1, 10, device="meta")),
        ValueError,
        r"attention_scores: bias must be on the device of query",
    ),
    "bias last stride": (
        scores(bias=torch.zeros(2, 1, 1, 20)[..., ::2]),
        ValueError,
        r"attention_scores: bias must be contiguous .* stride 2",
    ),
    "lse dtype": (scores(lse=torch.zeros(2, 4, 3).half()), TypeError, r"attention_scores: lse must be float32, got float16"),
    "lse shape": (
        scores(lse=torch.zeros(2, 4, 2)),
        ValueError,
        r"attention_scores: lse must be \(B, H, L\) = \(2, 4, 3\), got shape \(2, 4, 2\)",
    ),
    "weights shape": (
        scores(row_weights=torch.zeros(2, 4)),
        ValueError,
        r"attention_scores: row_weights must be \(B, L\) = \(2, 3\), got .*\(2, 4\)",
    ),
    "weights dtype": (
        scores(row_weights=torch.zeros(2, 3).double()),
        TypeError,
        r"attention_scores: row_weights must be float32, got float64",
    ),
    "weights list": (scores(row_weights=[1.0]), TypeError, r"attention_scores: row_weights must be a torch.Tensor, got list"),
    "weights and max": (
        scores(row_weights=torch.ones(2, 3), query_reduction="max"),
        ValueError,
        r"attention_scores: row_weights needs query_reduction 'mean', 'sum' or 'visible_mean', got 'max'",
    ),
    "weights and none": (
        scores(row_weights=torch.ones(2, 3), query_reduction=None),
        ValueError,
        r"attention_scores: row_weights needs .* got None",
    ),
    "positions dtype": (
        scores(query_positions=torch.zeros(2, 3).int()),
        TypeError,
        r"attention_scores: query_positions must be int64, got int32",
    ),
    "positions shape": (
        scores(query_positions=torch.zeros(3).long()),
        ValueError,
        r"attention_scores: query_positions must be \(B, L\), got shape \(3,\)",
    ),
    "head visible mean": (
        scores(head_reduction="visible_mean"),
        ValueError,
        r"attention_scores: head_reduction must be .* got 'visible_mean'",
    ),
    "activation": (
        scores(activation="relu"),
        ValueError,
        r"attention_scores: activation must be one of 'softmax', 'logit', 'sigmoid', got 'relu'",
    ),
    "activation and lse": (
        scores(activation="logit", lse=torch.zeros(2, 4, 3)),
        ValueError,
        r"attention_scores: lse needs activation 'softmax', got 'logit'",
    ),
    "head weights shape": (
        scores(head_weights=torch.ones(2, 3)),
        ValueError,
        r"attention_scores: head_weights must be \(B, H\) = \(2, 4\), got shape \(2, 3\)",
    ),
    "head weights dtype": (scores(head_weights=torch.ones(2, 4).half()), TypeError, r"attention_scores: head_weights must be float32, got"),
    "head weights and max": (
        scores(head_weights=torch.ones(2, 4), head_reduction="max"),
        ValueError,
        r"attention_scores: head_weights needs head_reduction 'mean' or 'sum', got 'max'",
    ),
    "head weights list": (scores(head_weights=[1.0]), TypeError, r"attention_scores: head_weights must be a torch.Tensor, got list"),
    "accumulate shape": (
        scores(accumulate=torch.zeros(2, 4, 10)),
        ValueError,
        r"attention_scores: accumulate must be of the shape of the scores = \(2, 10\), got shape \(2, 4, 10\)",
    ),
    "accumulate dtype": (scores(accumulate=torch.zeros(2, 10).double()), TypeError, r"attention_scores: accumulate must be float32, got"),
    "accumulate device": (
        scores(accumulate=torch.zeros(2, 10, device="meta")),
        ValueError,
        r"attention_scores: accumulate must be on the device of query \(cpu\), got meta",
    ),
    # select_topk
    "scores rank": (select(S[0]), ValueError, r"select_topk: scores must be \(B, N\), got shape \(10,\)"),
    "scores dtype": (select(S.long()), TypeError, r"select_topk: scores must be float32 or float16 or bfloat16, got int64"),
    "scores list": (select([1.0, 2.0]), TypeError, r"select_topk: scores must be a torch.Tensor, got list"),
    "scores numpy": (select(np.zeros((1, 4), np.float32)), TypeError, r"select_topk: scores must be a torch.Tensor, got ndarray"),
    "scores last stride": (select(torch.zeros(10, 2).t()), ValueError, r"select_topk: scores must be contiguous .* got stride 2"),
    "k large": (select(k=11), ValueError, r"select_topk: k must be in \[0, N=10\], got 11"),
    "k negative": (select(k=-1), ValueError, r"select_topk: k must be in \[0, N=10\], got -1"),
    "k of nothing": (select(S[:, :0], k=1), ValueError, r"select_topk: k must be in \[0, N=0\], got 1"),
    "k float": (select(k=2.0), TypeError, r"select_topk: k must be an int, got float"),
    "k ratio": (select(k=0.5), TypeError, r"select_topk: k must be an int, got float"),
    "k None": (select(k=None), TypeError, r"select_topk: k must be an int, got NoneType"),
    "k list": (select(k=[1, 2]), TypeError, r"select_topk: k must be an int, got list"),
    "k rows without max_k": (select(k=torch.ones(2).long()), ValueError, r"select_topk: max_k must be given when k is a tensor, got None"),
    "k rows dtype": (select(k=torch.ones(2).int(), max_k=3), TypeError, r"select_topk: k must be int64, got int32"),
    "k rows shape": (select(k=torch.ones(3).long(), max_k=3), ValueError, r"select_topk: k must be \(B,\) = \(2,\), got shape \(3,\)"),
    "k rows rank": (select(k=torch.ones(2, 1).long(), max_k=3), ValueError, r"select_topk: k must be \(B,\), got shape \(2, 1\)"),
    "k rows device": (
        select(k=torch.ones(2, device="meta").long(), max_k=3),
        ValueError,
        r"select_topk: k must be on the device of scores",
    ),
    "k rows value": (select(k=torch.tensor([1, 4]), max_k=3), ValueError, r"select_topk: k must be in \[0, max_k=3\].*got 4"),
    "k rows negative": (select(k=torch.tensor([-1, 2]), max_k=3), ValueError, r"select_topk: k must be in \[0, max_k=3\].*got -1"),
    "max_k large": (select(k=torch.ones(2).long(), max_k=11), ValueError, r"select_topk: max_k must be in \[0, N=10\], got 11"),
    "max_k type": (select(k=torch.ones(2).long(), max_k=3.5), TypeError, r"select_topk: max_k must be an int, got float"),
    "max_k with int k": (select(k=2, max_k=3), ValueError, r"select_topk: max_k goes with a tensor k, got max_k=3 with k=2"),
    "candidates dtype": (select(candidates=torch.ones(2, 10)), TypeError, r"select_topk: candidates must be bool, got float32"),
    "candidates shape": (
        select(candidates=torch.ones(1, 10).bool()),
        ValueError,
        r"select_topk: candidates must be \(B, N\) = \(2, 10\), got shape \(1, 10\)",
    ),
    "candidates rank": (
        select(candidates=torch.ones(10).bool()),
        ValueError,
        r"select_topk: candidates must be \(B, N\), got shape \(10,\)",
    ),
    "always_keep dtype": (select(always_keep=torch.ones(2, 10).byte()), TypeError, r"select_topk: always_keep must be bool, got uint8"),
    "always_keep device": (
        select(always_keep=torch.ones(2, 10, device="meta").bool()),
        ValueError,
        r"select_topk: always_keep must be on the device of scores \(cpu\), got meta",
    ),
    "always_keep last stride": (
        select(always_keep=torch.ones(2, 20).bool()[:, ::2]),
        ValueError,
        r"select_topk: always_keep must be contiguous .* got stride 2",
    ),
    "order": (select(order="ascending"), ValueError, r"select_topk: order must be one of 'position', 'score', got 'ascending'"),
    # gather_tokens
    "tensors none": (gather(()), ValueError, r"gather_tokens: tensors must hold at least one tensor, got none"),
    "tensors numpy": (gather([np.zeros((2, 10))]), TypeError, r"gather_tokens: tensors\[0\] must be a torch.Tensor, got ndarray"),
    "tensors number": (gather(3), TypeError, r"gather_tokens: tensors must be a sequence of tensors, got int"),
    "tensors None inside": (gather((X, None)), TypeError, r"gather_tokens: tensors\[1\] must be a torch.Tensor, got NoneType"),
    "tensors rank": (gather((X, X[0, :, 0])), ValueError, r"gather_tokens: tensors\[1\] must be \(B=2, N=10, ...\), got shape \(10,\)"),
    "first tensor rank": (gather((X[0, :, 0],)), ValueError, r"gather_tokens: tensors\[0\] must be \(B, N, ...\), got shape \(10,\)"),
    "tokens mix": (gather((X, X[:, :9])), ValueError, r"gather_tokens: tensors\[1\] must be \(B=2, N=10, ...\), got shape \(2, 9, 6\)"),
    "tensors device": (
        gather((X, X.to("meta"))),
        ValueError,
        r"gather_tokens: tensors\[1\] must be on the device of index \(cpu\), got meta",
    ),
    "tensors layout": (
        gather((torch.zeros(2, 10, 4, 4).transpose(2, 3),)),
        ValueError,
        r"gather_tokens: tensors\[0\] must have at most one strided axis .*, got .*\(2, 10, 4, 4\) with strides .*; call \.contiguous\(\)",
    ),
    "index numpy": (gather(index=np.zeros((2, 3), np.int64)), TypeError, r"gather_tokens: index must be a torch.Tensor, got ndarray"),
    "index dtype": (gather(index=I.int()), TypeError, r"gather_tokens: index must be int64, got int32"),
    "index mask": (gather(index=torch.ones(2, 10).bool()), TypeError, r"gather_tokens: index must be int64, got bool"),
    "index rank": (gather(index=I[0]), ValueError, r"gather_tokens: index must be \(B, K\), got shape \(3,\)"),
    "index batch": (gather(index=I[:1]), ValueError, r"gather_tokens: index must be \(B=2, K\), got shape \(1, 3\)"),
    "index last stride": (gather(index=torch.zeros(3, 2).long().t()), ValueError, r"gather_tokens: index must be contiguous .* stride 2"),
    "index too large": (gather(index=I + 10), ValueError, r"gather_tokens: index must be in \[-1, N=10\).*got 10"),
    "index too small": (gather(index=I - 2), ValueError, r"gather_tokens: index must be in \[-1, N=10\).*got -2"),
    "index of nothing": (gather((X[:, :0],), I), ValueError, r"gather_tokens: index must be in \[-1, N=0\).*got 0"),
    # gather_tokens_out
    "out count": (gather_out(out=[]), ValueError, r"gather_tokens_out: out must hold 1 tensors, got 0"),
    "out type": (gather_out(out=torch.zeros(2, 3, 6)), TypeError, r"gather_tokens_out: out must be a sequence of tensors, got Tensor"),
    "out dtype": (gather_out(out=[torch.zeros(2, 3, 6).half()]), TypeError, r"gather_tokens_out: out\[0\] must be float32, got float16"),
    "out shape": (
        gather_out(out=[torch.zeros(2, 4, 6)]),
        ValueError,
        r"gather_tokens_out: out\[0\] must be \(B, K, ...\) = \(2, 3, 6\), got shape \(2, 4, 6\)",
    ),
    "out strides": (
        gather_out(out=[torch.zeros(2, 6, 3).transpose(1, 2)]),
        ValueError,
        r"gather_tokens_out: out\[0\] must be contiguous, got strides \(18, 1, 3\)",
    ),
    "out index value": (gather_out(index=I + 10), ValueError, r"gather_tokens_out: index must be in \[-1, N=10\).*got 10"),
    # prune_tokens
    "prune k": (prune(k=11), ValueError, r"prune_tokens: k must be in \[0, R=10\], got 11"),
    "prune k of range": (prune(k=5, key_range=(2, 6)), ValueError, r"prune_tokens: k must be in \[0, R=4\], got 5"),
    "prune k negative": (prune(k=-1), ValueError, r"prune_tokens: k must be in \[0, R=10\], got -1"),
    "prune k tensor": (prune(k=torch.tensor([1, 2])), TypeError, r"prune_tokens: k must be an int, got Tensor"),
    "prune k float": (prune(k=3.0), TypeError, r"prune_tokens: k must be an int, got float"),
    "prune query rank": (prune(Q[0]), ValueError, r"prune_tokens: query must be \(B, H, L, D\), got shape \(4, 3, 8\)"),
    "prune dtype mix": (prune(key=K.bfloat16()), TypeError, r"prune_tokens: key must be float32, got bfloat16"),
    "prune heads": (prune(Q[:, :3]), ValueError, r"prune_tokens: query heads must be a multiple of key heads, got H=3, Hkv=2"),
    "prune range": (prune(key_range=(3, 12)), ValueError, r"prune_tokens: key_range must satisfy 0 <= start <= end <= N=10, got \(3, 12\)"),
    "prune no reduction": (
        prune(head_reduction=None),
        ValueError,
        r"prune_tokens: head_reduction must be one of 'mean', 'sum', 'max', got None",
    ),
    "prune no row reduction": (prune(query_reduction=None), ValueError, r"prune_tokens: query_reduction must be one of .* got None"),
    "prune tensors": (
        prune(tensors=(X[:, :9],)),
        ValueError,
        r"prune_tokens: tensors\[0\] must be \(B=2, N=10, ...\), got shape \(2, 9, 6\)",
    ),
    "prune one tensor": (prune(tensors=X), TypeError, r"prune_tokens: tensors must be a sequence of tensors, got Tensor"),
    "prune no tensors": (prune(tensors=()), ValueError, r"prune_tokens: tensors must hold at least one tensor, got none"),
    "prune tensors device": (prune(tensors=(X.to("meta"),)), ValueError, r"prune_tokens: tensors\[0\] must be on the device of query"),
    "prune keep_outside": (prune(keep_outside="no"), TypeError, r"prune_tokens: keep_outside must be a bool, got str"),
    "prune normalize": (prune(normalize="col"), ValueError, r"prune_tokens: normalize must be one of 'row', 'range', got 'col'"),
    # cosine_match, cosine_scores
    "a rank": (match(X[0]), ValueError, r"cosine_match: a must be \(B, M, C\), got shape \(10, 6\)"),
    "a numpy": (match(np.zeros((2, 10, 6))), TypeError, r"cosine_match: a must be a torch.Tensor, got ndarray"),
    "a dtype": (match(X.double(), X.double()), TypeError, r"cosine_match: a must be float32 or float16 or bfloat16, got float64"),
    "b rank": (match(b=X[0]), ValueError, r"cosine_match: b must be \(B, N, C\), got shape \(10, 6\)"),
    "b dtype": (match(b=X.half()), TypeError, r"cosine_match: b must be float32, got float16"),
    "b batch": (match(b=X[:1]), ValueError, r"cosine_match: b must be \(B=2, N, C=6\), got shape \(1, 10, 6\)"),
    "b channels": (similar(b=X[..., :5]), ValueError, r"cosine_scores: b must be \(B=2, N, C=6\), got shape \(2, 10, 5\)"),
    "b device": (match(b=X.to("meta")), ValueError, r"cosine_match: b must be on the device of a \(cpu\), got meta"),
    "a last stride": (match(X.transpose(1, 2), X.transpose(1, 2)), ValueError, r"cosine_match: a must be contiguous .* got stride 6"),
    "match k zero": (match(k=0), ValueError, r"cosine_match: k must be in \[1, 32\], got 0"),
    "match k large": (match(k=33), ValueError, r"cosine_match: k must be in \[1, 32\], got 33"),
    "match k float": (match(k=2.0), TypeError, r"cosine_match: k must be an int, got float"),
    "match largest": (match(largest="yes"), TypeError, r"cosine_match: largest must be a bool, got str"),
    "match self": (match(b=X[:, :9], exclude_self=True), ValueError, r"cosine_match: exclude_self needs a and b .* got M=10, N=9"),
    "match self type": (match(exclude_self="no"), TypeError, r"cosine_match: exclude_self must be a bool, got str"),
    "match mask dtype": (match(candidates=torch.ones(2, 10)), TypeError, r"cosine_match: candidates must be bool, got float32"),
    "match mask shape": (
        match(candidates=torch.ones(2, 9).bool()),
        ValueError,
        r"cosine_match: candidates must be \(B, N\) = \(2, 10\), got shape \(2, 9\)",
    ),
    "similar reduction": (similar(reduction="min"), ValueError, r"cosine_scores: reduction must be one of .* got 'min'"),
    "similar t": (similar(t=3), ValueError, r"cosine_scores: t goes with reduction 'bottom', got t=3 with reduction='mean'"),
    "similar no t": (similar(reduction="bottom"), TypeError, r"cosine_scores: t must be an int, got NoneType"),
    "similar t range": (similar(reduction="bottom", t=40), ValueError, r"cosine_scores: t must be in \[1, 32\], got 40"),
    # select_diverse
    "diverse rank": (diverse(S), ValueError, r"select_diverse: x must be \(B, N, C\), got shape \(2, 10\)"),
    "diverse dtype": (diverse(X.long()), TypeError, r"select_diverse: x must be float32 or float16 or bfloat16, got int64"),
    "diverse k": (diverse(k=11), ValueError, r"select_diverse: k must be in \[0, N=10\], got 11"),
    "diverse k negative": (diverse(k=-1), ValueError, r"select_diverse: k must be in \[0, N=10\], got -1"),
    "diverse k tensor": (diverse(k=torch.tensor([1, 2])), TypeError, r"select_diverse: k must be an int, got Tensor"),
    "diverse last stride": (diverse(X.transpose(1, 2)), ValueError, r"select_diverse: x must be contiguous .* got stride 6"),
    "diverse mask": (
        diverse(candidates=torch.ones(10).bool()),
        ValueError,
        r"select_diverse: candidates must be \(B, N\), got shape \(10,\)",
    ),
    "diverse first int": (diverse(first=0), TypeError, r"select_diverse: first must be a torch.Tensor, got int"),
    "diverse first dtype": (diverse(first=torch.zeros(2).int()), TypeError, r"select_diverse: first must be int64, got int32"),
    "diverse first shape": (
        diverse(first=torch.zeros(3).long()),
        ValueError,
        r"select_diverse: first must be \(B,\) = \(2,\), got shape \(3,\)",
    ),
    "diverse first value": (
        diverse(first=torch.tensor([0, 10])),
        ValueError,
        r"select_diverse: first must be in \[-1, N=10\), got 10 in row 1",
    ),
    "diverse metric": (diverse(metric="l2"), ValueError, r"select_diverse: metric must be one of 'cosine', 'euclidean', got 'l2'"),
    "diverse order": (diverse(order="score"), ValueError, r"select_diverse: order must be one of 'position', 'pick', got 'score'"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_says_op_argument_rule_and_what_came(name: str) -> None:
    call, kind, message = ROWS[name]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert re.search(rf"^tokensieve\.{message}", str(caught.value)), str(caught.value)


def test_bad_input_leaves_the_output_buffers_alone() -> None:
    out = torch.full((2, 3, 6), 7.0)
    with pytest.raises(ValueError, match="index must be in"):
        ts.gather_tokens_out([X], torch.tensor([[0, 1, 2], [0, 1, 10]]), [out])
    assert bool((out == 7).all())


def test_nan_scores_rank_last_without_debug_checks() -> None:
    assert ts.select_topk(torch.tensor([[torch.nan, -1.0, torch.nan]]), 2).tolist() == [[0, 1]]


def test_single_element_last_dimension_needs_no_stride() -> None:
    query, key = torch.zeros(1, 1, 1, 6)[..., ::6], torch.zeros(1, 1, 5, 6)[..., ::6]  # D = 1, stride 6
    assert ts.attention_scores(query, key).shape == (1, 5)
    assert ts.select_topk(torch.ones(3, 4)[:, ::4], 1).tolist() == [[0]] * 3

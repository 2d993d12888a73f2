"""The ops, as slow as they are plain: Python sorts, whole attention maps, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def visible_keys(
    query: Tensor, key: Tensor, causal: bool = False, bias: Tensor | None = None, query_positions: Tensor | None = None
) -> Tensor:
    """(B, H, L, N) bool: which keys a row may see. Positions win over the plain causal rule; a float bias hides nothing here."""
    B, H, L, _ = query.shape
    N = key.shape[2]
    keys = torch.arange(N, device=query.device)
    visible = torch.ones(B, H, L, N, dtype=torch.bool, device=query.device)
    if query_positions is not None:
        visible &= keys <= query_positions[:, None, :, None]
    elif causal:
        visible &= keys <= torch.arange(N - L, N, device=query.device)[:, None]
    if bias is not None and bias.dtype == torch.bool:
        visible &= bias
    return visible


def attention_logits(query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, H, L, N) scale * q.k + bias in `dtype`."""
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    keys = key.to(dtype).repeat_interleave(group, dim=1)
    logits = query.to(dtype) @ keys.transpose(-1, -2)
    logits = logits * (query.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None and bias.dtype != torch.bool:
        logits = logits + bias.to(dtype)
    return logits


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    key_range: tuple[int, int] | None = None,
    normalize: str = "row",
    query_reduction: str | None = "mean",
    head_reduction: str | None = "mean",
    row_weights: Tensor | None = None,
    query_positions: Tensor | None = None,
    activation: str = "softmax",
    head_weights: Tensor | None = None,
    accumulate: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(scores, lse) with the whole map, every step in `dtype`: float64 is the truth, the dtype of the inputs is the naive version."""
    start, end = key_range or (0, key.shape[2])
    visible = visible_keys(query, key, causal, bias, query_positions)
    logits = attention_logits(query, key, scale, bias, dtype).masked_fill(~visible, -math.inf)
    counted = logits[..., start:end] if normalize == "range" else logits
    if lse is None:
        lse = counted.logsumexp(-1)
        shifted = logits[..., start:end] - counted.amax(-1, keepdim=True) if counted.shape[-1] else logits[..., start:end]
        mass = (counted - counted.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True) if counted.shape[-1] else 1.0
        probabilities = shifted.exp() / mass
    else:
        lse = lse.to(dtype)
        probabilities = (logits[..., start:end] - lse[..., None]).exp()
    sees_nothing = (logits == -math.inf)[..., start:end] & (lse == -math.inf)[..., None]
    seen = (logits > -math.inf) | logits.isnan() if bias is not None and bias.dtype != torch.bool else visible
    seen = (seen & visible)[..., start:end]
    probabilities = probabilities.masked_fill(~visible[..., start:end] | sees_nothing, 0.0)
    if activation != "softmax":
        inner = logits[..., start:end]
        probabilities = (inner if activation == "logit" else inner.sigmoid()).masked_fill(~seen, 0.0)
    rows = _reduce_rows(probabilities, seen, query_reduction, row_weights, query_positions)
    scores = _reduce_heads(rows, head_reduction, head_weights)
    return scores if accumulate is None else scores + accumulate.to(dtype), lse


def _reduce_rows(p: Tensor, seen: Tensor, how: str | None, row_weights: Tensor | None, query_positions: Tensor | None) -> Tensor:
    """(B, H, L, R) -> (B, H, R)."""
    B, H, L, R = p.shape
    if how is None:
        return p
    if how == "max":
        if L == 0:
            return p.new_zeros(B, H, R)
        return p.masked_fill(~seen, -math.inf).amax(2).masked_fill(~seen.any(2), 0.0)
    weights = p.new_ones(B, L) if row_weights is None else row_weights.to(p.dtype)
    total = (p * weights[:, None, :, None]).sum(2)
    if how == "sum":
        return total
    if how == "visible_mean":
        share = (seen * weights[:, None, :, None]).sum(2)
        return torch.where(share == 0, torch.zeros_like(total), total / share)
    divisor = weights.sum(1)
    if row_weights is None and query_positions is not None:
        divisor = (query_positions >= 0).sum(1).to(p.dtype)
    return torch.where(divisor[:, None, None] == 0, torch.zeros_like(total), total / divisor[:, None, None])


def _reduce_heads(rows: Tensor, how: str | None, head_weights: Tensor | None) -> Tensor:
    if how is None:
        return rows
    if head_weights is not None:
        weights = head_weights.to(rows.dtype).view(*rows.shape[:2], *[1] * (rows.dim() - 2))
        total = (rows * weights).masked_fill(weights == 0, 0.0).sum(1)  # a head of weight 0 counts for nothing, even NaN
        share = weights.sum(1)
        return total if how == "sum" else torch.where(share == 0, torch.zeros_like(total), total / share)
    return rows.amax(1) if how == "max" else rows.sum(1) if how == "sum" else rows.mean(1)


def attention_pagerank(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = 5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """(B, H, N): v times the stored map, over and over."""
    B, H, N, _ = query.shape
    bias = None if mask is None else mask[:, None, None, :]
    logits = attention_logits(query, key, scale, None, dtype) / temperature
    visible = visible_keys(query, key, causal, bias)
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~visible, 0.0)
    v = torch.full((B, 1, N), 1.0 / max(N, 1), dtype=dtype) if start is None else start.to(dtype)[:, None]
    v = v.expand(B, H, N).to(query.device)
    for _ in range(iterations):
        v = (v[:, :, None] @ weights)[:, :, 0]
    return v


def select_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    always_keep: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """(B, K) int64 by sorting every row in Python: always_keep first, NaN last, larger score first, then the lower position."""
    B, N = scores.shape
    counts = k.tolist() if isinstance(k, Tensor) else [k] * B
    K = max_k if max_k is not None else int(k)
    index = torch.full((B, K), -1, dtype=torch.int64)
    for b in range(B):
        values = scores[b].double().tolist()
        keep = always_keep[b].tolist() if always_keep is not None else [False] * N
        allowed = candidates[b].tolist() if candidates is not None else [True] * N
        tokens = [n for n in range(N) if allowed[n] or keep[n]]
        tokens.sort(key=lambda n: (not keep[n], math.isnan(values[n]), 0.0 if math.isnan(values[n]) else -values[n], n))
        chosen = tokens[: counts[b]]
        if order == "position":
            chosen.sort()
        index[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return index.to(scores.device)


def complement_index(index: Tensor, N: int, capacity: int) -> Tensor:
    """(B, capacity) int64: the set difference, ascending, -1 behind it."""
    out = torch.full((index.shape[0], capacity), -1, dtype=torch.int64)
    for b, row in enumerate(index.tolist()):
        rest = sorted(set(range(N)) - set(row))
        out[b, : len(rest)] = torch.tensor(rest, dtype=torch.int64)
    return out.to(index.device)


def gather_tokens(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """(B, K, ...) of every tensor, differentiable; -1 gives zeros."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    out = []
    for t in tensors:
        if t.shape[1] == 0:
            out.append(t.new_zeros(*index.shape, *t.shape[2:]))
            continue
        unused = (index < 0).view(*index.shape, *[1] * (t.dim() - 2))
        out.append(t[rows, index.clamp(min=0)].masked_fill(unused, 0))
    return tuple(out)


def scatter_tokens(
    tensors: Sequence[Tensor], index: Tensor, values: Sequence[Tensor], mode: str = "replace", weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Token by token, differentiable; an addition is made in float64 and rounded twice, to float32 and to the dtype."""
    out = []
    for t, v in zip(tensors, values, strict=True):
        rows = [list(row.unbind(0)) for row in t.unbind(0)]
        for b, k in (index >= 0).nonzero().tolist():
            n = int(index[b, k])
            weight = 1.0 if weights is None else weights[b, k].double()
            added = rows[b][n].double() + weight * v[b, k].double() if mode == "add" else v[b, k]
            rows[b][n] = added.to(torch.float32).to(t.dtype) if mode == "add" and t.dtype != torch.float64 else added.to(t.dtype)
        out.append(torch.stack([torch.stack(row) if row else t[b] for b, row in enumerate(rows)]) if rows else t.clone())
    return tuple(out)


def prune_tokens(
    scores: Tensor, tensors: Sequence[Tensor], k: int, N: int, key_range: tuple[int, int] | None = None, keep_outside: bool = True
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(gathered, index) from the scores of key_range: the k best of the range and, if wanted, all tokens outside it."""
    start, end = key_range or (0, N)
    index = select_topk(scores, k) + start
    if keep_outside:
        outside = torch.tensor([*range(start), *range(end, N)], dtype=torch.int64, device=scores.device)
        index = torch.cat([index, outside.expand(scores.shape[0], -1)], dim=1).sort(dim=1).values
    return gather_tokens(tensors, index), index

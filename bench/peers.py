"""The contenders: what a competent user writes with a few torch calls ("smart eager"), and what the methods' authors run ("eager code").

Written from the papers' formulas. "Eager code" is the shape of all published implementations: attention weights of one layer are asked
for, so softmax(QK^T) is materialised over all rows and all heads, averaged over heads as a map, and then one row of it is read. Only the
map is charged to it, not the product with V, which an unpruned layer pays too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Range = tuple[int, int]
Lists = tuple[Tensor, Tensor] | None  # sources and targets; None = even and odd tokens


def few_row_scores(query: Tensor, key: Tensor, span: Range, causal: bool = False) -> Tensor:
    """(B, R) mean over heads and rows of softmax(QK^T) of a few rows; grouped heads by a reshape, so keys are not repeated."""
    B, H, L, D = query.shape
    Hkv, N = key.shape[1:3]
    rows = query.reshape(B, Hkv, H // Hkv * L, D)
    logits = (rows @ key.transpose(-1, -2)).view(B, H, L, N) * (D**-0.5)
    if causal:
        logits = logits.masked_fill(_future(L, N, query.device), -math.inf)
    return torch.softmax(logits, -1, dtype=torch.float32)[..., span[0] : span[1]].mean((1, 2))


def map_scores(query: Tensor, key: Tensor, span: Range, row: int, causal: bool) -> Tensor:
    """(B, R) from attention maps as `output_attentions=True` gives them: all rows, all heads, then one row of the mean over heads."""
    B, H, L, D = query.shape
    Hkv, N = key.shape[1:3]
    if Hkv != H:
        key = key[:, :, None].expand(B, Hkv, H // Hkv, N, D).reshape(B, H, N, D)
    logits = query @ key.transpose(2, 3) * (D**-0.5)
    if causal:
        logits = logits + torch.zeros(L, N, dtype=query.dtype, device=query.device).masked_fill(_future(L, N, query.device), -math.inf)
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype)
    return weights.mean(1)[:, row, span[0] : span[1]]


def _all_weights(query: Tensor, key: Tensor, causal: bool, temperature: float = 1.0) -> Tensor:
    """(B, H, N, N) attention weights in float32, as `output_attentions=True` gives them."""
    B, H, L, D = query.shape
    Hkv, N = key.shape[1:3]
    if Hkv != H:
        key = key[:, :, None].expand(B, Hkv, H // Hkv, N, D).reshape(B, H, N, D)
    logits = query @ key.transpose(2, 3) * (D**-0.5 / temperature)
    if causal:
        logits = logits + torch.zeros(L, N, dtype=query.dtype, device=query.device).masked_fill(_future(L, N, query.device), -math.inf)
    return torch.softmax(logits, -1, dtype=torch.float32)


def map_columns(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """(B, N) mean over heads and rows of the whole map."""
    return _all_weights(query, key, causal).mean(1).mean(1)


def chunked_columns(query: Tensor, key: Tensor, causal: bool, rows: int = 128) -> Tensor:
    """(B, N) as a careful user writes it: a few rows of the map at a time, only the keys that they see, sums kept."""
    B, H, L, D = query.shape
    Hkv, N = key.shape[1:3]
    total = torch.zeros(B, N, dtype=torch.float32, device=query.device)
    for begin in range(0, L, rows):
        end = min(L, begin + rows)
        seen = N - L + end if causal else N
        part = query[:, :, begin:end].reshape(B, Hkv, H // Hkv * (end - begin), D)
        logits = (part @ key[:, :, :seen].transpose(-1, -2)).view(B, H, end - begin, seen) * (D**-0.5)
        if causal:
            logits = logits.masked_fill(_future(end - begin, seen, query.device), -math.inf)
        total[:, :seen] += torch.softmax(logits, -1, dtype=torch.float32).sum((1, 2))
    return total / (H * L)


def map_pagerank(query: Tensor, key: Tensor, temperature: float, iterations: int) -> Tensor:
    """(B, H, N) of the stored causal map, as AIM's code does it."""
    weights = _all_weights(query, key, True, temperature)
    v = torch.full((*weights.shape[:2], 1, weights.shape[3]), 1.0 / weights.shape[3], device=query.device)
    for _ in range(iterations):
        v = v @ weights
    return v[:, :, 0]


def _future(L: int, N: int, device: torch.device) -> Tensor:
    return torch.ones(L, N, dtype=torch.bool, device=device).triu(N - L + 1)


def topk_sort(scores: Tensor, k: int) -> Tensor:
    """(B, k) positions, ascending."""
    return scores.topk(k, sorted=False).indices.sort().values


def with_outside(index: Tensor, span: Range, N: int) -> Tensor:
    """(B, K) positions of the range plus all positions outside it, ascending."""
    outside = torch.cat([torch.arange(span[0], device=index.device), torch.arange(span[1], N, device=index.device)])
    return torch.cat([index + span[0], outside.expand(index.shape[0], -1)], 1).sort().values


def rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, K, ...) of x, the fastest general way in torch: one index_select for a single sample, torch.gather for a batch."""
    if x.shape[0] == 1:
        return x.index_select(1, index[0])
    return gather_expand(x, index)


def gather_expand(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """torch.gather with the index expanded over the trailing dimensions."""
    wide = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return torch.gather(x, 1, wide, out=out)


def smart_prune(query: Tensor, key: Tensor, tensors: list[Tensor], k: int, span: Range, outside: bool = True) -> tuple[Tensor, ...]:
    """The gathered tensors, then the index: few-row scores, topk, cat of the text, sort, one gather a tensor."""
    index = topk_sort(few_row_scores(query, key, span), k)
    index = with_outside(index, span, key.shape[2]) if outside else index + span[0]
    return (*(rows(x, index) for x in tensors), index)


def map_prune(query: Tensor, key: Tensor, tensors: list[Tensor], k: int, span: Range, row: int, causal: bool) -> tuple[Tensor, ...]:
    """As smart_prune, from the map of all rows (decoder: causal, the last row ranks)."""
    scores = map_scores(query, key, span, row, causal)
    index = with_outside(scores.topk(k).indices, span, key.shape[2])
    return (*(rows(x, index) for x in tensors), index)


def row_prune(query: Tensor, key: Tensor, features: Tensor, k: int, span: Range) -> tuple[Tensor, Tensor]:
    """PyramidDrop's official step: a masked softmax of the ranking row alone, then per sample topk, sort, cat, and a padded batch."""
    B, N = features.shape[:2]
    mask = torch.zeros(B, 1, 1, N, dtype=query.dtype, device=query.device)
    weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + mask, -1, dtype=torch.float32)
    scores = weights.to(query.dtype).mean(1).mean(1)
    kept, indices = [], []
    for b in range(B):
        top = scores[b, span[0] : span[1]].topk(k).indices.sort().values + span[0]
        kept.append(torch.cat([features[b, : span[0]], features[b, top], features[b, span[1] :]]))
        indices.append(top)
    padded = torch.zeros(B, max(len(x) for x in kept), features.shape[2], dtype=features.dtype, device=features.device)
    for b, x in enumerate(kept):
        padded[b, : len(x)] = x
    return padded, with_outside(torch.stack(indices) - span[0], span, N)


def map_mask_prune(query: Tensor, key: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Encoder methods: the CLS row of the map, top-k, a boolean mask over the patches, features[mask]."""
    scores = map_scores(query, key, (1, key.shape[2]), 0, causal=False)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
    B, N = mask.shape
    index = torch.arange(N, device=mask.device).expand(B, N)[mask].view(B, k)
    return features[mask].view(B, k, -1), index


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(value, index), both (B, M), of the best cosine match."""
    best = (unit(a) @ unit(b).transpose(1, 2)).max(2)
    return best.values, best.indices


def mean_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(B, N) mean cosine similarity to all other tokens of the same set, from the matrix of pairs."""
    pairs = unit(a) @ unit(b).transpose(1, 2)
    return (pairs.sum(2) - pairs.diagonal(dim1=1, dim2=2)) / (b.shape[1] - 1)


def _far_and_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of one image and DivPrune's first pick: the second smallest of a column is its nearest other token."""
    one = unit(x[0].float())
    far = 1 - one @ one.T
    return far, far.topk(2, dim=0, largest=False).values[1].argmax()


def diverse_loop(x: Tensor, k: int) -> Tensor:
    """(1, k) picks as published: the minimum over the rows of all picks so far, anew for every pick."""
    far, first = _far_and_first(x)
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    picks[0] = first
    for i in range(1, k):
        picks[i] = far.index_select(0, picks[:i]).amin(0).argmax()
    return picks[None]


def diverse_incremental(x: Tensor, k: int) -> Tensor:
    """(1, k) picks with a running minimum over one new row a pick."""
    far, first = _far_and_first(x)
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    picks[0] = first
    nearest = far[first].clone()
    for i in range(1, k):
        pick = nearest.argmax()
        picks[i] = pick
        torch.minimum(nearest, far[pick], out=nearest)
    return picks[None]


def density_clusters(x: Tensor, clusters: int, k: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(centres, labels) of DPC-KNN as published: the matrix of distances, and two more of who is denser."""
    distance = torch.cdist(x, x) / math.sqrt(x.shape[2])
    density = (-(distance.topk(k, dim=-1, largest=False).values ** 2).mean(-1)).exp()
    density = density if noise is None else density + noise * 1e-6
    denser = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    most = distance.flatten(1).max(-1).values[:, None, None]
    nearest = (distance * denser + most * (1 - denser)).min(-1).values
    index = (nearest * density).topk(clusters).indices
    labels = distance.gather(1, index[..., None].expand(-1, -1, x.shape[1])).argmin(1)
    return index, labels.scatter(1, index, torch.arange(clusters, device=x.device).expand(len(x), -1))


def _matched(metric: Tensor, lists: Lists, cls: bool) -> tuple[Tensor, Tensor]:
    """(best similarity, its place among the targets), (B, S) both, from the whole matrix; CLS never merges."""
    x = unit(metric)
    a, b = (x[:, ::2], x[:, 1::2]) if lists is None else (x[:, lists[0]], x[:, lists[1]])
    scores = a @ b.transpose(1, 2)
    if cls:
        scores[:, 0] = -math.inf
    best = scores.max(-1)
    return best.values, best.indices


def _named(source: Tensor, target: Tensor, stay: Tensor, lists: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the lists -> tokens."""
    if lists is None:
        return 2 * source, 2 * target + 1, 2 * stay
    return lists[0][source], lists[1][target], lists[0][stay]


def match_sorted(metric: Tensor, r: int, lists: Lists = None, cls: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe as published: normalise, matrix, max, full argsort, split, gather, sort. (source, destination, stay) as tokens."""
    best, to = _matched(metric, lists, cls)
    order = best.argsort(dim=-1, descending=True)
    source = order[:, :r]
    return _named(source, to.gather(1, source), order[:, r:].sort(dim=1).values, lists)


def match_topk(metric: Tensor, r: int, lists: Lists = None, cls: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same with topk, and a mask instead of the second sort."""
    best, to = _matched(metric, lists, cls)
    source = best.topk(r, dim=1).indices
    left = torch.ones_like(best, dtype=torch.bool).scatter_(1, source, False)
    stay = left.nonzero()[:, 1].view(best.shape[0], -1)
    return _named(source, to.gather(1, source), stay, lists)

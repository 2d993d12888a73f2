"""One call of every op, on any device: what the CPU levels, the CUDA graphs and the stream tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tokensieve as ts
import torch
from reference.inputs import normal, queries_and_keys, seeded
from torch import Tensor

B, N, K = 2, 577, 64


class Given(NamedTuple):
    """Inputs of a seed, of the same shapes for all seeds."""

    query: Tensor  # (B, 16, 3, 64)
    rows: Tensor  # (B, 16, 80, 64): enough query rows for the kernels of all rows
    key: Tensor  # (B, 4, N, 64)
    hidden: Tensor  # (B, N, 256)
    ids: Tensor  # (B, N) int64, a permutation
    counts: Tensor  # (B,) int64, up to K
    scores: Tensor  # (B, N) float32
    mask: Tensor  # (B, N) bool


def given(seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Given:
    query, key = queries_and_keys(seeded(seed), B, 16, 4, 3, N, 64, dtype, device)
    return Given(
        query,
        normal(seeded(seed + 1), B, 16, 80, 64, dtype=dtype, device=device),
        key,
        normal(seeded(seed + 2), B, N, 256, dtype=dtype, device=device),
        torch.stack([torch.randperm(N, generator=seeded(seed + b)) for b in range(B)]).to(device),
        torch.randint(0, K + 1, (B,), generator=seeded(seed)).to(device),
        torch.rand(B, N, generator=seeded(seed + 3)).to(device),
        (torch.rand(B, N, generator=seeded(seed + 4)) < 0.8).to(device),
    )


def pruning(x: Given) -> tuple[Tensor, ...]:
    scores, lse = ts.attention_scores(x.query, x.key, causal=True, key_range=(5, N), return_lse=True)
    index = ts.select_topk(scores, x.counts, max_k=K)
    kept, kept_ids = ts.gather_tokens((x.hidden, x.ids), index)
    out = torch.empty_like(kept)
    ts.gather_tokens_out([x.hidden], index, [out])
    pruned = ts.prune_tokens(x.query, x.key, (x.hidden, x.ids), 100, key_range=(5, 500))
    return scores, lse, index, kept, kept_ids, out, *pruned.tensors, pruned.index, pruned.scores


def scoring(x: Given) -> tuple[Tensor, ...]:
    everything = ts.attention_scores(x.rows, x.key, query_reduction="sum", head_reduction=None)
    visible = ts.attention_scores(x.rows, x.key, activation="sigmoid", causal=True, query_reduction="visible_mean", accumulate=x.scores)
    logits = ts.attention_scores(x.query, x.key, activation="logit", query_reduction="max", bias=x.mask[:, None, None])
    lse = ts.attention_lse(x.rows, x.key, causal=True)
    given_lse = ts.attention_scores(x.rows, x.key, causal=True, lse=lse)
    pagerank = ts.attention_pagerank(x.key, x.key, temperature=0.5, iterations=3, mask=x.mask)
    return everything, visible, logits, lse, given_lse, pagerank, ts.pool_scores(x.scores, 5, "max"), ts.pool_scores(x.scores, 7)


def ragged(x: Given) -> tuple[Tensor, ...]:
    mass = ts.select_mass(x.scores, 0.3, capacity=K, candidates=x.mask)
    above = ts.select_threshold(x.scores, 0.9, capacity=K, min_k=3, order="score")
    samples = ts.select_samples(x.scores, 40)
    rest = ts.complement_index(mass.index, N)
    budgets = ts.allocate_budget(x.scores[:, :6].contiguous(), 100, mode="softmax", cap=30)
    packed = ts.pack_tokens(x.hidden, mass.index, B * K)
    unpacked = ts.unpack_tokens(packed.tensors, packed.slots)
    replaced = ts.scatter_tokens(x.hidden, mass.index, unpacked)
    added = ts.scatter_tokens(x.hidden, mass.index, unpacked, mode="add", weights=torch.ones_like(mass.index, dtype=torch.float32))
    quantiles, fence = ts.score_quantiles(x.scores, (0.25, 0.5, 0.9), candidates=x.mask), ts.tukey_fence(x.scores)
    assert isinstance(budgets, Tensor)
    return *mass, *above, *samples, rest, budgets, *packed, unpacked, replaced, added, quantiles, fence


def similarity(x: Given) -> tuple[Tensor, ...]:
    few, all_ = x.hidden[:, :20], x.hidden
    matches = (*ts.cosine_match(few, all_, candidates=x.mask), *ts.cosine_match(all_, all_, k=5, exclude_self=True))
    scores = [ts.cosine_scores(few, all_, reduction=how, candidates=x.mask) for how in ("mean", "sum", "max", None)]
    lowest = ts.cosine_scores(all_, few, reduction="bottom", t=3)
    picks = ts.select_diverse(all_, K, candidates=x.mask, order="pick"), ts.select_diverse(few, 7, metric="euclidean")
    noise = x.scores.contiguous()
    density = *ts.knn_density(few, 3), *ts.knn_density(all_, 40, noise=noise, mask=x.mask)
    clusters = ts.cluster_tokens(all_, K, noise=noise)
    return *matches, *scores, lowest, *picks, *density, *clusters, ts.nearest_center(few, x.ids[:, :5] % 20)


def merging(x: Given) -> tuple[Tensor, ...]:
    plan = ts.bipartite_match(x.key, 100, keep=1, bias=x.scores[:, : N // 2].contiguous())
    lists = ts.bipartite_match(x.hidden, 50, sources=x.ids[:, :200], targets=x.ids[:, 200:300], keep=x.ids[:, 300:], candidates=x.mask)
    merged = ts.merge_tokens((x.hidden, x.scores), plan, size=x.scores, mode="weighted")
    modes = [ts.merge_tokens(x.hidden, lists, mode=mode).tensors for mode in ("mean", "sum", "amax", "mlerp")]
    back = ts.unmerge_tokens(merged.tensors[0], plan)
    trace = ts.trace_tokens(torch.arange(N, device=x.ids.device).expand(B, -1).contiguous(), plan)
    labels = ts.run_labels(x.mask)
    by_label = ts.merge_by_label(x.hidden, labels, N, weights=x.scores, epsilon=1e-6)
    fused = ts.fuse_dropped(x.hidden, x.scores, x.ids[:, :K], normalize=True)
    centers = x.ids[:, :K].contiguous()
    nearest = [ts.merge_into_nearest(x.hidden, x.hidden, centers, weights=x.scores, neighbors=n).tensors for n in (None, 5)]
    matrix = ts.assignment_matrix(trace, plan.index.shape[1])
    return *plan, *lists, *merged.tensors, merged.size, merged.log_size, *modes, back, trace, labels, *by_label, fused, *nearest, matrix


def pooling(x: Given) -> tuple[Tensor, ...]:
    tokens, scores = x.hidden[:, 1:], x.scores[:, 1:]
    grids = [ts.pool_grid(tokens, (24, 24), window=2), ts.pool_grid(tokens, (24, 24), size=(14, 14), kind="bilinear")]
    bins = ts.pool_grid(tokens, (24, 24), size=(6, 9), within=(8, 8), kind="max")
    windows = ts.pool_windows(tokens, scores, (4, 12, 12), (2, 3, 3), temperature=0.1)
    folded, runs = ts.space_to_depth(tokens, (24, 24)), ts.pool_runs(x.hidden, x.ids[:, :1] % 7, 64, 8)
    return *grids, bins, windows, folded, runs, *ts.row_column_means(tokens.unflatten(1, (9, 64)))


GROUPS: dict[str, Callable[[Given], tuple[Tensor, ...]]] = {
    "pruning": pruning,
    "scoring": scoring,
    "ragged": ragged,
    "similarity": similarity,
    "merging": merging,
    "pooling": pooling,
}

"""What a call costs before any work: every op on a handful of numbers, next to an aten op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tokensieve as ts
import torch
from reference import budget, density, match, merge, pool, ragged, samples, similarity
from reference import ops as reference
from torch import Tensor

from . import cases
from .harness import Case, Inputs, Settings, Target

LIMIT_US = 6.0  # over torch.add
QUICK = ("attention_scores", "select_topk", "gather_tokens", "gather_tokens_out", "prune_tokens")
# Made of several ops: no limit of one call.
COMPOSED = (
    "assignment_matrix",
    "cluster_tokens",
    "merge_into_nearest",
    "pack_tokens",
    "pool_scores",
    "run_labels",
    "trace_tokens",
    "tukey_fence",
    "unpack_tokens",
)

N, K = 8, 2


class Small(NamedTuple):
    """The arguments that the ops share."""

    query: Tensor  # (1, 2, 1, 8)
    key: Tensor  # (1, 2, N, 8)
    x: Tensor  # (1, N, 4)
    scores: Tensor  # (1, N), positive
    index: Tensor  # (1, K)
    out: Tensor  # (1, K, 4)
    labels: Tensor  # (1, N), two of them
    starts: Tensor  # (1, N) bool
    merged: Tensor  # (1, N - K, 4)
    trace: Tensor  # (1, N)
    plan: merge.Plan  # of two merges


Call = Callable[[Small], Any]


def _small(seed: int, device: str) -> Small:
    x = cases.randn(seed + 2, 1, N, 4, device=device)
    return Small(
        query=cases.randn(seed, 1, 2, 1, 8, device=device),
        key=cases.randn(seed + 1, 1, 2, N, 8, device=device),
        x=x,
        scores=x[..., 0].abs().contiguous(),
        index=torch.tensor([[1, 3]], device=device),
        out=cases.randn(seed + 4, 1, K, 4, device=device),
        labels=torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1]], device=device),
        starts=torch.tensor([[True, False, False, True, False, True, False, False]], device=device),
        merged=cases.randn(seed + 3, 1, N - K, 4, device=device),
        trace=torch.arange(N, device=device)[None],
        plan=merge.Plan(torch.tensor([[0, 1, 2, 3, 4, 5]], device=device), torch.tensor([[0, 1, 2, 3, 4, 5, 1, 3]], device=device)),
    )


CALLS: dict[str, Call] = {
    "attention_scores": lambda s: ts.attention_scores(s.query, s.key),
    "attention_lse": lambda s: ts.attention_lse(s.query, s.key),
    "attention_pagerank": lambda s: ts.attention_pagerank(s.key, s.key, iterations=1),
    "select_topk": lambda s: ts.select_topk(s.scores, K),
    "select_mass": lambda s: ts.select_mass(s.scores, 0.5, capacity=N),
    "select_threshold": lambda s: ts.select_threshold(s.scores, 0.5, capacity=N),
    "select_samples": lambda s: ts.select_samples(s.scores, 3),
    "select_diverse": lambda s: ts.select_diverse(s.x, K),
    "allocate_budget": lambda s: ts.allocate_budget(s.scores, 12),
    "score_quantiles": lambda s: ts.score_quantiles(s.scores, (0.25, 0.75)),
    "tukey_fence": lambda s: ts.tukey_fence(s.scores),
    "complement_index": lambda s: ts.complement_index(s.index, N),
    "gather_tokens": lambda s: ts.gather_tokens(s.x, s.index),
    "gather_tokens_out": lambda s: ts.gather_tokens_out((s.x,), s.index, (s.out,)),
    "scatter_tokens": lambda s: ts.scatter_tokens(s.x, s.index, s.out),
    "pack_tokens": lambda s: ts.pack_tokens(s.x, s.index, K),
    "unpack_tokens": lambda s: ts.unpack_tokens(s.x[0], s.index),
    "prune_tokens": lambda s: ts.prune_tokens(s.query, s.key, (s.x,), K, key_range=(1, 7)),
    "cosine_match": lambda s: ts.cosine_match(s.x, s.x),
    "cosine_scores": lambda s: ts.cosine_scores(s.x, s.x),
    "bipartite_match": lambda s: ts.bipartite_match(s.x, K),
    "merge_tokens": lambda s: ts.merge_tokens(s.x, s.plan),
    "unmerge_tokens": lambda s: ts.unmerge_tokens(s.merged, s.plan),
    "trace_tokens": lambda s: ts.trace_tokens(s.trace, s.plan),
    "assignment_matrix": lambda s: ts.assignment_matrix(s.trace, N),
    "merge_by_label": lambda s: ts.merge_by_label(s.x, s.labels, 2),
    "run_labels": lambda s: ts.run_labels(s.starts),
    "fuse_dropped": lambda s: ts.fuse_dropped(s.x, s.scores, s.index),
    "merge_into_nearest": lambda s: ts.merge_into_nearest(s.x, s.x, s.index),
    "knn_density": lambda s: ts.knn_density(s.x, 2),
    "nearest_center": lambda s: ts.nearest_center(s.x, s.index),
    "cluster_tokens": lambda s: ts.cluster_tokens(s.x, K, k=2),
    "pool_scores": lambda s: ts.pool_scores(s.scores, 3),
    "pool_grid": lambda s: ts.pool_grid(s.x, (2, 4), window=2),
    "pool_windows": lambda s: ts.pool_windows(s.x, s.scores, (2, 4), 2),
    "space_to_depth": lambda s: ts.space_to_depth(s.x, (2, 4)),
    "pool_runs": lambda s: ts.pool_runs(s.x, s.index[:, :1], 4, 2),
    "row_column_means": lambda s: ts.row_column_means(s.key),
}


def _padded(rows: list[list[int]], width: int, ordered: bool = True) -> list[Tensor]:
    """(index, counts, overflow) of the tokens of one row, best first."""
    row = (sorted(rows[0]) if ordered else rows[0]) + [-1] * (width - len(rows[0]))
    return [torch.tensor([row]), torch.tensor([len(rows[0])]), torch.tensor([False])]


def _pruned(s: Small) -> list[Tensor]:
    scores = reference.attention_scores(s.query, s.key, key_range=(1, 7))[0]
    kept, index = reference.prune_tokens(scores, (s.x,), K, N, (1, 7))
    return [*kept, index, scores]


def _quartiles(s: Small) -> Tensor:
    return torch.quantile(s.scores.double(), torch.tensor([0.25, 0.75], dtype=torch.float64, device=s.scores.device), dim=1).T


def _nearest(s: Small) -> list[Tensor]:
    """Every token but the centres joins its nearest centre: centre + mean of who joined."""
    labels = similarity.cosine_match(s.x, s.x[:, s.index[0]], k=1)[1][..., 0]
    labels[0, s.index[0].cpu()] = -1
    joined, _ = merge.merge_by_label(s.x.cpu(), labels, K, None, "mean")
    labels[0, s.index[0].cpu()] = torch.arange(K)
    return [s.x[:, s.index[0]].cpu().double() + joined, labels]


def _clusters(s: Small) -> list[Tensor]:
    dense = density.density(s.x, 2)
    distance = density.denser_distance(s.x, dense)
    index = (dense * distance).topk(K).indices
    return [index, density.nearest_center(s.x, index), dense, distance]


def _merged(s: Small) -> list[Tensor]:
    (x,), size = merge.merge_tokens([s.x.cpu()], merge.Plan(*(t.cpu() for t in s.plan)), None, "mean")
    return [x, size, size.log()]


WANTED: dict[str, Callable[[Small], Any]] = {
    "attention_scores": lambda s: reference.attention_scores(s.query, s.key)[0],
    "attention_lse": lambda s: reference.attention_scores(s.query, s.key)[1],
    "attention_pagerank": lambda s: reference.attention_pagerank(s.key, s.key, iterations=1),
    "select_topk": lambda s: reference.select_topk(s.scores, K),
    "select_mass": lambda s: _padded(ragged.select_mass(s.scores, [0.5]), N),
    "select_threshold": lambda s: _padded(ragged.select_threshold(s.scores, [0.5]), N),
    "select_samples": lambda s: _padded([samples.sample_row(s.scores[0].tolist(), 3, [True] * N)], 3, ordered=False),
    "select_diverse": lambda s: similarity.select_diverse(s.x, K),
    "allocate_budget": lambda s: torch.tensor([budget.allocate_row(s.scores[0].cpu().numpy(), 12)[0]]),
    "score_quantiles": _quartiles,
    "tukey_fence": lambda s: _quartiles(s)[:, 1] + 1.5 * (_quartiles(s)[:, 1] - _quartiles(s)[:, 0]),
    "complement_index": lambda s: reference.complement_index(s.index, N, N - K),
    "gather_tokens": lambda s: reference.gather_tokens((s.x,), s.index)[0],
    "gather_tokens_out": lambda s: reference.gather_tokens((s.x,), s.index)[0],
    "scatter_tokens": lambda s: reference.scatter_tokens((s.x,), s.index, (s.out,))[0],
    "pack_tokens": lambda s: [s.x[0, s.index[0]], torch.tensor([0, K]), torch.tensor([[0, 1]]), torch.tensor(K)],
    "unpack_tokens": lambda s: s.x[:, s.index[0]],
    "prune_tokens": _pruned,
    "cosine_match": lambda s: [t[..., 0] for t in similarity.cosine_match(s.x, s.x, k=1)],
    "cosine_scores": lambda s: similarity.cosine_scores(s.x, s.x),
    "bipartite_match": lambda s: match.bipartite_match(s.x, K),
    "merge_tokens": _merged,
    "unmerge_tokens": lambda s: s.merged[:, s.plan.inverse[0]],
    "trace_tokens": lambda s: s.plan.inverse,
    "assignment_matrix": lambda s: torch.eye(N)[None],
    "merge_by_label": lambda s: merge.merge_by_label(s.x.cpu(), s.labels.cpu(), 2, None, "mean"),
    "run_labels": lambda s: s.starts.long().cumsum(1) - 1,
    "fuse_dropped": lambda s: merge.fuse_dropped(s.x.cpu(), s.scores.cpu(), s.index),
    "merge_into_nearest": _nearest,
    "knn_density": lambda s: _clusters(s)[2:],
    "nearest_center": lambda s: density.nearest_center(s.x, s.index),
    "cluster_tokens": _clusters,
    "pool_grid": lambda s: pool.pool_grid(s.x, (2, 4), window=(2, 2)),
    "pool_windows": lambda s: pool.pool_windows(s.x, s.scores, (2, 4), (2, 2), None, 1.0),
    "space_to_depth": lambda s: pool.space_to_depth(s.x, (2, 4), (2, 2)),
    "pool_runs": lambda s: pool.pool_runs(s.x, s.index[:, :1].tolist(), 4, 2),
    "row_column_means": lambda s: [s.key.mean(2), s.key.mean(1)],
    "pool_scores": lambda s: (s.scores + s.scores.roll(1, 1).index_fill(1, s.index.new_tensor([0]), 0) + _left(s)) / 3,
}


def _left(s: Small) -> Tensor:
    return s.scores.roll(-1, 1).index_fill(1, s.index.new_tensor([N - 1]), 0)


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _flat(part)]


def _check(name: str) -> Callable[[Inputs, Any, bool], str | None]:
    """Tiny as they are, the outputs are compared too."""

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        small: Small = inputs[0]
        if not ours:
            return None if torch.equal(output, 2 * small.x) else "x + x is not 2x"
        got, wanted = _flat(small.out if name == "gather_tokens_out" else output), _flat(WANTED[name](small))
        if [t.shape for t in got] != [t.shape for t in wanted]:
            return f"shapes {[tuple(t.shape) for t in got]}, not {[tuple(t.shape) for t in wanted]}"
        pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(got, wanted, strict=True)]
        return None if all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs) else "output differs from the reference"

    return check


def build(settings: Settings) -> Iterator[Case]:
    device = settings.device
    for name, call in CALLS.items():
        composed = name in COMPOSED
        yield Case(
            op=name,
            case=f"8 tokens: the cost of {'several calls' if composed else 'a call'}",
            dtype="f32",
            inputs=lambda seed: (_small(seed, device),),
            ours=call,
            peers={"torch.add": lambda s: torch.add(s.x, s.x)},
            check=_check(name),
            quick=name in QUICK,
            call_only=True,
            targets=() if composed else (Target(LIMIT_US, of="overhead_us"),),
        )

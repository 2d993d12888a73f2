"""Rows that hold nothing to select: what every op with a mask gives for them, beside a row that is whole."""

from __future__ import annotations

import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import normal, seeded
from torch import Tensor

N = 12


def half_masked(device: str) -> tuple[Tensor, Tensor]:
    """Scores of two rows, and a mask that hides all tokens of the first."""
    mask = torch.zeros(2, N, dtype=torch.bool, device=device)
    mask[1] = True
    return torch.rand(2, N, generator=seeded(1)).to(device), mask


def test_selections_of_an_all_masked_row_are_empty(device: str) -> None:
    scores, mask = half_masked(device)
    for order in ("position", "score"):
        index = ts.select_topk(scores, 4, candidates=mask, order=order)
        assert index[0].tolist() == [-1] * 4
        assert_equal(index[1], ts.select_topk(scores, 4, order=order)[1])
    selections = (
        (ts.select_mass(scores, 0.5, capacity=N, candidates=mask), ts.select_mass(scores, 0.5, capacity=N)),
        (ts.select_threshold(scores, 0.2, capacity=N, candidates=mask), ts.select_threshold(scores, 0.2, capacity=N)),
        (ts.select_samples(scores, 5, candidates=mask), ts.select_samples(scores, 5)),
    )
    for got, whole in selections:
        assert (got.counts[0].item(), got.overflow[0].item(), set(got.index[0].tolist())) == (0, False, {-1})
        for masked, plain in zip(got, whole, strict=True):
            assert_equal(masked[1], plain[1])


def test_an_empty_selection_goes_through_what_follows(device: str) -> None:
    scores, mask = half_masked(device)
    x = normal(seeded(2), 2, N, 3, device=device)
    index = ts.select_topk(scores, 4, candidates=mask)
    assert bool((ts.gather_tokens(x, index)[0] == 0).all())
    rest = ts.complement_index(index, N, capacity=N)
    assert rest[0].tolist() == list(range(N))
    assert int((rest[1] >= 0).sum()) == N - 4
    packed = ts.pack_tokens(x, index, 8)
    assert packed.cu_seqlens.tolist() == [0, 0, 4]
    assert int(packed.total) == 4
    assert_equal(ts.scatter_tokens(x, index, ts.gather_tokens(x, index)), x)


def test_thresholds_of_an_all_masked_row_keep_nothing(device: str) -> None:
    scores, mask = half_masked(device)
    for values in (ts.score_quantiles(scores, (0.0, 0.5, 1.0), candidates=mask), ts.tukey_fence(scores, candidates=mask)[:, None]):
        assert bool(torch.isnan(values[0]).all())
        assert not bool(torch.isnan(values[1]).any())
    kept = ts.select_threshold(scores, ts.tukey_fence(scores, factor=-1.0, candidates=mask), capacity=N)
    assert kept.counts[0].item() == 0
    assert kept.counts[1].item() > 0


def test_scores_where_nothing_is_seen(device: str) -> None:
    _, mask = half_masked(device)
    query, key = normal(seeded(3), 2, 2, N, 8, device=device), normal(seeded(4), 2, 2, N, 8, device=device)
    hidden = mask[:, None, None]
    for L in (1, N):
        rows = query[:, :, :L]
        scores, lse = ts.attention_scores(rows, key, bias=hidden, return_lse=True)
        assert bool((scores[0] == 0).all())
        assert bool((lse[0] == -torch.inf).all())
        assert_equal(ts.attention_lse(rows, key, bias=hidden), lse)
        torch.testing.assert_close(scores[1].sum(), torch.ones((), device=device))
    rank = ts.attention_pagerank(query, key, mask=mask, iterations=2)
    assert bool((rank[0] == 0).all())
    torch.testing.assert_close(rank[1].sum(-1), torch.ones(2, device=device))
    start = torch.rand(2, N, generator=seeded(5)).to(device)
    assert_equal(ts.attention_pagerank(query, key, mask=mask, start=start, iterations=0), start[:, None].expand(2, 2, N))

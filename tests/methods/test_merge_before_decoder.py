"""Methods that merge before the language model: their functions against loops in float64, their numbers, their edges."""

from __future__ import annotations

import pytest
import torch
from reference import merge_methods as reference
from reference.inputs import randn
from tokensieve.methods import AIMMerge, PruMerge, PruMergePlus, VisionZip, aim_merge, prumerge, visionzip


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_prumerge_like_the_paper(plus: bool, seed: int) -> None:
    N, method = 49, (PruMergePlus if plus else PruMerge)(neighbors=6)
    query, key, features = 2 * randn(seed, 2, 2, 1, 8), 2 * randn(seed + 10, 2, 2, N + 1, 8), randn(seed + 20, 2, N, 5)
    done = prumerge.keep_outliers(query, key, features, method)
    for b in range(2):
        joined = key[b].double().transpose(0, 1).flatten(1)
        centers, want = reference.prumerge(query[b, :, 0].double().flatten(), joined, features[b].double(), 6, plus)
        real = done.centers[b][done.centers[b] >= 0].tolist()
        assert real == centers
        got = torch.cat([done.tokens[b, : len(real)], done.tokens[b, -1:]])
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
        assert not done.tokens[b, len(real) : -1].any()


def test_prumerge_without_outliers() -> None:
    scores = torch.full((1, 30), 1 / 31)
    assert (prumerge.select(scores, PruMerge()) == -1).all()
    plus = prumerge.select(scores, PruMergePlus())
    assert plus[plus >= 0].tolist() == [0, 10, 20]
    features = randn(0, 1, 30, 4)
    out = prumerge.merge(features, features, scores, prumerge.select(scores, PruMerge()), 4)
    torch.testing.assert_close(out[:, -1], features.sum(1) / 31)


def test_prumerge_of_a_share() -> None:
    scores = randn(0, 1, 40).softmax(1)
    order = scores[0].argsort(descending=True).tolist()
    assert prumerge.select(scores, PruMerge(adaptive=False, ratio=0.2))[0].tolist() == order[:8]
    plus = prumerge.select(scores, PruMergePlus(adaptive=False, ratio=0.2))[0]
    assert plus[plus >= 0].tolist() == order[:8] + [n for n in range(2, 39, 5) if n not in order[:8]]


@pytest.mark.parametrize(("N", "split"), [(30, (8, 4)), (31, (10, 20)), (12, (0, 3)), (9, (4, 0)), (9, (4, 5))])
def test_visionzip_like_the_paper(N: int, split: tuple[int, int]) -> None:
    scores, metric, features, cls = randn(0, 2, N).softmax(1), randn(1, 2, N, 5), randn(2, 2, N, 4), randn(3, 2, 4)
    zipped = visionzip.choose(scores, metric, [split] * 2)
    out = visionzip.merge(cls, features, zipped)
    for b in range(2):
        best, targets, joined = reference.visionzip(scores[b], metric[b].double(), *split, list(range(N)))
        assert zipped.dominant[b].tolist() == best
        assert zipped.targets[b].tolist() == targets
        x = features[b].double()
        more = [x[t] + (x[j].mean(0) if j else 0) for t, j in zip(targets, joined)]
        want = torch.cat([cls[b].double()[None], x[best], *(m[None] for m in more)])
        torch.testing.assert_close(out[b].double(), want, atol=1e-6, rtol=1e-5)


def test_visionzip_of_crops_with_padding() -> None:
    N, candidates = 20, torch.ones(2, 20, dtype=torch.bool)
    candidates[1, 6:] = False
    method = VisionZip(6, 4)
    scores, metric = randn(0, 2, N).softmax(1), randn(1, 2, N, 5)
    zipped = visionzip.choose(scores, metric, [method.split(20), method.split(6)], candidates)
    for b, among in enumerate((list(range(N)), list(range(6)))):
        best, targets, joined = reference.visionzip(scores[b], metric[b].double(), *method.split(len(among)), among)
        assert [n for n in zipped.dominant[b].tolist() if n >= 0] == best
        assert [n for n in zipped.targets[b].tolist() if n >= 0] == targets
        assert [(zipped.labels[b] == t).nonzero()[:, 0].tolist() for t in range(len(targets))] == joined


def test_visionzip_packs_crops_as_the_official_code() -> None:
    grid, side, d, c = (2, 1), (2, 3), 2, 1
    dominant = torch.tensor([[0, 4], [1, 5], [0, 4]])
    tokens = torch.arange(3 * (1 + d + c)).view(3, 1 + d + c, 1).float()
    zipped = visionzip.Zipped(dominant, torch.zeros(3, c, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64))
    # crops side by side: row 0 holds crop 1's patch 1 and crop 2's patch 0, row 1 crop 1's patch 5 and crop 2's patch 4
    want = [0, 1, 2, 3, 5, 9, 6, 10, 4, 8, 7, 11]
    assert visionzip.pack(tokens, zipped, grid, side).flatten().tolist() == want


@pytest.mark.parametrize(("N", "rounds"), [(16, (8, 4)), (17, (5, 6, 3)), (2, (1,)), (7, (0, 2))])
def test_aim_like_the_paper(N: int, rounds: tuple[int, ...]) -> None:
    tokens = randn(N, 3, N, 6)
    merged, plans = aim_merge.merge_rounds(tokens, rounds)
    assert merged.shape[1] == AIMMerge(r=rounds).keep_count(N)
    assert len(plans) == sum(r > 0 for r in rounds)
    for b in range(3):
        torch.testing.assert_close(merged[b].double(), reference.aim(tokens[b].double(), rounds), atol=1e-6, rtol=1e-5)

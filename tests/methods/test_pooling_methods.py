"""DPC-KNN, Chat-UniVi, LLaVolta, LLaVA-OneVision pooling and LEOPARD against loops written from the papers, their edges and errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tokensieve as ts
import torch
from reference.inputs import normal, seeded
from tokensieve.methods import DPCKNN, ChatUniVi, Leopard, LLaVAOneVision, LLaVolta
from tokensieve.methods.chatunivi import cluster_count, frame_events, merge_levels
from tokensieve.methods.dpcknn import merge_clusters
from tokensieve.methods.leopard import space_to_depth
from tokensieve.methods.llava_ov_pool import pool_frames, pool_grid
from tokensieve.methods.llavolta import pool_image, pool_sequence
from torch import Tensor


def peaks_by_loops(
    x: Tensor, clusters: int, k: int, noise: Tensor, mask: Tensor
) -> list[tuple[list[float], list[float], list[int], list[int]]]:
    """float64, pair by pair."""
    B, N, C = x.shape
    pair = [[[math.dist(a, b) / math.sqrt(C) for b in image] for a in image] for image in x.double().tolist()]
    far = max(d for image in pair for row in image for d in row) + 1
    out = []
    for b in range(B):
        d = [[pair[b][i][j] if mask[b, j] else far for j in range(N)] for i in range(N)]
        density = [math.exp(-sum(v * v for v in sorted(d[i])[:k]) / k) + float(noise[b, i]) * 1e-6 for i in range(N)]
        density = [value if mask[b, i] else 0.0 for i, value in enumerate(density)]
        most = max(map(max, d))
        nearest = [min([most, *(d[i][j] for j in range(N) if density[j] > density[i])]) for i in range(N)]
        index = sorted(range(N), key=lambda i: -density[i] * nearest[i])[:clusters]
        labels = [index.index(i) if i in index else min(range(clusters), key=lambda c: d[index[c]][i]) for i in range(N)]
        out.append((density, nearest, index, labels))
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_clusters_against_loops(padded: bool) -> None:
    for seed, (N, C, clusters, k) in enumerate([(12, 3, 3, 3), (31, 8, 9, 5), (40, 5, 1, 4), (7, 2, 7, 7)]):
        x = normal(seeded(seed), 2, N, C)
        noise = torch.rand(2, N, generator=seeded(seed + 1))
        mask = torch.arange(N) < torch.tensor([[N], [max(N - 3, clusters)]]) if padded else torch.ones(2, N).bool()
        got = ts.cluster_tokens(x, clusters, k=k, noise=noise, mask=mask if padded else None)
        for b, (density, nearest, index, labels) in enumerate(peaks_by_loops(x, clusters, k, noise, mask)):
            assert got.index[b].tolist() == index, f"{seed} {b}"
            assert got.density[b].tolist() == pytest.approx(density, rel=1e-5)
            assert got.distance[b].tolist() == pytest.approx(nearest, rel=1e-5)
            real = [i for i in range(N) if mask[b, i]]
            assert [got.labels[b, i].item() for i in real] == [labels[i] for i in real]


def test_clusters_of_equal_tokens_takes_the_lowest() -> None:
    got = ts.cluster_tokens(torch.ones(1, 6, 4), 2, k=3)
    assert got.index.tolist() == [[0, 1]]
    assert got.labels.tolist() == [[0, 1, 0, 0, 0, 0]]
    assert got.density.tolist() == [[1.0] * 6]


def test_merge_clusters_means_shares_and_gradients() -> None:
    x, scores = normal(seeded(3), 2, 9, 4).requires_grad_(), normal(seeded(4), 2, 9).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0, 3], [3, 3, 3, 0, 1, 2, 0, 0, 3]])
    merged, share = merge_clusters(x, labels, 4, scores)
    weights = scores.double().exp()
    member = torch.nn.functional.one_hot(labels, 4).double()
    total = (member * weights[..., None]).sum(1) + 1e-6
    want = torch.einsum("bnk,bn,bnc->bkc", member, weights, x.double()) / total[..., None]
    torch.testing.assert_close(merged.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(share.double(), weights / total.gather(1, labels), rtol=1e-5, atol=1e-6)
    (merged.square().sum()).backward()
    theirs = torch.autograd.grad(want.square().sum(), (x, scores))
    for mine, wanted in zip((x.grad, scores.grad), theirs):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_chat_univi_levels_and_events() -> None:
    x = normal(seeded(5), 2, 20, 6).requires_grad_()
    method = ChatUniVi(levels=(8, 0.5), neighbors=(5, 3))
    out = merge_levels(x, method)
    first = ts.cluster_tokens(x, 8, k=5)
    level = merge_clusters(x, first.labels, 8)[0]
    second = merge_clusters(level, ts.cluster_tokens(level, 4, k=3).labels, 4)[0]
    assert torch.equal(out, torch.cat([level, second], 1))
    out.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert [method.neighbors_of(0, n) for n in (9, 5, 4, 2, 1)] == [5, 5, 2, 1, 1]
    assert [cluster_count(r, 10) for r in (64, 0.25, 1.5, 0.01)] == [10, 3, 2, 1]
    frames = torch.tensor([0.0, 8.0, 8.1, 0.1, 0.0, 30.0, 30.1, 8.0]).view(1, 8, 1, 1)
    events = frame_events(frames, ChatUniVi(events=0.5), noise=torch.rand(1, 8, generator=seeded(1)))[0].tolist()
    order = list(dict.fromkeys(events))
    assert order == list(range(len(order)))  # numbered as they appear
    assert events[0] != events[1]
    assert events[5] != events[0]


def test_pool_sequence_against_slices() -> None:
    x = normal(seeded(6), 2, 40, 3).requires_grad_()
    ids = torch.arange(2100, 2140)[None]
    out, positions = pool_sequence(x, ids, [[2, 20], [0, 30]], 10, 4)
    want, where = [], []
    for b, starts in enumerate([[2, 20], [0, 30]]):
        rows, at, places = [], 0, []
        for start in starts:
            rows += [x[b, at:start], x[b, start : start + 8].view(2, 4, 3).mean(1)]
            places += [*range(2100 + at, 2100 + start), *(int(ids[0, s : s + 4].half().float().mean().half()) for s in (start, start + 4))]
            at = start + 10
        want.append(torch.cat([*rows, x[b, at:]]))
        where.append([*places, *range(2100 + at, 2140)])
    torch.testing.assert_close(out, torch.stack(want))
    assert positions.tolist() == where
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 10:12].abs().sum() == 0  # the rest behind the last whole average
    assert float(x.grad[0, 2, 0]) == 0.25
    assert torch.equal(pool_image(x[:, 2:12], 4)[0], out[0, 2:4])
    assert pool_image(x[:, :3], 4).shape == (2, 0, 3)


def test_pool_sequence_without_images_and_of_stride_one_copies() -> None:
    x, ids = normal(seeded(7), 2, 9, 3), torch.arange(9).expand(2, -1)
    for images, stride in (([[], []], 4), ([[1], [2]], 1)):
        out, positions = pool_sequence(x, ids, images, 5, stride)
        assert torch.equal(out, x)
        assert torch.equal(positions, ids)


@pytest.mark.parametrize("kind", ["average", "max"])
def test_pool_grid_windows(kind: str) -> None:
    x = normal(seeded(8), 2, 35, 3)
    out = pool_grid(x, (5, 7), (2, 3), kind).view(2, 2, 3, 3)
    for row in range(2):
        for column in range(3):
            window = x.view(2, 5, 7, 3)[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1, 2)
            torch.testing.assert_close(out[:, row, column], window.mean(1) if kind == "average" else window.amax(1))


@pytest.mark.parametrize("kind", ["average", "max"])
def test_windows_of_the_stride_that_do_not_fill_the_grid(kind: str) -> None:
    x = normal(seeded(10), 2, 169, 3)
    out = pool_frames(x, LLaVAOneVision(stride=5, kind=kind, newline="none"))
    pool = torch.nn.functional.avg_pool2d if kind == "average" else torch.nn.functional.max_pool2d
    torch.testing.assert_close(out, pool(x.view(2, 13, 13, 3).permute(0, 3, 1, 2), 5).permute(0, 2, 3, 1).reshape(8, 3))


def test_pool_grid_bilinear_by_taps() -> None:
    x = normal(seeded(9), 1, 35, 2).requires_grad_()
    out = pool_grid(x, (5, 7), (3, 4)).view(3, 4, 2)

    def taps(o: int, size: int, of: int) -> list[tuple[int, float]]:
        at = max((o + 0.5) * of / size - 0.5, 0.0)
        low = int(at)
        return [(low, 1 - (at - low)), (min(low + 1, of - 1), at - low)]

    for row in range(3):
        for column in range(4):
            want = sum(a * b * x[0, i * 7 + j] for i, a in taps(row, 3, 5) for j, b in taps(column, 4, 7))
            torch.testing.assert_close(out[row, column], want)
    out.sum().backward()
    assert x.grad is not None
    assert float(x.grad.sum()) == pytest.approx(24, rel=1e-5)


def test_pool_frames_newlines() -> None:
    frames, newline = normal(seeded(10), 2, 25, 3), torch.full((3,), 7.0)
    plain = pool_frames(frames, LLaVAOneVision(newline="none"))
    assert plain.shape == (18, 3)
    rows = pool_frames(frames, LLaVAOneVision(), newline).view(2, 3, 4, 3)
    assert torch.equal(rows[:, :, :3].reshape(18, 3), plain)
    assert bool((rows[:, :, 3] == 7).all())
    each = pool_frames(frames, LLaVAOneVision(newline="frame"), newline).view(2, 10, 3)
    assert torch.equal(each[:, :9].reshape(18, 3), plain)
    assert bool((each[:, 9] == 7).all())
    assert torch.equal(pool_frames(frames, LLaVAOneVision(newline="one_token"), newline), torch.cat([plain, newline[None]]))


def test_leopard_budget_and_space_to_depth() -> None:
    assert Leopard(views=3).tiles([(728, 728)] * 3) == [0, 0, 0]  # base views alone
    assert Leopard().tiles([(10, 4000), (364, 364), (728, 364)]) == [0, 0, 2]
    shared = Leopard(views=12).tiles([(1820, 1820), (1092, 728)])
    assert shared == [int(25 * 10 / 31), int(6 * 10 / 31)]
    assert Leopard().canvas((500, 500), 0) == (0, 0)
    x = normal(seeded(11), 2, 24, 3).requires_grad_()
    out = space_to_depth(x, (4, 6))
    for row in range(2):
        for column in range(3):
            square = [x[:, (2 * row + i) * 6 + 2 * column + j] for i in range(2) for j in range(2)]
            assert torch.equal(out[:, row * 3 + column], torch.cat(square, 1))
    out.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


X = torch.zeros(1, 6, 4)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: DPCKNN(ratio=0), r"DPCKNN: ratio must be in \(0, 1\], got 0"),
        (lambda: DPCKNN(neighbors=0), "DPCKNN: neighbors must be 1 or more, got 0"),
        (lambda: ChatUniVi(levels=(4,)), "ChatUniVi: neighbors must have one count for each of 1 levels"),
        (lambda: ChatUniVi(events=2), r"ChatUniVi: events must be in \(0, 1\], got 2"),
        (lambda: LLaVolta(strides=(8,)), "LLaVolta: strides must be 4 numbers, 1 or more"),
        (lambda: LLaVolta(pivots=(3, 2, 1)), "LLaVolta: pivots must be 3 rising steps"),
        (lambda: LLaVAOneVision(kind="cubic"), "kind must be one of bilinear, average, max, got 'cubic'"),
        (lambda: LLaVAOneVision(newline="row"), "newline must be one of grid, frame, one_token, none, got 'row'"),
        (lambda: Leopard(tile=0), "Leopard: tile must be 1 or more, got 0"),
        (lambda: pool_sequence(X, torch.arange(6)[None], [[4]], 3, 2), "pool_sequence: images must end inside the 6 tokens"),
        (lambda: pool_sequence(X, torch.arange(6)[None], [[2, 1]], 2, 2), "pool_sequence: images must be in order"),
        (lambda: pool_sequence(X, torch.arange(6)[None], [], 2, 2), "pool_sequence: images must have a list for each of 1 samples"),
        (lambda: pool_grid(X, (2, 2), (1, 1)), r"pool_grid: grid must have the 6 tokens of x, got \(2, 2\)"),
        (lambda: pool_frames(X, LLaVAOneVision()), "pool_frames: frames must be square, got tokens"),
        (lambda: space_to_depth(X, (2, 3)), r"space_to_depth: grid must be multiples of block=2, got \(2, 3\)"),
    ],
)
def test_pooling_methods_refuse(make: Callable[[], object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()

"""select_diverse gives the picks of the published loop: exactly where distances are exact, else every pick is the best up to rounding."""

from __future__ import annotations

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from reference.similarity import assert_diverse, random_mask, rows
from reference.similarity import select_diverse as reference
from same_bits import on_any_threads

# (N, C): one token, panel (16), tile (6, 8, 48) and block (144) edges; 128 channels; real sizes.
SHAPES = [(1, 3), (2, 1), (15, 5), (17, 130), (48, 16), (143, 33), (145, 64), (289, 20), (576, 256)]
EXACT = [(1, 4), (17, 16), (145, 64), (300, 256)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_diverse_every_pick_is_the_farthest(shape: tuple[int, int], dtype: torch.dtype, metric: str, device: str) -> None:
    N, C = shape
    x = rows(seeded(N), "normal", 2, N, C, dtype, device)
    floor = 2e-6 if metric == "cosine" else 2e-6 * 4 * C
    for k in sorted({1, min(2, N), N // 3 + 1, N}):
        picks = ts.select_diverse(x, k, metric=metric, order="pick")
        assert_diverse(picks, x, metric, floor, f"{shape} {dtype} {metric} k={k}")
        assert_equal(ts.select_diverse(x, k, metric=metric), picks.sort(1).values)
    mask = random_mask(N, 2, N, 0.6).to(device)
    picks = ts.select_diverse(x, N, metric=metric, order="pick", candidates=mask)
    assert_diverse(picks, x, metric, floor, f"{shape} {dtype} {metric} masked", mask)


@pytest.mark.parametrize("order", ["position", "pick"])
@pytest.mark.parametrize("kind", ["signs", "one-hot", "special"])
def test_select_diverse_exact_distances_exact_picks(kind: str, order: str, device: str) -> None:
    for N, C in EXACT:
        x = rows(seeded(N), kind, 2, N, C, device=device)
        mask, first = random_mask(C, 2, N, 0.7).to(device), torch.tensor([N // 2, -1], device=device)
        for k in sorted({0, 1, N // 5, min(N, 145)}):
            for options in ({}, {"candidates": mask}, {"first": first}, {"candidates": mask, "first": first}):
                got = ts.select_diverse(x, k, order=order, **options)
                assert_equal(got, reference(x, k, order=order, **options), f"{kind} {(N, C)} k={k} {list(options)}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_select_diverse_euclidean_integers_are_exact(dtype: torch.dtype, device: str) -> None:
    for N, C in ((40, 1), (145, 3), (200, 40)):
        x = torch.randint(-3, 4, (2, N, C), generator=seeded(N)).to(dtype).to(device)
        for k in (1, N // 5, N):
            got = ts.select_diverse(x, k, metric="euclidean", order="pick")
            assert_equal(got, reference(x, k, metric="euclidean", order="pick"), f"{(N, C)} k={k} {dtype}")


def test_select_diverse_normal_data_gives_the_picks_of_the_loop(device: str) -> None:
    for seed in range(4):
        x = normal(seeded(seed), 1, 200, 48, device=device)
        assert_equal(ts.select_diverse(x, 60, order="pick"), reference(x, 60, order="pick"), f"seed {seed}")


def test_select_diverse_duplicates_come_last_lowest_index_first(device: str) -> None:
    points = normal(seeded(3), 1, 5, 37, device=device)
    x = points[:, torch.tensor([0, 1, 0, 2, 1, 3, 4, 0, 2])]
    distinct, again = [0, 1, 3, 5, 6], [2, 4, 7, 8]
    for metric in ("cosine", "euclidean"):
        for order in ("position", "pick"):
            got = ts.select_diverse(x, 5, metric=metric, order=order, first=torch.tensor([0], device=device))
            assert sorted(got[0].tolist()) == distinct
        got = ts.select_diverse(x, 9, metric=metric, order="pick", first=torch.tensor([0], device=device))
        assert got[0, 5:].tolist() == again
    same = points[:, :1].expand(1, 40, 37)
    assert ts.select_diverse(same, 40, order="pick").tolist() == [list(range(40))]


def test_select_diverse_zero_and_nan_rows(device: str) -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, 0.0], [0.0, 1.0]]], device=device)
    for k in range(6):
        assert_equal(ts.select_diverse(x, k, order="pick"), reference(x, k, order="pick"), f"k={k}")
    zeros = torch.zeros(2, 7, 3, device=device)
    assert ts.select_diverse(zeros, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert ts.select_diverse(zeros * torch.nan, 4, order="pick").tolist() == [[0, 1, 2, 3]] * 2
    large = torch.tensor([[[1e18, 0.0], [1e18, 1e18], [1e-18, 0.0], [0.0, 1e-18]]], device=device)
    assert ts.select_diverse(large, 3, first=torch.tensor([2], device=device), order="pick").tolist() == [[2, 3, 1]]


def test_select_diverse_fewer_candidates_than_k(device: str) -> None:
    x = normal(seeded(5), 3, 6, 8, device=device)
    mask = torch.tensor([[1, 0, 1, 0, 0, 1], [0] * 6, [0, 0, 0, 1, 0, 0]], dtype=torch.bool, device=device)
    assert ts.select_diverse(x, 5, candidates=mask).tolist() == [[0, 2, 5, -1, -1], [-1] * 5, [3, -1, -1, -1, -1]]
    first = torch.tensor([1, 2, 3], device=device)  # 1 and 2 are no candidates of their rows: as if not given
    assert_equal(
        ts.select_diverse(x, 3, candidates=mask, first=first, order="pick"), reference(x, 3, candidates=mask, first=first, order="pick")
    )


def test_select_diverse_first_pick_given(device: str) -> None:
    x = normal(seeded(6), 2, 100, 20, device=device)
    for start in (0, 37, 99):
        first = torch.tensor([start, 99 - start], device=device)
        for k in (1, 4, 50, 100):  # 4 of 100: the matrix is not needed, rows are recomputed
            got = ts.select_diverse(x, k, first=first, order="pick")
            assert_equal(got[:, 0], first)
            assert_equal(got, reference(x, k, first=first, order="pick"), f"first {start} k={k}")
    natural = ts.select_diverse(x, 100, order="pick")
    for k in (1, 4, 50):
        assert_equal(ts.select_diverse(x, k, first=natural[:, 0], order="pick"), natural[:, :k])
        assert_equal(ts.select_diverse(x, k, first=torch.tensor([-1, int(natural[1, 0])], device=device), order="pick"), natural[:, :k])


@pytest.mark.parametrize(("B", "N", "C", "k"), [(0, 5, 3, 2), (0, 0, 3, 0), (2, 0, 3, 0), (2, 5, 3, 0), (2, 5, 0, 5), (1, 1, 1, 1)])
def test_select_diverse_empty(B: int, N: int, C: int, k: int, device: str) -> None:
    for order in ("position", "pick"):
        got = ts.select_diverse(torch.zeros(B, N, C, device=device), k, order=order)
        assert (got.shape, got.dtype) == ((B, k), torch.int64)
        assert_equal(got.cpu(), torch.arange(k).expand(B, k))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_select_diverse_strided_and_unaligned_views(dtype: torch.dtype, device: str) -> None:
    wide = normal(seeded(7), 4, 90, 70, dtype=dtype, device=device)
    mask = random_mask(8, 4, 200, 0.8).to(device)
    for x in (wide[:, 3:40, 1:], wide[::2, ::3, 5:69], wide[1:2].expand(3, -1, -1), wide.transpose(0, 1)[:50, :, :33]):
        B, N = x.shape[:2]
        options = {"candidates": mask[:1, 5 : 5 + N].expand(B, -1), "first": torch.tensor([[0, 3]], device=device).expand(B, 2)[:, 1]}
        for k in (1, N // 2):
            got = ts.select_diverse(x, k, order="pick", **options)
            plain = {name: value.contiguous() for name, value in options.items()}
            assert_equal(got, ts.select_diverse(x.contiguous(), k, order="pick", **plain), f"{x.shape} {x.stride()} k={k}")


def test_select_diverse_batch_equals_its_rows(device: str) -> None:
    x = normal(seeded(9), 5, 150, 40, device=device)
    mask = random_mask(9, 5, 150, 0.5).to(device)
    together = ts.select_diverse(x, 30, candidates=mask, order="pick")
    for b in range(5):
        assert_equal(ts.select_diverse(x[b : b + 1], 30, candidates=mask[b : b + 1], order="pick"), together[b : b + 1])


def test_select_diverse_is_deterministic_on_any_number_of_threads() -> None:
    x, first = normal(seeded(10), 3, 500, 70), torch.tensor([3, 4, 5])
    on_any_threads(lambda: (ts.select_diverse(x, 100), ts.select_diverse(x, 20, first=first, order="pick")))


def test_select_diverse_first_pick_out_of_range_is_refused() -> None:
    x = torch.zeros(2, 5, 3)
    for wrong in (-2, 5):
        with pytest.raises(ValueError, match=rf"select_diverse: first must be in \[-1, N=5\), got {wrong} in row 1"):
            ts.select_diverse(x, 2, first=torch.tensor([0, wrong]))


def test_select_diverse_does_not_write_its_inputs(device: str) -> None:
    x, mask = rows(seeded(11), "special", 2, 60, 16, device=device), torch.ones(2, 60, dtype=torch.bool, device=device)
    before = x.clone(), mask.clone()
    ts.select_diverse(x, 30, candidates=mask)
    assert_equal(x, before[0])
    assert_equal(mask, before[1])

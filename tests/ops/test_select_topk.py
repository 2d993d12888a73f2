"""select_topk gives exactly the reference's indices: order, ties, NaN, zeros, padding, masks, strides."""

from __future__ import annotations

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, SCORE_KINDS, integer, normal, scores, seeded
from reference.ops import select_topk as reference
from same_bits import on_any_threads

# Tile, vector and histogram boundaries of the kernels, +-1, and the real sizes 577 (CLIP-L) and 2880 (LLaVA-NeXT).
SIZES = (1, 2, 7, 8, 9, 31, 33, 64, 65, 255, 257, 577, 1024, 2880)


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_select_topk_matches_reference(kind: str, dtype: torch.dtype, order: str, device: str) -> None:
    for N in SIZES:
        x = scores(seeded(N), kind, 3, N, dtype, device)
        for k in sorted({0, 1, N // 4, N // 2, N - 1, N}):
            assert_equal(ts.select_topk(x, k, order=order), reference(x, k, order=order), f"{kind} N={N} k={k} {dtype}")


@pytest.mark.parametrize("N", [12_500, 50_000])
def test_select_topk_video_sizes(N: int, device: str) -> None:
    for kind in ("normal", "duplicates", "equal"):
        x = scores(seeded(N), kind, 1, N, torch.float32, device)
        for k in (1, N // 10, N // 4, N - 1):
            assert_equal(ts.select_topk(x, k), reference(x, k), f"{kind} N={N} k={k}")


def test_select_topk_ties_lowest_index_first(device: str) -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]], device=device)
    assert ts.select_topk(x, 2).tolist() == [[1, 2]]
    assert ts.select_topk(x, 5, order="score").tolist() == [[1, 2, 4, 3, 5]]


def test_select_topk_nan_ranks_below_minus_infinity(device: str) -> None:
    x = torch.tensor([[torch.nan, -torch.inf, -torch.nan, torch.inf]], device=device)
    assert ts.select_topk(x, 4, order="score").tolist() == [[3, 1, 0, 2]]
    assert ts.select_topk(x, 2).tolist() == [[1, 3]]


def test_select_topk_zeros_of_both_signs_are_equal(device: str) -> None:
    x = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]], device=device)
    assert ts.select_topk(x, 4, order="score").tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("order", ["position", "score"])
def test_select_topk_per_row_k_pads_with_minus_one(order: str, device: str) -> None:
    generator = seeded(3)
    for N in (1, 5, 64, 577):
        x = scores(generator, "duplicates", 6, N, device=device)
        k = torch.tensor([0, 1, N, N // 2, N // 3, N - 1], device=device)
        got = ts.select_topk(x, k, max_k=N, order=order)
        assert_equal(got, reference(x, k, max_k=N, order=order), f"N={N}")
        assert bool((got[0] == -1).all())


def test_select_topk_per_row_k_may_be_strided(device: str) -> None:
    x = scores(seeded(4), "normal", 4, 33, device=device)
    k = torch.tensor([[3, 0], [1, 0], [7, 0], [2, 0]], device=device)[:, 0]
    assert_equal(ts.select_topk(x, k, max_k=7), reference(x, k, max_k=7))
    same = torch.tensor([5], device=device).expand(4)
    assert_equal(ts.select_topk(x, same, max_k=9), reference(x, same, max_k=9))


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("masks", ["candidates", "always_keep", "both"])
def test_select_topk_masks(masks: str, order: str, device: str) -> None:
    generator = seeded(5)
    for N in (1, 8, 65, 577):
        for share in (0.0, 0.02, 0.5, 1.0):
            x = scores(generator, "special", 4, N, device=device)
            options: dict[str, torch.Tensor] = {}
            if masks != "always_keep":
                options["candidates"] = (torch.rand(4, N, generator=generator) < share).to(device)
            if masks != "candidates":
                options["always_keep"] = (torch.rand(4, N, generator=generator) < share / 4).to(device)
            for k in sorted({0, 1, N // 3, N}):
                want = reference(x, k, order=order, **options)
                assert_equal(ts.select_topk(x, k, order=order, **options), want, f"N={N} k={k} share={share}")
            rows = torch.tensor([0, N, N // 2, min(N, 1)], device=device)
            want = reference(x, rows, max_k=N, order=order, **options)
            assert_equal(ts.select_topk(x, rows, max_k=N, order=order, **options), want, f"N={N} per row, share={share}")


def test_select_topk_fewer_candidates_than_k(device: str) -> None:
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=device)
    candidates = torch.tensor([[False, True, False, True]], device=device)
    assert ts.select_topk(x, 3, candidates=candidates).tolist() == [[1, 3, -1]]
    assert ts.select_topk(x, 3, candidates=candidates & False).tolist() == [[-1, -1, -1]]


def test_select_topk_always_keep_counts_towards_k(device: str) -> None:
    x = torch.tensor([[4.0, 3.0, 2.0, torch.nan]], device=device)
    keep = torch.tensor([[False, False, False, True]], device=device)
    assert ts.select_topk(x, 2, always_keep=keep).tolist() == [[0, 3]]
    assert ts.select_topk(x, 2, always_keep=keep, order="score").tolist() == [[3, 0]]
    assert ts.select_topk(x, 1, always_keep=keep, candidates=~keep).tolist() == [[3]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_select_topk_strided_and_unaligned_rows(dtype: torch.dtype, device: str) -> None:
    wide = scores(seeded(6), "duplicates", 8, 200, dtype, device)
    mask = torch.rand(8, 200, generator=seeded(7)).to(device) < 0.7
    for view in (wide[:, 1:], wide[:, 3:90], wide[::2, 5:], wide[1:2, 7:].expand(4, -1), wide[2:, :1]):
        for k in sorted({1, view.shape[1] // 2, view.shape[1]}):
            assert_equal(ts.select_topk(view, k), reference(view, k), f"{view.shape} {view.stride()} k={k}")
    rows = wide[:, 3:90]
    options = {"candidates": mask[:, 3:90], "always_keep": mask[:1, 13:100].expand(8, -1)}
    assert_equal(ts.select_topk(rows, 40, **options), reference(rows, 40, **options))


@pytest.mark.parametrize(("B", "N", "k"), [(0, 5, 2), (0, 0, 0), (3, 0, 0), (3, 5, 0), (1, 1, 1), (1, 1, 0)])
def test_select_topk_empty(B: int, N: int, k: int, device: str) -> None:
    x = torch.zeros(B, N, device=device)
    for order in ("position", "score"):
        got = ts.select_topk(x, k, order=order)
        assert got.shape == (B, k)
        assert got.dtype == torch.int64
        assert got.device.type == device
    per_row = torch.full((B,), k, device=device)
    assert_equal(ts.select_topk(x, per_row, max_k=k), reference(x, per_row, max_k=k))


def test_select_topk_many_rows(device: str) -> None:
    x = scores(seeded(8), "duplicates", 700, 33, device=device)
    assert_equal(ts.select_topk(x, 9), reference(x, 9))


def test_select_topk_does_not_write_its_inputs(device: str) -> None:
    x = scores(seeded(9), "special", 4, 300, device=device)
    k, mask = torch.tensor([1, 2, 3, 300], device=device), torch.ones(4, 300, dtype=torch.bool, device=device)
    before = x.clone(), k.clone(), mask.clone()
    ts.select_topk(x, k, max_k=300, candidates=mask, always_keep=mask)
    for now, old in zip((x, k, mask), before, strict=True):
        assert_equal(now, old)


def test_select_topk_is_deterministic(device: str) -> None:
    generator = seeded(10)
    x = scores(generator, "duplicates", 5, 2880, device=device)
    first = ts.select_topk(x, 720)
    for _ in range(20):  # scratch memory holds other bytes every time
        normal(generator, integer(generator, 1, 50_000), device=device).mul_(torch.nan)
        assert_equal(ts.select_topk(x, 720), first)


def test_select_topk_thread_count_does_not_matter() -> None:
    x = scores(seeded(11), "duplicates", 37, 5000)
    on_any_threads(lambda: (ts.select_topk(x, 1250), ts.select_topk(x[:1], 1250, order="score")))

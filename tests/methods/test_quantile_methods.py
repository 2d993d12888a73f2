"""LRS and PAINT, which cut at quantiles of their scores, against slow references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import encoder as reference
from tokensieve.methods import LRS, PAINT, lrs, paint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("columns", [None, 6])
@pytest.mark.parametrize("method", [LRS(), LRS(0.5, 0.6), LRS(0.0, 0.0), LRS(1.0, 0.95)])
def test_lrs_against_the_reference(device: str, columns: int | None, method: LRS) -> None:
    torch.manual_seed(3)
    scores, valid = torch.rand(3, 48, device=device) ** 3, torch.ones(3, 48, dtype=torch.bool, device=device)
    valid[1, 40:] = valid[2, :17] = False
    for mask in (None, valid):
        ratio, ratio_counts = lrs.keep_ratio(scores, method, columns, mask)
        above, above_counts = lrs.keep_threshold(scores, method, mask)
        for b in range(3):
            real = [True] * 48 if mask is None else mask[b].tolist()
            want = reference.lrs(scores[b].cpu(), real, columns, method.ratio, method.threshold)
            assert ratio[b].tolist() == want[0] + [-1] * (ratio.shape[1] - len(want[0]))
            assert above[b].tolist() == want[1] + [-1] * (48 - len(want[1]))
            assert [int(ratio_counts[b]), int(above_counts[b])] == [len(rows) for rows in want]
    with pytest.raises(ValueError, match="columns must divide N=48 tokens, got 7"):
        lrs.keep_ratio(scores, method, 7)


def test_lrs_scores_are_a_softmax_over_the_level(device: str) -> None:
    torch.manual_seed(4)
    query, key = torch.randn(2, 4, 1, 8, device=device), torch.randn(2, 2, 20, 8, device=device)
    got = lrs.text_scores(query, key, (5, 17)).cpu().double()
    keys = key.repeat_interleave(2, 1)[:, :, 5:17].cpu().double()
    want = torch.softmax(query.cpu().double() @ keys.transpose(2, 3) * 8**-0.5, -1).mean(1)[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("grid", "tiles"), [((5, 9), (2, 4)), ((6, 7), (3, 3)), ((4, 4), (8, 8)), ((1, 3), (1, 1))])
def test_lrs_tiles_are_those_that_tokens_lie_in(device: str, grid: tuple[int, int], tiles: tuple[int, int]) -> None:
    torch.manual_seed(5)
    N = grid[0] * grid[1]
    chosen = [sorted(torch.randperm(N)[: N // 3].tolist()) for _ in range(3)]
    index = torch.tensor([[*row, -1] for row in chosen], device=device)
    got, counts = lrs.hit_tiles(index, grid, tiles)
    for b, row in enumerate(chosen):
        want = sorted({int(n // grid[1] * tiles[0] / grid[0]) * tiles[1] + int(n % grid[1] * tiles[1] / grid[1]) for n in row})
        assert got[b].tolist() == want + [-1] * (tiles[0] * tiles[1] - len(want))
        assert int(counts[b]) == len(want)


@pytest.mark.parametrize("n", [16, 50, 196])
def test_paint_streams_against_the_reference(device: str, n: int) -> None:
    torch.manual_seed(6)
    first, late = torch.rand(3, n, device=device), torch.randn(3, n, device=device).exp() ** 2
    found = paint.streams(first, late, PAINT())
    for b in range(3):
        local, summary = reference.paint_streams(first[b].cpu(), late[b].cpu(), 0.25)
        assert found.local[b].nonzero()[:, 0].tolist() == local
        assert found.summary[b].nonzero()[:, 0].tolist() == summary
        assert summary  # the case means something


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_paint_attention_against_the_formula(device: str, dtype: torch.dtype, kv_heads: int) -> None:
    torch.manual_seed(7)
    query, key = torch.randn(2, 4, 1, 8).to(device, dtype), torch.randn(2, kv_heads, 15, 8).to(device, dtype)
    value, gains = torch.randn(2, kv_heads, 15, 6).to(device, dtype), torch.rand(2, 15, device=device)
    visible = torch.ones(2, 15, dtype=torch.bool, device=device)
    visible[1, :4] = False
    got = paint.boosted_attention(query, key, value, gains, visible)
    assert got.dtype == dtype
    for b in range(2):
        for h in range(4):
            group = h // (4 // kv_heads)
            z = [float((query[b, h, 0].double() * key[b, group, n].double()).sum()) / 8**0.5 for n in range(15)]
            e = [math.exp(v + float(gains[b, n]) * abs(v)) if visible[b, n] else 0.0 for n, v in enumerate(z)]
            want = sum(w / sum(e) * value[b, group, n].double() for n, w in enumerate(e))
            tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got[b, h, 0].double(), want, rtol=tolerance, atol=tolerance)
    plain = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), enable_gqa=True)
    zero = paint.boosted_attention(query.float(), key.float(), value.float(), torch.zeros_like(gains))
    torch.testing.assert_close(zero, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (lambda: LRS(ratio=2), ValueError, r"LRS: ratio must be in \[0, 1\], got 2"),
        (lambda: LRS(threshold=1), ValueError, r"LRS: threshold must be in \[0, 1\), got 1"),
        (lambda: LRS(ratio="a"), TypeError, "LRS: ratio must be a number, got 'a'"),
        (lambda: PAINT(local_ratio=-0.1), ValueError, r"PAINT: local_ratio must be in \[0, 1\], got -0.1"),
        (lambda: PAINT(first_layer=-1), ValueError, "PAINT: first_layer must be 0 or more, got -1"),
        (lambda: PAINT(first_layer=0.5), TypeError, "PAINT: first_layer must be an int, got 0.5"),
    ],
)
def test_bad_fields_are_errors(make: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^tokensieve.{rule}$"):
        make()

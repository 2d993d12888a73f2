"""FoPru and GlobalCom2 against slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import encoder as reference
from tokensieve.methods import FoPru, GlobalCom2, fopru, globalcom2
from tokensieve.ops import gather_tokens
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(6, 5), (1, 7), (4, 1)])
def test_fopru_against_the_reference(device: str, dtype: torch.dtype, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns = grid
    N = rows * columns
    query, key = (2 * torch.randn(2, 3, N + 1, 20, device=device).to(dtype) for _ in range(2))
    features = torch.randn(2, N, 6, device=device).to(dtype)
    found = fopru.significance(query, key)
    for strategy in ("rank", "row"):
        method = FoPru(ratio=0.5, strategy=strategy)
        out, index, scores = fopru.keep_patches(query, key, features, method, rows)
        for b in range(2):
            attention = reference.patch_attention(query[b].cpu(), key[b].cpu())
            received, given = attention.mean(0), attention.mean(1)
            torch.testing.assert_close(found.received[b].cpu().double(), received, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found.given[b].cpu().double(), given, rtol=1e-4, atol=1e-7)
            want = received if received.var() >= given.var() else given
            torch.testing.assert_close(scores[b].cpu().double(), want, rtol=1e-4, atol=1e-7)
            if strategy == "rank":
                assert index[b].tolist() == sorted(reference.best(want, N // 2))
            else:
                best = sorted(reference.best(want.view(rows, columns).sum(1), rows // 2))
                assert index[b].tolist() == [row * columns + x for row in best for x in range(columns)]
            assert torch.equal(out[b], features[b, index[b]])


def test_fopru_given_attention_wins_when_it_varies_more() -> None:
    """Patches 0 and 1 give everything to CLS, so `given` varies; the received attention is flat."""
    key = torch.zeros(1, 1, 7, 2)
    key[0, 0, 0, 0] = 20.0
    query = torch.zeros(1, 1, 7, 2)
    query[0, 0, 1:3, 0] = 10.0
    found = fopru.significance(query, key)
    assert float(found.given.var()) > float(found.received.var())
    assert torch.equal(found.chosen, found.given)
    assert found.given[0].argsort(stable=True)[:2].tolist() == [0, 1]


def test_fopru_without_cls_and_errors() -> None:
    torch.manual_seed(1)
    query, key, features = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 12, 4)
    scores = fopru.keep_patches(query, key, features, FoPru())[2]
    want = torch.softmax(query.double() @ key.double().transpose(2, 3) * 8**-0.5, -1).mean((1, 2))
    torch.testing.assert_close(scores.double(), want, rtol=1e-5, atol=1e-7)
    assert torch.allclose(fopru.significance(query, key, cls=False).given, torch.tensor(1 / 12))
    with pytest.raises(ValueError, match="features must have the 12 tokens of key, or all but CLS, got 10"):
        fopru.keep_patches(query, key, features[:, :10], FoPru())
    with pytest.raises(ValueError, match="rows must divide 12 patches, got 5"):
        fopru.keep_patches(query, key, features, FoPru(strategy="row"), 5)
    with pytest.raises(ValueError, match="rows must divide 12 patches, got None"):
        fopru.keep_patches(query, key, features, FoPru(strategy="row"))
    assert fopru.keep_patches(query, key, features, FoPru(ratio=0.0))[1].shape == (1, 0)
    assert fopru.keep_patches(query, key, features, FoPru(ratio=1.0, strategy="row"), 3)[1].tolist() == [list(range(12))]


def wanted(scores: Tensor, method: GlobalCom2, size: Any, grid: Any, side: Any) -> tuple[list[int], list[list[int]], list[int]]:
    """Thumbnail by falling score, kept patches of each crop, the sequence (N * (1 + G) = newline)."""
    G, N = grid[0] * grid[1], side[0] * side[1]
    shares, combined = reference.globalcom2(scores, method.ratio, method.temperature, size, grid, side)
    crops = []
    for share, values in zip(shares, combined):
        real = [n for n in range(N) if values[n] == values[n]]
        crops.append(sorted(sorted(real, key=lambda n: (-float(values[n]), n))[: int(len(real) * share)]))
    thumbnail = reference.best(scores[0], int(N * method.ratio))
    sequence = list(thumbnail)
    for row in reference.stitched(grid, side):
        sequence += [(1 + crop) * N + patch for crop, patch in row if patch in crops[crop]] + [(1 + G) * N]
    return thumbnail, crops, sequence


@pytest.mark.parametrize("size", [(90, 90), (300, 100), (60, 210)])
@pytest.mark.parametrize(("grid", "side"), [((2, 2), (5, 6)), ((3, 1), (4, 4)), ((1, 2), (6, 4)), ((1, 1), (4, 4))])
@pytest.mark.parametrize("method", [GlobalCom2(), GlobalCom2(0.8, 1.0), GlobalCom2(0.1, 40.0), GlobalCom2(1.0), GlobalCom2(0.0)])
def test_globalcom2_against_the_reference(device: str, size: Any, grid: Any, side: Any, method: GlobalCom2) -> None:
    torch.manual_seed(2)
    N, G = side[0] * side[1], grid[0] * grid[1]
    query, key = torch.randn(1 + G, 2, 1, 8, device=device), torch.randn(1 + G, 2, N + 1, 8, device=device)
    scores = globalcom2.cls_logits(query, key)
    for p in range(1 + G):
        want = reference.cls_attention(query[p, :, 0].cpu(), key[p].cpu(), softmax=False)
        torch.testing.assert_close(scores[p].cpu().double(), want, rtol=1e-5, atol=1e-6)
    thumbnail, crops, sequence = wanted(scores.cpu(), method, size, grid, side)
    kept = globalcom2.select(scores, method, size, grid, side)
    assert kept.thumbnail[0].tolist() == thumbnail
    assert [[n for n in row if n >= 0] for row in kept.crops.tolist()] == crops
    assert kept.counts.tolist() == [len(row) for row in crops]
    index, count = globalcom2.pack(kept, method, grid, side)
    assert int(count) == len(sequence)
    assert index[0].tolist() == sequence + [-1] * (index.shape[1] - len(sequence))


def test_globalcom2_shares_sum_to_the_ratio_and_clamp() -> None:
    scores = torch.randn(5, 64)
    assert float(globalcom2.crop_budgets(scores, 64, GlobalCom2(0.3), (2, 2), (8, 8))[1].mean()) == pytest.approx(0.3)
    assert float(globalcom2.crop_budgets(100 * scores, 64, GlobalCom2(0.9), (2, 2), (8, 8))[1].max()) == 1.0
    with pytest.raises(ValueError, match=r"scores must have a thumbnail and 4 crops, got \(4, 64\)"):
        globalcom2.crop_scores(scores[:4], (10, 10), (2, 2), (8, 8))
    with pytest.raises(ValueError, match=r"image_size must show a patch of the \(16, 16\) mosaic, got \(1, 40\)"):
        globalcom2.crop_scores(scores, (1, 40), (2, 2), (8, 8))
    with pytest.raises(ValueError, match=r"grid must fit into 8 x 8 patches, got \(9, 1\)"):
        globalcom2.crop_budgets(scores, 64, GlobalCom2(), (9, 1), (8, 8))


def test_globalcom2_reads_nothing_on_the_host() -> None:
    def step(scores: Tensor, tokens: Tensor) -> Tensor:
        kept = globalcom2.select(scores, GlobalCom2(), (90, 70), (2, 2), (4, 4))
        return gather_tokens(tokens, globalcom2.pack(kept, GlobalCom2(), (2, 2), (4, 4))[0])

    scores, tokens = torch.randn(5, 16), torch.randn(1, 81, 3)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, tokens), step(scores, tokens))


@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (lambda: FoPru(ratio=1.1), ValueError, r"FoPru: ratio must be in \[0, 1\], got 1.1"),
        (lambda: FoPru(ratio="a"), TypeError, "FoPru: ratio must be a number, got 'a'"),
        (lambda: FoPru(strategy="rows"), ValueError, "FoPru: strategy must be 'rank' or 'row', got 'rows'"),
        (lambda: GlobalCom2(ratio=-1), ValueError, r"GlobalCom2: ratio must be in \[0, 1\], got -1"),
        (lambda: GlobalCom2(temperature=0), ValueError, "GlobalCom2: temperature must be positive, got 0"),
        (lambda: GlobalCom2(temperature=None), TypeError, "GlobalCom2: temperature must be a number, got None"),
    ],
)
def test_bad_fields_are_errors(make: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^tokensieve.{rule}$"):
        make()

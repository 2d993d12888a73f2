"""SliME, MIRAGE and ADEM-VL against slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import encoder as reference
from tokensieve.methods import ADEMVL, MIRAGE, SliME, ademvl, mirage, slime

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("top_k", [1, 3, 9, 20])
@pytest.mark.parametrize("high", [1.0, 0.49])
def test_mirage_against_the_rule(device: str, top_k: int, high: float) -> None:
    torch.manual_seed(0)
    scores, real = (high * torch.rand(6, 9)).to(device), (torch.rand(6, 9) > 0.3).to(device)
    real[3] = False
    images = torch.randn(6, 9, 2, 3, device=device)
    for candidates in (None, real):
        index, mask = mirage.relevant_images(scores, MIRAGE(top_k=top_k), candidates)
        blocks, same = mirage.keep_images(images, scores, MIRAGE(top_k=top_k), candidates)
        assert torch.equal(index, same)
        for b in range(6):
            there = [n for n in range(9) if candidates is None or bool(real[b, n])]
            ranked = sorted(there, key=lambda n: (-float(scores[b, n]), n))
            wanted = sorted(ranked[:top_k] if any(float(scores[b, n]) >= 0.5 for n in there) else ranked[:1])
            assert [n for n in index[b].tolist() if n >= 0] == wanted
            assert mask[b].nonzero()[:, 0].tolist() == wanted
            assert torch.equal(blocks[b, : len(wanted)], images[b, wanted])
            assert bool((blocks[b, len(wanted) :] == 0).all())


def test_mirage_edges() -> None:
    exactly = torch.tensor([[0.5, 0.1, 0.2]])
    assert mirage.relevant_images(exactly, MIRAGE(top_k=2))[0].tolist() == [[0, 2]]  # 0.5 passes
    assert mirage.relevant_images(torch.zeros(2, 0), MIRAGE())[0].shape == (2, 0)
    tied = torch.full((1, 4), 0.7)
    assert mirage.relevant_images(tied, MIRAGE(top_k=2))[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop", [0.0, 0.05, 0.3, 0.9])
def test_ademvl_against_the_reference(device: str, dtype: torch.dtype, drop: float) -> None:
    torch.manual_seed(1)
    hidden, visual = torch.randn(2, 5, 12).to(device, dtype), torch.randn(2, 17, 12).to(device, dtype)
    e1, e2 = torch.randn(1, 17, 12).to(device, dtype), torch.randn(1, 17, 12).to(device, dtype)
    scores, out = ademvl.fusion_scores(hidden, visual, e1), ademvl.fuse(hidden, visual, e1, e2, ADEMVL(drop=drop))
    assert out.dtype == dtype
    for b in range(2):
        cpu = [x.double().cpu() for x in (hidden[b], visual[b], e1[0], e2[0])]
        want, total = reference.ademvl(*cpu, drop)
        torch.testing.assert_close(scores[b].double().cpu(), want, rtol=1e-5, atol=1e-5)
        near = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * float(total.abs().max())
        torch.testing.assert_close(out[b].double().cpu(), total, rtol=1e-4, atol=near)


def test_ademvl_ties_stay_and_edges(device: str) -> None:
    scores = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]]], device=device)
    assert ademvl.drop_lowest(scores, 2).tolist() == [[[2.0, 1.0, 1.0, 1.0, 5.0], [5.0, 4.0, 3.0, 0.0, 0.0]]]
    assert torch.equal(ademvl.drop_lowest(scores, 0), scores)
    assert ademvl.drop_lowest(scores, 4).count_nonzero(-1).tolist() == [[1, 1]]
    assert ademvl.drop_lowest(scores[:, :0], 2).shape == (1, 0, 5)
    with pytest.raises(ValueError, match=r"count must be in \[0, N=5\), got 5"):
        ademvl.drop_lowest(scores, 5)
    assert [ADEMVL(drop=0.05).dropped(17), ADEMVL().dropped(320)] == [0, 32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", [SliME(), SliME(0.5, 0.2), SliME(0.1, 0.05), SliME(1.0), SliME(0.8, 5.0)])
def test_slime_against_the_reference(device: str, dtype: torch.dtype, masked: bool, method: SliME) -> None:
    torch.manual_seed(2)
    tokens, text = torch.randn(2, 30, 16).to(device, dtype), torch.randn(2, 7, 16).to(device, dtype)
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7], device=device) if masked else None
    out, index, counts = slime.keep_relevant(tokens, text, method, mask)
    assert index.shape == (2, 30)
    for b in range(2):
        real = None if mask is None else mask[b].tolist()
        want = reference.slime(tokens[b].cpu(), text[b].cpu(), real, method.top_p, method.temperature)
        n = int(counts[b])
        assert index[b].tolist() == want + [-1] * (30 - n)
        assert torch.equal(out[b, :n], tokens[b, want])
        assert not bool(out[b, n:].any())


def test_slime_edges(device: str) -> None:
    flat = torch.zeros(1, 8, device=device)
    assert slime.select(flat, SliME(top_p=0.5))[0].tolist() == [[0, 1, 2, 3, 4, -1, -1, -1]]  # 4/8 holds 0.5, and one more
    assert slime.select(flat, SliME(top_p=1.0))[1].tolist() == [8]
    peak = flat.clone()
    peak[0, 5] = 100.0
    assert slime.select(peak, SliME(top_p=0.5))[0][0, :2].tolist() == [5, -1]


@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (lambda: MIRAGE(top_k=0), ValueError, "MIRAGE: top_k must be 1 or more, got 0"),
        (lambda: MIRAGE(top_k=1.5), TypeError, "MIRAGE: top_k must be an int, got 1.5"),
        (lambda: MIRAGE(threshold="a"), TypeError, "MIRAGE: threshold must be a number, got 'a'"),
        (lambda: ADEMVL(drop=1.0), ValueError, r"ADEMVL: drop must be in \[0, 1\), got 1.0"),
        (lambda: SliME(top_p=0), ValueError, r"SliME: top_p must be in \(0, 1\], got 0"),
        (lambda: SliME(temperature=0.0), ValueError, "SliME: temperature must be positive, got 0.0"),
        (lambda: SliME(top_p=None), TypeError, "SliME: top_p must be a number, got None"),
        (lambda: ADEMVL(weight="a"), TypeError, "ADEMVL: weight must be a number, got 'a'"),
    ],
)
def test_bad_fields_are_errors(make: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^tokensieve.{rule}$"):
        make()

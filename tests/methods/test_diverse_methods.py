"""DivPrune and VisPruner against slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import encoder as reference
from tokensieve.methods import DivPrune, VisPruner, divprune, vispruner

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5, 24])
def test_divprune_against_the_reference(device: str, dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 24, 10).to(device, dtype)
    out, index = divprune.keep_diverse(tokens, k)
    for b in range(2):
        assert index[b].tolist() == sorted(reference.divprune(tokens[b].cpu(), k))
        assert torch.equal(out[b], tokens[b, index[b]])
        nearest = [1 - max(reference.cosine(tokens[b, n].cpu(), tokens[b, m].cpu()) for m in range(24) if m != n) for n in range(24)]
        torch.testing.assert_close(divprune.nearest_distance(tokens)[b].cpu().double(), torch.tensor(nearest).double(), rtol=0, atol=1e-6)


def test_divprune_duplicates_zero_rows_and_candidates(device: str) -> None:
    torch.manual_seed(1)
    distinct = torch.randn(5, 8, device=device)
    tokens = distinct[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]][None]
    assert {n % 5 for n in divprune.keep_diverse(tokens, 5)[1][0].tolist()} == set(range(5))  # one of each
    tokens[0, 3] = 0
    assert 3 in divprune.keep_diverse(tokens, 5)[1][0].tolist()  # at distance 1 from all, no NaN
    real = torch.ones(1, 10, dtype=torch.bool, device=device)
    real[0, 5:] = False
    out, index = divprune.keep_diverse(tokens, 7, real)
    assert index[0].tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert not bool(out[0, 5:].any())
    with pytest.raises(ValueError, match=r"k must be in \[0, N=10\], got 11"):
        divprune.keep_diverse(tokens, 11)
    assert [DivPrune(ratio=0.5).keep_count(n) for n in (1, 3, 5)] == [0, 2, 2]  # half to even


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method", [VisPruner(20, 0.5), VisPruner(7, 0.3), VisPruner(30, 0.0), VisPruner(9, 1.0), VisPruner(0), VisPruner(41)]
)
def test_vispruner_against_the_reference(device: str, dtype: torch.dtype, method: VisPruner) -> None:
    torch.manual_seed(2)
    query, key = torch.randn(2, 3, 1, 16).to(device, dtype), torch.randn(2, 3, 42, 16).to(device, dtype)
    features = torch.randn(2, 41, 12).to(device, dtype)
    out, index, scores = vispruner.keep_patches(query, key, features, method)
    for b in range(2):
        want = reference.cls_attention(query[b, :, 0].cpu(), key[b].cpu())
        torch.testing.assert_close(scores[b].cpu().double(), want, rtol=1e-5, atol=1e-7)
        assert index[b].tolist() == reference.vispruner(want, features[b].cpu(), method.tokens, method.important)
        assert torch.equal(out[b], features[b, index[b]])


def test_vispruner_rounds_drop_at_most_eight_and_keep_the_last_half() -> None:
    similarity = torch.eye(40)[None].clone()
    similarity[0, ::2, 1] = torch.linspace(0.1, 0.9, 20)  # the first halves of the first round resemble patch 1
    similarity[0, 0, 0] = 1.0
    rest = vispruner.drop_duplicates(similarity, torch.arange(40)[None], 32)
    assert sorted(rest[0].tolist()) == [n for n in range(40) if n not in range(24, 40, 2)]
    assert vispruner.drop_duplicates(similarity, torch.arange(40)[None], 40)[0].tolist() == list(range(40))
    assert vispruner.drop_duplicates(similarity, torch.arange(40)[None], 0).shape == (1, 0)
    with pytest.raises(ValueError, match="tokens must be at most N=4 patches, got 128"):
        vispruner.select(torch.rand(1, 4), torch.rand(1, 4, 2), VisPruner())


def test_vispruner_reads_nothing_on_the_host() -> None:
    scores, features, method = torch.rand(1, 30), torch.randn(1, 30, 6), VisPruner(tokens=8)
    compiled = torch.compile(lambda s, f: vispruner.select(s, f, method), fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, features), vispruner.select(scores, features, method))


@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (lambda: DivPrune(ratio=1.1), ValueError, r"DivPrune: ratio must be in \[0, 1\], got 1.1"),
        (lambda: DivPrune(ratio="a"), TypeError, "DivPrune: ratio must be a number, got 'a'"),
        (lambda: VisPruner(tokens=-1), ValueError, "VisPruner: tokens must be 0 or more, got -1"),
        (lambda: VisPruner(tokens=1.5), TypeError, "VisPruner: tokens must be an int, got 1.5"),
        (lambda: VisPruner(important=2), ValueError, r"VisPruner: important must be in \[0, 1\], got 2"),
    ],
)
def test_bad_fields_are_errors(make: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^tokensieve.{rule}$"):
        make()

"""The steps of the methods between decoder layers against slow references from the papers, on random input; learned parts in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.inputs import randn
from tokensieve import methods
from tokensieve.methods import aim, atp_llava, atp_thresholds, dart, dyvte, feather, lscene, raters, sparsevlm, var_sink, videollm_mod
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


def attention(query: Tensor, key: Tensor, visible: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """(B, H, L, N) causal softmax in float64; the rows are the last L tokens."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    logits = (query.double() @ key.transpose(2, 3)) * query.shape[-1] ** -0.5 / temperature
    L, N = logits.shape[2:]
    hidden = torch.ones(L, N, dtype=torch.bool).triu(N - L + 1)
    if visible is not None:
        hidden = hidden | ~visible[:, None, None, :]
    return logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: methods.DART(layer=0), "DART: layer must be 1 or more"),
        (lambda: methods.DART(ratio=2.0), r"ratio must be in \[0, 1\]"),
        (lambda: methods.DART(image_pivots=0), "image_pivots must be 1 or more"),
        (lambda: methods.FEATHER(layers=()), "layers must be 1 or more"),
        (lambda: methods.FEATHER(stride=-1), "stride must be 0 or more"),
        (lambda: methods.SparseVLM(budget=(3,)), "one count for each of 3 layers"),
        (lambda: methods.SparseVLM(recycle=1.5), r"recycle must be in \[0, 1\]"),
        (lambda: sparsevlm.merge_dropped(torch.zeros(1, 3, 2), 4), r"clusters must be in \[1, N=3\]"),
        (lambda: methods.AIM(temperature=0.0), "temperature must be positive"),
        (lambda: methods.AIM(step=0.0), r"step must be in \(0, 1\]"),
        (lambda: methods.AIM(variant="drop"), "variant must be 'mask' or 'compact'"),
        (lambda: methods.VAR(dims=()), "dims must hold dimensions"),
        (lambda: methods.LSceneLLM(threshold=256.0), r"threshold must be in \[0, 255\]"),
        (lambda: methods.DyVTE(gates=(1,)), "gates must be torch modules"),
        (lambda: methods.ATPLLaVA(layers=(1,)), "heads must hold one for each of 1 layers"),
        (lambda: methods.VideoLLMMoD(layers=(1, 2), routers=(nn.Identity(),)), "routers must hold one for each of 2 layers"),
        (lambda: methods.VideoLLMMoD(layers=(2, 1), routers=(nn.Identity(),) * 2), "layers must increase"),
        (lambda: videollm_mod.route(torch.zeros(1, 5), 2, 1), "frames must divide N=5"),
    ],
)
def test_bad_input(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


@pytest.mark.parametrize("seed", range(3))
def test_dart_follows_its_loop(seed: int) -> None:
    B, N, start, n_image = 2, 60, 5, 40
    hidden, key = randn(seed, B, N, 16), randn(seed + 9, B, 2, N, 8)
    method = methods.DART(tokens=20, image_pivots=2, text_pivots=3)
    position = torch.arange(N).expand(B, N)
    image, text = (position >= start) & (position < start + n_image), position >= start + n_image
    kept, of_image, of_text = dart.keep_different(method, hidden, key, image, text, [n_image] * B)
    for b in range(B):
        norm = key[b].transpose(0, 1).flatten(1).abs().sum(1)
        first = sorted(range(start, start + n_image), key=lambda n: -norm[n])[:2]
        second = sorted(range(start + n_image, N), key=lambda n: -norm[n])[:3]
        assert of_image[b].tolist() == first
        assert of_text[b].tolist() == second
        left, want = set(range(start, start + n_image)) - set(first), set(first)
        for pivot in first + second:
            near = {n: cosine_similarity(hidden[b, pivot].double(), hidden[b, n].double(), dim=0).item() for n in left}
            picks = set(sorted(left, key=lambda n: near[n])[:4])
            want |= picks
            left -= picks
        assert kept[b].tolist() == sorted(want)


def test_dart_of_samples_of_different_size() -> None:
    hidden, key = randn(1, 2, 30, 8), randn(2, 2, 1, 30, 4)
    position = torch.arange(30).expand(2, 30)
    image = position < torch.tensor([[24], [10]])
    text = (position >= torch.tensor([[24], [10]])) & (position < torch.tensor([[30], [11]]))  # the second: one for two pivots
    method = methods.DART(tokens=None, ratio=0.5, image_pivots=2, text_pivots=2)
    kept, _, _ = dart.keep_different(method, hidden, key, image, text, [24, 10])
    assert [(row >= 0).sum().item() for row in kept] == [method.keep_count(0, 24), method.keep_count(0, 10)] == [14, 6]
    for row, mask in zip(kept, image):
        assert mask[row[row >= 0]].all()


def test_feather_keeps_the_union() -> None:
    scores = randn(0, 3, 36)
    grid = feather.strided_grid((6, 6), 2)
    chosen = feather.keep_with_grid(scores, 10, grid)
    for b in range(3):
        want = sorted({*scores[b].topk(10).indices.tolist(), *grid.nonzero()[:, 0].tolist()})
        assert chosen.counts[b] == len(want)
        assert chosen.index[b, : len(want)].tolist() == want


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_sparsevlm_scores(heads: int) -> None:
    query, key = randn(0, 2, 4, 50, 8), randn(1, 2, 2, 50, 8)
    embeds, span, rows = randn(2, 2, 50, 12), (5, 35), torch.arange(38, 50).expand(2, 12)
    share, weights = raters.rater_weights(embeds[:, 5:35], embeds[:, 38:])
    want = (embeds[:, 5:35].double() @ embeds[:, 38:].double().transpose(1, 2)).softmax(-1).mean(1)
    torch.testing.assert_close(share.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights.bool(), want > want.mean(1, keepdim=True))
    weight = weights.double()[:, None, :, None]
    maps = attention(query, key)[:, :, 38:, 5:35]
    scores = raters.rater_scores(query[:, :, 38:], key, span, weights, rows)
    torch.testing.assert_close(scores.double(), (maps.mean(1, keepdim=True) * weight).sum(2)[:, 0] / weights.sum(1, keepdim=True))
    ids = torch.arange(50).expand(2, 50) * 40  # distances up to 1960: the decay changes its sign
    decay = raters.distance_decay(ids[:, 38:], ids[:, 5:35], 8)
    one = torch.ones(8)

    def rotate(position: int) -> Tensor:
        angle = position * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
        return torch.cat([angle.cos() - angle.sin(), angle.cos() + angle.sin()]) * one.double()[0]

    assert decay.min() < 0 < decay.max()
    for i, j in ((0, 0), (3, 29), (11, 7)):
        want_decay = (rotate(int(ids[0, 38 + i])) * rotate(int(ids[0, 5 + j]))).sum().item() / math.sqrt(8)
        assert decay[0, i, j].item() == pytest.approx(want_decay, abs=1e-5)
    got, mass, chosen = raters.corrected_scores(query[:, :, 38:], key, span, weights, rows, decay, heads)
    corrected = maps / decay.double()[:, None] * weight
    torch.testing.assert_close(mass.double(), corrected.sum((2, 3)), rtol=1e-4, atol=1e-4)
    for b in range(2):
        best = corrected[b].sum((1, 2)).topk(heads).indices.sort().values
        assert chosen[b].tolist() == best.tolist()
        want = corrected[b, best].mean(0).sum(0) / weights[b].sum()
        torch.testing.assert_close(got[b].double(), want, rtol=1e-4, atol=1e-5)


def test_sparsevlm_merges_by_density() -> None:
    """Two tight groups and a straggler: the centres are in the groups, and every token joins the nearest."""
    groups = torch.tensor([[0.0, 0.0], [10.0, 0.0]]).repeat_interleave(5, 0) + 0.1 * randn(0, 10, 2)
    merged = sparsevlm.merge_dropped(groups[None], 2)[0]
    order = merged[:, 0].argsort()
    torch.testing.assert_close(merged[order], torch.stack([groups[:5].mean(0), groups[5:].mean(0)]), rtol=1e-4, atol=1e-4)
    assert sparsevlm.merge_dropped(torch.ones(1, 4, 3), 2).isfinite().all()  # all equal


@pytest.mark.parametrize("masked", [False, True])
def test_aim_importance_and_mask(masked: bool) -> None:
    query, key = randn(0, 2, 4, 30, 8), randn(1, 2, 2, 30, 8)
    visible = torch.ones(2, 30, dtype=torch.bool)
    if masked:
        visible[:, 7:15] = False
    got = aim.importance(query, key, visible if masked else None, temperature=0.5, iterations=3)
    rank = torch.full((2, 4, 1, 30), 1 / 30, dtype=torch.float64)
    for _ in range(3):
        rank = rank @ attention(query, key, visible, 0.5)
    want = rank[:, :, 0].square().mean(1).sqrt()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    text = torch.arange(30).expand(2, 30) >= 25
    after = aim.next_mask(got, visible, text, 12)
    for b in range(2):
        best = sorted((n for n in range(25) if visible[b, n]), key=lambda n: -got[b, n])[:7]
        assert after[b].nonzero()[:, 0].tolist() == sorted(best) + list(range(25, 30))


def test_aim_schedule_is_the_official_one() -> None:
    method = methods.AIM()
    assert [method.rate(layer) for layer in range(28)] == [1.0] * 14 + [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125] + [0.0] * 7
    assert [stage.layer for stage in method.stages] == list(range(15, 23))
    assert [method.keep_count(i, 98) for i in range(8)] == [85, 73, 61, 49, 36, 24, 12, 0]


def test_var_finds_sinks_and_heads() -> None:
    hidden = randn(0, 2, 40, 16)
    want = (hidden.double() / (hidden.double().square().mean(-1, keepdim=True) + 1e-6).sqrt())[..., [3, 7]].abs().amax(-1)
    score = var_sink.sink_score(hidden, (3, 7))
    torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=1e-6)
    query, key = randn(1, 2, 4, 10, 8), randn(2, 2, 2, 40, 8)
    image, sinks = torch.zeros(2, 40, dtype=torch.bool), score > 1.5
    image[:, 5:25] = True
    maps = attention(query, key)
    heads = var_sink.image_heads(query, key, image, sinks, rho=0.3, mass=0.4)
    on_image = (maps * image[:, None, None]).sum(-1)
    share = (maps * (image & sinks)[:, None, None]).sum(-1) / (on_image + 20e-6)
    torch.testing.assert_close(heads.image_mass.double(), on_image, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(heads.sink_share.double(), share, rtol=1e-4, atol=1e-6)
    assert torch.equal(heads.chosen, (heads.sink_share <= 0.3) & (heads.image_mass >= 0.4))
    assert 0 < heads.chosen.sum() < heads.chosen.numel()


def test_lscene_opens_what_a_row_looks_at() -> None:
    query, key = randn(0, 2, 4, 6, 8), randn(1, 2, 2, 30, 8)
    scores = attention(query, key)[..., 4:20].sum(1)
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    assert torch.equal(lscene.open_scenes(query, key, (4, 20)), (scores - low) / (high - low) * 255 > 96)
    assert not lscene.open_scenes(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 9, 4), (0, 5)).any()  # constant rows


def test_dyvte_gate_learns() -> None:
    torch.manual_seed(0)
    gate = dyvte.ExitGate(8, 32)
    optimiser, losses = torch.optim.Adam(gate.parameters(), 1e-2), []
    for step in range(60):
        hidden, ends = randn(step, 16, 12, 8), torch.full((16,), 11)
        question = torch.zeros(16, 12, dtype=torch.bool)
        question[:, 6:11] = True
        features = dyvte.gate_features(hidden, question, ends)
        torch.testing.assert_close(features, torch.cat([hidden[:, 6:11].mean(1), hidden[:, 11]], 1))
        easy = hidden[:, 11, 0] > 0
        loss = dyvte.gate_loss(gate(features), easy.float(), torch.ones(16), torch.ones(16))
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert (dyvte.leaves(gate(features)) == easy).float().mean() > 0.8


def test_dyvte_empty_question_never_exits() -> None:
    features = dyvte.gate_features(torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([2]))
    assert not dyvte.leaves(dyvte.ExitGate(4, 8)(features)).any()


def test_atp_scores_are_those_of_the_maps() -> None:
    query, key, span, rows = randn(0, 2, 4, 40, 8), randn(1, 2, 2, 40, 8), (5, 25), torch.arange(30, 40).expand(2, 10)
    got = atp_llava.redundancy(query[:, :, 5:25], key, span, query[:, :, 30:], rows)
    wide = key.repeat_interleave(2, 1).double()
    logits = (query.double() @ wide.transpose(2, 3) * 8**-0.5)[:, :, 5:25, 5:25].mean(1)
    seen = torch.ones(20, 20).tril().double()
    torch.testing.assert_close(got.own.double(), (logits * seen).sum(-1) / seen.sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.text.double(), attention(query, key)[:, :, 30:, 5:25].mean((1, 2)), rtol=1e-4, atol=1e-6)


def test_atp_thresholds_learn_a_budget() -> None:
    torch.manual_seed(0)
    heads = atp_thresholds.Thresholds(8)
    spatial = atp_llava.spatial_score((6, 6), 0.25, 3.0)
    optimiser, losses = torch.optim.Adam(heads.parameters(), 5e-2), []
    for step in range(80):
        scores = atp_thresholds.Redundancy(randn(step, 4, 36).sigmoid() * 2, randn(step + 500, 4, 36).sigmoid() * 0.2)
        mask = atp_thresholds.soft_mask(scores, spatial, heads(scores))
        loss = atp_thresholds.budget_loss([mask], (1,), target=9.0)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    soft, hard = atp_thresholds.soft_mask(scores, spatial, heads(scores)), atp_thresholds.margin(scores, spatial, heads(scores)) > 0
    assert torch.equal(hard, soft > 0.5)


def test_mixture_of_depths_equals_its_loop() -> None:
    torch.manual_seed(0)
    hidden, router, layer = randn(0, 2, 23, 6).requires_grad_(), videollm_mod.Router(6), nn.Linear(6, 6)
    scores = router(hidden[:, 3:18])  # 3 frames of 5
    index = videollm_mod.route(scores, 3, 2)
    got = videollm_mod.mixture_of_depths(lambda x, _: layer(x), hidden, scores, index, (3, 18))
    want = []
    for b in range(2):
        rows = list(hidden[b])
        for frame in range(3):
            part = scores[b, 5 * frame : 5 * frame + 5]
            for n in sorted(range(5), key=lambda n: -part[n].item())[:2]:
                at = 3 + 5 * frame + n
                rows[at] = rows[at] + scores[b, 5 * frame + n] * layer(hidden[b, at])
        for n in [*range(3), *range(18, 23)]:
            rows[n] = rows[n] + layer(hidden[b, n])
        want.append(torch.stack(rows))
    torch.testing.assert_close(got, torch.stack(want))
    leaves = (hidden, router.score.weight, layer.weight)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), leaves, retain_graph=True), torch.autograd.grad(torch.stack(want).square().sum(), leaves)
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

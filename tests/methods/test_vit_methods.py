"""Methods inside vision transformers against slow references written from the papers, and the learned ones in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.inputs import randn
from tokensieve import ops
from tokensieve.methods import ATS, AViT, DynamicViT, IARed2, ToPViM
from tokensieve.methods import ats as ats_step
from tokensieve.methods import avit as avit_step
from tokensieve.methods import dynamicvit as dynamicvit_step
from tokensieve.methods import ia_red2 as ia_red2_step
from tokensieve.methods import topvim as topvim_step
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: ToPViM(keep=0.0), r"ToPViM: keep must be in \(0, 1\], got 0.0"),
        (lambda: ToPViM(layers=(0,)), "layers must be 1 or more"),
        (lambda: DynamicViT(ratio=1.5), r"DynamicViT: ratio must be in \(0, 1\], got 1.5"),
        (lambda: dynamicvit_step.Predictor(6), "channels must be a multiple of 4"),
        (lambda: AViT(eps=0.0), r"AViT: eps must be in \(0, 1\), got 0.0"),
        (lambda: ATS(samples=1), "ATS: samples must be 2 or more, got 1"),
        (lambda: IARed2(groups=0), "IARed2: groups must be 1 or more"),
        (lambda: IARed2(threshold=2.0), r"threshold must be in \[0, 1\]"),
        (lambda: ia_red2_step.Interpreter(8, heads=3), "heads must divide channels=8, got 3"),
        (lambda: topvim_step.keep_around_cls(torch.zeros(1, 5), [torch.zeros(1, 5, 1)], 3), "k must be even"),
        (lambda: avit_step.run_alive(lambda x, real: x, torch.zeros(1, 4, 1), torch.ones(1, 4), 5), r"capacity must be in \[0, N=4\]"),
    ],
)
def test_bad_input(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


@pytest.mark.parametrize("make", [lambda: DynamicViT(layers=(1.5,)), lambda: AViT(eps="x")])
def test_fields_of_the_wrong_type(make: Any) -> None:
    with pytest.raises(TypeError, match=r"must be an? "):
        make()


# ---- ToP-ViM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [2, 7, 64, 196])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1.0])
def test_topvim_count_is_even_and_near_the_share(patches: int, keep: float) -> None:
    count = ToPViM(keep=keep).keep_count(patches)
    k = math.ceil(keep * patches)
    k += k % 2 == 0  # the paper's rule: odd, then one less
    assert count == min(k - 1, patches // 2 * 2)


@pytest.mark.parametrize("seed", range(3))
def test_topvim_keeps_the_best_in_order_around_cls(seed: int) -> None:
    B, N, k = 3, 21, 8
    scores, hidden = randn(seed, B, N), randn(seed + 9, B, N, 4)
    (out,), index = topvim_step.keep_around_cls(scores, [hidden], k)
    for b in range(B):
        best = sorted(sorted((n for n in range(N) if n != N // 2), key=lambda n: -scores[b, n].item())[:k])
        assert index[b].tolist() == best
        assert torch.equal(out[b], hidden[b, [*best[: k // 2], N // 2, *best[k // 2 :]]])


def test_topvim_alignment_sums_what_was_skipped() -> None:
    delta, index = randn(0, 2, 9, 3), torch.tensor([[1, 2, 6], [0, 4, 8]])
    got = topvim_step.skipped_delta(delta, index)
    for b in range(2):
        before = -1
        for i, n in enumerate(index[b].tolist()):
            torch.testing.assert_close(got[b, i], delta[b, before + 1 : n].sum(0), atol=1e-5, rtol=1e-5)
            before = n


# ---- DynamicViT ------------------------------------------------------------------------------------------------------------


def test_dynamicvit_policy_of_ones_is_attention() -> None:
    q, k, v = (randn(seed, 2, 3, 7, 8) for seed in range(3))
    got = dynamicvit_step.policy_attention(q, k, v, torch.ones(2, 7))
    want = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_dynamicvit_policy_hides_dropped_keys_but_not_the_token_itself() -> None:
    q, k, v = (randn(seed, 1, 2, 5, 4) for seed in range(3))
    policy = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    got = dynamicvit_step.policy_attention(q, k, v, policy)
    visible = policy.bool()[:, None, None, :] | torch.eye(5, dtype=torch.bool)
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_dynamicvit_gate_is_hard_and_has_a_gradient() -> None:
    logits = randn(0, 4, 9, 2).requires_grad_()
    policy = (randn(1, 4, 9) > 0).float()
    keep = dynamicvit_step.gate(logits.log_softmax(-1), policy, generator=torch.Generator().manual_seed(0))
    assert set(keep.unique().tolist()) <= {0.0, 1.0}
    assert not (keep * (1 - policy)).any()
    keep.sum().backward()
    assert logits.grad is not None
    assert logits.grad[policy.bool()].abs().min() > 0


def test_dynamicvit_predictor_learns_which_patches_matter() -> None:
    """Patches with a mark in channel 0 matter: with the ratio loss at the marked share, the predictor finds them."""
    torch.manual_seed(0)
    predictor = dynamicvit_step.Predictor(16)
    optimiser = torch.optim.Adam(predictor.parameters(), 1e-2)
    losses = []
    for step in range(60):
        patches = randn(step, 8, 20, 16)
        marked = (torch.rand(8, 20) < 0.4).float()
        patches[..., 0] += 4 * marked
        policy = dynamicvit_step.gate(predictor(patches, torch.ones(8, 20)), torch.ones(8, 20))
        missed = ((1 - policy) * marked).sum() / marked.sum()
        loss = missed + dynamicvit_step.ratio_loss([policy], [0.4])
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    _, index = dynamicvit_step.keep_best(torch.cat([patches[:, :1], patches], 1), predictor(patches, torch.ones(8, 20))[..., 0], 5)
    assert marked.gather(1, index).mean() > 0.9


# ---- A-ViT -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_avit_state_follows_the_paper(seed: int) -> None:
    method = AViT(gate_scale=4.0, gate_center=2.0)
    outputs = randn(seed, 6, 2, 5, 3)
    state = avit_step.start(outputs[0])
    for layer, output in enumerate(outputs):
        state = avit_step.update(state, output, method.halting(output * state.alive[..., None], layer == 5), eps=method.eps)
    for b in range(2):
        for n in range(5):
            total, remainder, out, ponder, counter = 0.0, 1.0, torch.zeros(3), 0.0, 1.0
            for layer in range(6):
                y = outputs[layer, b, n]
                h = 1.0 if layer == 5 else torch.sigmoid(4.0 * y[0] - 2.0).item()
                total += h
                ponder += 1
                if total >= 1 - method.eps:
                    out, ponder = out + y * remainder, ponder + remainder
                    break
                out, remainder, counter = out + y * h, remainder - h, counter + 1
            torch.testing.assert_close(state.output[b, n], out, atol=1e-5, rtol=1e-5)
            assert state.ponder[b, n].item() == pytest.approx(ponder, abs=1e-5)
            assert state.counter[b, n].item() == counter
    assert not state.alive.any()


def test_avit_skipping_equals_masking_and_differentiates() -> None:
    torch.manual_seed(0)
    mix = nn.Linear(6, 6)

    def block(x: Tensor, real: Tensor) -> Tensor:  # tokens look at the mean of the real ones
        weight = real[..., None].to(x.dtype)
        return mix(x + (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1))

    tokens = randn(3, 2, 9, 6).requires_grad_()
    alive = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.float32)
    got, overflow = avit_step.run_alive(block, tokens, alive, 9)
    want = block(tokens, alive.bool()) * alive[..., None]
    torch.testing.assert_close(got, want)
    assert not overflow.any()
    grads = [torch.autograd.grad(out.square().sum(), tokens, retain_graph=True)[0] for out in (got, want)]
    torch.testing.assert_close(*grads)
    assert avit_step.run_alive(block, tokens.detach(), alive, 4)[1].tolist() == [True, False]


# ---- ATS -------------------------------------------------------------------------------------------------------------------


def sampled(scores: list[float], samples: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda n: (scores[n], -n))
    cdf, total = [], 0.0
    for n in order:
        total += scores[n]
        cdf.append(total)
    axis = [(value - cdf[0]) / (cdf[-1] - cdf[0]) for value in cdf]
    first = min(value for value in axis if value > 0)
    points = [first + (1 - first) * t / (samples - 1) for t in range(samples)]
    picks = {min(range(len(axis)), key=lambda j: abs(point - axis[j])) for point in points}
    return [order[j] for j in sorted(picks)]


@pytest.mark.parametrize(("N", "samples"), [(12, 12), (40, 15), (30, 60), (196, 196)])
def test_ats_samples_like_the_paper(N: int, samples: int) -> None:
    scores = randn(N, 3, N).softmax(-1)
    chosen = ats_step.sample_tokens(scores, samples)
    for b in range(3):
        want = sampled(scores[b].double().tolist(), samples)
        assert chosen.counts[b] == len(want)
        assert chosen.index[b, : len(want)].tolist() == want
        assert (chosen.index[b, len(want) :] == -1).all()


def test_ats_significance_and_rows() -> None:
    q, k, v = (randn(seed, 2, 3, 9, 4) for seed in range(3))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    scores = ats_step.significance(q[:, :, :1], k, v, valid)
    logits = (q.double() @ k.double().transpose(-2, -1)) * 0.5
    attention = logits.masked_fill(~valid[:, None, None, :], -math.inf).softmax(-1)
    want = attention[:, :, 0].sum(1) * v.double().transpose(1, 2).flatten(2).norm(dim=-1)
    want = want[:, 1:] / want[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(scores.double(), want, atol=1e-6, rtol=1e-5)
    chosen = ats_step.sample_tokens(scores, 6)
    rows, index = ats_step.sampled_attention(q, k, v, chosen, valid)
    assert (index[:, 0] == 0).all()
    full = (attention @ v.double()).transpose(1, 2).flatten(2)
    for b in range(2):
        for i, n in enumerate(index[b].tolist()):
            torch.testing.assert_close(rows[b, i].double(), full[b, n] if n >= 0 else torch.zeros(12).double(), atol=1e-6, rtol=1e-5)


def test_ats_of_zero_values_is_finite() -> None:
    scores = ats_step.significance(randn(0, 1, 2, 1, 4), randn(1, 1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    assert torch.equal(scores, torch.zeros(1, 4))


# ---- IA-RED^2 --------------------------------------------------------------------------------------------------------------


def test_ia_red2_scores_are_the_mean_of_the_heads() -> None:
    torch.manual_seed(0)
    interpreter = ia_red2_step.Interpreter(12, heads=3)
    patches, policy = randn(0, 2, 7, 12), randn(1, 2, 1, 12)
    own, shared = interpreter.of_patches(patches), interpreter.of_policy(policy)
    want = torch.stack([(own[..., h * 4 : h * 4 + 4] * shared[..., h * 4 : h * 4 + 4]).sum(-1).sigmoid() for h in range(3)]).mean(0)
    torch.testing.assert_close(interpreter(patches, policy), want, atol=1e-6, rtol=1e-5)


def test_ia_red2_keeps_all_or_none() -> None:
    patches, ones = randn(0, 2, 5, 3), torch.ones(2, 5)
    out, chosen = ia_red2_step.keep_informative(patches, ones, 5)
    assert torch.equal(out, patches)
    out, chosen = ia_red2_step.keep_informative(patches, 0 * ones, 5)
    assert not out.any()
    assert chosen.counts.tolist() == [0, 0]


def test_ia_red2_interpreter_learns_by_policy_gradient() -> None:
    """A prediction is right when all marked patches stay: the policy keeps them and drops others."""
    torch.manual_seed(0)
    interpreter, policy_token = ia_red2_step.Interpreter(8, heads=2), randn(0, 1, 1, 8)
    optimiser = torch.optim.Adam(interpreter.parameters(), 2e-2)
    rewards = []
    for step in range(150):
        patches = randn(step, 16, 6, 8)
        marked = torch.zeros(16, 6, dtype=torch.bool)
        marked[:, step % 6] = True
        patches[..., 0] += 4 * marked
        scores = interpreter(patches, policy_token.expand(16, 1, 8)).clamp(1e-4, 1 - 1e-4)
        draw, greedy = torch.bernoulli(scores.detach()), (scores.detach() >= 0.5).float()
        gain = [ia_red2_step.reward(d, (d.bool() | ~marked).all(1)) for d in (draw, greedy)]
        loss = ia_red2_step.policy_loss(scores, draw, gain[0] - gain[1])
        optimiser.zero_grad()
        loss.backward()
        if step == 0:  # later the advantage may be 0 in all samples
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in interpreter.parameters())
        optimiser.step()
        rewards.append(gain[1].mean().item())
    assert sum(rewards[-20:]) / 20 > sum(rewards[:20]) / 20 + 0.1


def test_selection_type_is_public() -> None:
    assert ops.Selection._fields == ("index", "counts", "overflow")

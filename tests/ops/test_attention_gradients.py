"""Gradients of attention_scores to query and key against autograd through the whole map in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, integer, log_uniform, normal, queries_and_keys, seeded
from reference.ops import attention_scores as reference
from same_bits import on_every_level
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the largest gradient: one rounding to the dtype


def gradients(query: Tensor, key: Tensor, options: dict[str, Any], with_lse: bool, seed: int = 0) -> list[Tensor]:
    """(of query, of key) of a random weighting of the scores (and normalisers): ours, then the float64 reference's."""
    out: list[Tensor] = []
    for truth in (False, True):
        q, k = (t.detach().double().requires_grad_() if truth else t.detach().clone().requires_grad_() for t in (query, key))
        scores, lse = reference(q, k, **options) if truth else ts.attention_scores(q, k, **options, return_lse=True)
        weights = normal(seeded(seed), *scores.shape, device=query.device).to(scores.dtype)
        loss = (scores * weights).sum()
        if with_lse:
            loss = loss + (lse * normal(seeded(seed + 1), *lse.shape, device=query.device).to(lse.dtype)).sum()
        loss.backward()
        out += [q.grad, k.grad]  # type: ignore[list-item]
    return out


def check(query: Tensor, key: Tensor, with_lse: bool = False, what: str = "", seed: int = 0, **options: Any) -> None:
    found = gradients(query, key, options, with_lse, seed)
    for name, got, want in (("query", found[0], found[2]), ("key", found[1], found[3])):
        assert got.dtype == query.dtype
        scale = float(want.abs().max()) if want.numel() else 0.0
        error = float((got.double() - want).abs().max()) if want.numel() else 0.0
        assert error <= TOLERANCE[query.dtype] * scale + 1e-7, (
            f"{name}: {error:.3g} of {scale:.3g}; {what} {query.shape} {key.shape} {options}"
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["softmax", "logit", "sigmoid"])
def test_gradients_of_the_cls_row(dtype: torch.dtype, activation: str, device: str) -> None:
    """EViT: the CLS row over all tokens, mean over heads."""
    for N, D in ((197, 64), (577, 64), (33, 20), (16, 72), (1, 8), (300, 128), (65, 300)):
        query, key = queries_and_keys(seeded(N), 2, 4, 4, 1, N, D, dtype, device)
        check(query, key, activation=activation)
        check(query, key, activation=activation, key_range=(1, N), head_reduction="sum")


@pytest.mark.parametrize("rows", ["mean", "sum", "visible_mean", None])
@pytest.mark.parametrize("heads", ["mean", "sum", None])
@pytest.mark.parametrize("activation", ["softmax", "logit", "sigmoid"])
def test_gradients_of_every_reduction(activation: str, heads: str | None, rows: str | None, device: str) -> None:
    for L, N, causal in ((1, 40, False), (5, 70, True), (7, 300, True)):
        query, key = queries_and_keys(seeded(L), 2, 6, 3, L, N, 24, torch.float32, device)
        options: dict[str, Any] = {"activation": activation, "head_reduction": heads, "query_reduction": rows, "causal": causal}
        check(query, key, **options)
        if rows is not None:
            options["row_weights"] = torch.rand(2, L, generator=seeded(1)).to(device)
        if heads is not None:
            options["head_weights"] = torch.rand(2, 6, generator=seeded(2)).to(device).masked_fill(torch.arange(6, device=device) == 3, 0)
        check(query, key, with_lse=True, key_range=(3, N - 4), **options)


@pytest.mark.parametrize("normalize", ["row", "range"])
def test_gradients_with_bias_range_positions_and_lse(normalize: str, device: str) -> None:
    query, key = queries_and_keys(seeded(3), 2, 4, 2, 3, 90, 32, torch.float32, device)
    hidden = torch.rand(2, 1, 1, 90, generator=seeded(4)).to(device) > 0.3
    hidden[..., 20:40] = True
    positions = torch.tensor([[30, 89, 50], [25, 60, 70]], device=device)
    for activation in ("softmax", "logit", "sigmoid"):
        options: dict[str, Any] = {"normalize": normalize, "key_range": (10, 77), "activation": activation}
        for with_lse in (False, True):
            check(query, key, with_lse=with_lse, **options)
            check(query, key, with_lse=with_lse, bias=hidden, **options)
            check(query, key, with_lse=with_lse, bias=normal(seeded(5), 1, 4, 3, 90, device=device), causal=True, **options)
            check(query, key, with_lse=with_lse, query_positions=positions, scale=0.3, **options)
            check(query, key, with_lse=with_lse, query_positions=positions, query_reduction="visible_mean", bias=hidden, **options)
    lse = normal(seeded(6), 2, 4, 3, device=device) + 4
    check(query, key, lse=lse, key_range=(10, 77), normalize=normalize)  # a given normaliser is a constant


def test_gradients_of_strided_views(device: str) -> None:
    query, key = queries_and_keys(seeded(8), 2, 4, 2, 3, 50, 40, torch.float32, device, tokens_first=True)
    check(query, key)
    wide = normal(seeded(9), 2, 60, 3, 4, 16, device=device)  # a fused projection: (B, N, 3, H, D)
    q, k = (wide[:, :, i].transpose(1, 2).detach().requires_grad_() for i in (0, 1))
    ts.attention_scores(q[:, :, :1], k[:, :, 5:]).square().sum().backward()
    dense = [t.detach().contiguous().requires_grad_() for t in (q, k)]
    ts.attention_scores(dense[0][:, :, :1], dense[1][:, :, 5:]).square().sum().backward()
    assert_equal(q.grad, dense[0].grad)
    assert_equal(k.grad, dense[1].grad)


def test_gradients_of_rows_that_see_nothing_are_zero(device: str) -> None:
    query, key = queries_and_keys(seeded(10), 1, 2, 2, 3, 20, 16, torch.float32, device)
    positions = torch.tensor([[-1, 7, 19]], device=device)
    for activation in ("softmax", "logit", "sigmoid"):
        for rows in ("mean", "visible_mean", None):
            q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
            options: dict[str, Any] = {"query_positions": positions, "query_reduction": rows, "activation": activation}
            scores, lse = ts.attention_scores(q, k, **options, return_lse=True)
            (scores.square().sum() + lse[..., 1:].sum()).backward()
            assert not q.grad[:, :, 0].any()
            assert bool(torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all())
            assert q.grad[:, :, 1:].abs().amin() > 0
    bias = torch.zeros(1, 1, 1, 20, dtype=torch.bool, device=device)
    q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
    ts.attention_scores(q, k, bias=bias).sum().backward()
    assert not q.grad.any()
    assert not k.grad.any()


@pytest.mark.parametrize(("B", "H", "L", "N", "D"), [(0, 2, 1, 5, 4), (1, 2, 0, 5, 4), (1, 2, 1, 0, 4), (1, 0, 1, 5, 4), (2, 2, 3, 5, 0)])
def test_gradients_empty(B: int, H: int, L: int, N: int, D: int, device: str) -> None:
    q, k = (torch.randn(B, H, n, D, device=device).requires_grad_() for n in (L, N))
    ts.attention_scores(q, k, scale=1.0, query_reduction="sum", head_reduction="sum").sum().backward()
    for t in (q, k):
        assert t.grad.shape == t.shape
        assert not t.grad.any()


def test_gradients_finite_differences(device: str) -> None:
    """Beside the reference's formula: the loss itself, moved along random directions in float64."""
    query, key = queries_and_keys(seeded(11), 1, 2, 1, 2, 9, 8, torch.float32, device)
    weights = normal(seeded(12), 1, 9, device=device)
    q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
    (ts.attention_scores(q, k, causal=True) * weights).sum().backward()
    for seed in range(5):
        along = [normal(seeded(seed + s), *t.shape, device=device).double() for s, t in ((100, query), (200, key))]

        def loss(step: float, along: list[Tensor] = along) -> float:
            moved = [t.double() + step * a for t, a in zip((query, key), along, strict=True)]
            return float((reference(*moved, causal=True)[0] * weights).sum())

        want = (loss(1e-5) - loss(-1e-5)) / 2e-5
        got = float((q.grad * along[0]).sum() + (k.grad * along[1]).sum())
        assert abs(got - want) <= 1e-5 * max(1.0, abs(want))


def test_gradient_of_accumulate_and_of_lse_alone(device: str) -> None:
    query, key = queries_and_keys(seeded(13), 2, 2, 2, 1, 30, 16, torch.float32, device)
    before = torch.rand(2, 30, generator=seeded(14)).to(device).requires_grad_()
    weights = normal(seeded(15), 2, 30, device=device)
    (ts.attention_scores(query, key, accumulate=before) * weights).sum().backward()
    assert_equal(before.grad, weights)
    q = query.clone().requires_grad_()
    ts.attention_scores(q, key, return_lse=True)[1].sum().backward()
    p = torch.softmax(query.double() @ key.double().transpose(2, 3) / 4, -1)
    torch.testing.assert_close(q.grad, (p @ key.double() / 4).float())


def test_gradients_trickle_through_a_chain_of_layers(device: str) -> None:
    """Scores added up over layers, then a soft mask: what DynamicViT's predictor sees."""
    layers = [queries_and_keys(seeded(s), 2, 2, 2, 1, 30, 16, torch.float32, device) for s in range(3)]
    leaves = [[t.clone().requires_grad_() for t in layer] for layer in layers]
    total = None
    for q, k in leaves:
        total = ts.attention_scores(q, k, accumulate=total)
    ts.gather_tokens(total.log(), ts.select_topk(total.detach(), 7)).sum().backward()
    truth = [[t.double().requires_grad_() for t in layer] for layer in layers]
    want = sum(reference(q, k)[0] for q, k in truth)
    ts.gather_tokens(want.log(), ts.select_topk(want.detach().float(), 7)).sum().backward()
    for mine, theirs in zip(leaves, truth, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-5)


def test_gradients_only_where_asked_and_refusals(device: str) -> None:
    query, key = queries_and_keys(seeded(16), 1, 2, 2, 2, 9, 8, torch.float32, device)
    for wanted in ((True, False), (False, True)):
        q, k = (t.clone().requires_grad_(w) for t, w in zip((query, key), wanted, strict=True))
        ts.attention_scores(q, k).sum().backward()
        assert ((q.grad is not None), (k.grad is not None)) == wanted
    assert not ts.attention_scores(query, key).requires_grad
    with torch.no_grad():
        assert not ts.attention_scores(query.clone().requires_grad_(), key).requires_grad
    q = query.clone().requires_grad_()
    for name, options in (("query_reduction", {"query_reduction": "max"}), ("head_reduction", {"head_reduction": "max"})):
        with pytest.raises(ValueError, match=rf"^tokensieve\.attention_scores: {name} must not be 'max' where a gradient is wanted"):
            ts.attention_scores(q, key, **options).sum().backward()
    for name, value in (
        ("bias", torch.zeros(1, 1, 1, 9, device=device)),
        ("lse", torch.zeros(1, 2, 2, device=device)),
        ("row_weights", torch.ones(1, 2, device=device)),
        ("head_weights", torch.ones(1, 2, device=device)),
    ):
        with pytest.raises(ValueError, match=rf"^tokensieve\.attention_scores: {name} must not require a gradient"):
            ts.attention_scores(query, key, **{name: value.requires_grad_()}).sum().backward()
    with pytest.raises(ValueError, match=r"^tokensieve\.attention_scores: create_graph must be False"):
        torch.autograd.grad(ts.attention_scores(q, key).square().sum(), q, create_graph=True)
    with pytest.raises(ValueError, match=r"tokensieve\.attention_scores: tensors must carry no forward-mode tangent"):
        torch.func.jvp(lambda t: ts.attention_scores(t, key), (query,), (query,))


def test_gradients_same_bits_at_every_level_and_thread_count() -> None:
    def run() -> Iterator[Tensor]:
        for dtype in FLOATS:
            for L, N, D in ((1, 577, 64), (9, 300, 40), (3, 33, 20)):
                query, key = queries_and_keys(seeded(N), 2, 4, 2, L, N, D, dtype)
                for activation in ("softmax", "sigmoid"):
                    q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
                    scores, lse = ts.attention_scores(q, k, causal=L > 1, activation=activation, return_lse=True)
                    yield from torch.autograd.grad(scores.square().sum() + lse.sum(), (q, k))

    on_every_level(run)


def test_gradients_fuzz(device: str) -> None:
    for seed in range(80):
        g = seeded(seed)
        Hkv, group = log_uniform(g, 1, 3), log_uniform(g, 1, 6)
        B, L, N, D = log_uniform(g, 1, 3), log_uniform(g, 1, 20), log_uniform(g, 20, 600), log_uniform(g, 1, 200)
        dtype = FLOATS[integer(g, 0, 2)]
        query, key = queries_and_keys(g, B, Hkv * group, Hkv, L, N, D, dtype, device, bool(integer(g, 0, 1)))
        start = integer(g, 0, N - 1)
        options: dict[str, Any] = {
            "causal": bool(integer(g, 0, 1)),
            "key_range": None if integer(g, 0, 1) else (0, N) if start == 0 else (start // 4, N - start // 4),
            "normalize": ("row", "range")[integer(g, 0, 1)],
            "query_reduction": ("mean", "sum", "visible_mean", None)[integer(g, 0, 3)],
            "head_reduction": ("mean", "sum", None)[integer(g, 0, 2)],
            "activation": ("softmax", "softmax", "logit", "sigmoid")[integer(g, 0, 3)],
        }
        if options["normalize"] == "range" and options["causal"]:
            options["key_range"] = None  # a row that sees nothing has no gradient in the reference
        check(query, key, with_lse=bool(integer(g, 0, 1)), what=f"seed {seed}", seed=seed, **options)


def test_gradients_opcheck(device: str) -> None:
    op = torch.ops.tokensieve.attention_scores_backward.default
    for dtype in FLOATS:
        query, key = queries_and_keys(seeded(1), 2, 4, 2, 3, 20, 16, dtype, device)
        grad, lse = normal(seeded(2), 2, 20, device=device), torch.full((2, 4, 3), 3.0, device=device)
        tail = (None, False, None, None, None, None, 0, 20, 0, 1, 1, 0, None)
        results = torch.library.opcheck(op, (grad, None, lse, query, key, *tail))
        assert set(results.values()) == {"SUCCESS"}, results


def test_gradients_compile_with_dynamic_shapes(device: str) -> None:
    def loss(query: Tensor, key: Tensor) -> Tensor:
        scores, lse = ts.attention_scores(query * 2, key.sin(), causal=True, return_lse=True)
        return scores.square().sum() + lse.mean()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, H, L, N, D in ((2, 10, 3, 40, 16), (3, 8, 5, 77, 32), (6, 12, 2, 130, 24)):
            query, key = queries_and_keys(seeded(N), B, H, H // 2, L, N, D, torch.float32, device)
            grads = []
            for f in (function, loss):
                q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
                f(q, k).backward()
                grads.append((q.grad, k.grad))
            for mine, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()

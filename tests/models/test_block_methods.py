"""Merging methods inside vision encoders: the whole model against the same method in loops (tests/reference/merge_methods.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("transformers")
import timm_here  # noqa: F401

pytest.importorskip("timm")
import tokensieve as ts
import torch
from reference import merge_methods as reference
from tokensieve.methods import BlockMethod, BlockStep, BlockView, DiffRate, EViT, PiToMe, ToFu, ToMe, Turbo
from torch import Tensor

from models.encoders import DEPTH, encoder, pixels, run_encoder, timm_model

METHODS: list[Any] = [
    ToMe(r=7),
    ToMe(r=(0, 20, 0, 3), proportional=False),
    ToMe(r=6, inflect=-1.0),
    Turbo(r=6, beta=0.8, gamma=2.0, threshold=50),
    PiToMe(keep=0.8),
    PiToMe(keep=0.7, margin=0.9, proportional=True),
    DiffRate(prune=(60, 50, 50), merge=(52, 50, 37)),
    ToFu(keep=0.8),
    EViT(keep=0.6, layers=(1, 2)),
    EViT(tokens=20, layers=(0,), fuse=False),
    EViT(keep=0.5, layers=(3,), normalize=True),
]
ONE_EACH: list[Any] = [ToMe(r=7), Turbo(r=6), PiToMe(keep=0.8), DiffRate((60, 50), (52, 40)), ToFu(keep=0.8), EViT(layers=(0, 2))]
NEEDS_CLS = (Turbo, DiffRate, EViT)


@dataclass(frozen=True)
class Loops(BlockMethod):
    """A method again, image by image in float64."""

    method: Any

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.method.proportional

    def blocks(self, depth: int) -> tuple[int, ...]:
        return self.method.blocks(depth)

    def step(self, view: BlockView) -> BlockStep | None:
        B, N, _ = view.tokens.shape
        size = torch.ones(B, N) if view.size is None else view.size
        done = [self._image(view, b, size[b].double()) for b in range(B)]
        if done[0] is None:
            return None
        tokens, index, inverse, sizes = (None if part[0] is None else torch.stack(part) for part in zip(*done))
        return BlockStep(tokens.float(), index, inverse, None if sizes is None else sizes.float())

    def _image(self, view: BlockView, b: int, size: Tensor) -> Any:
        method, N, prefix, x = self.method, view.tokens.shape[1], view.prefix, view.tokens[b].double()
        metric = view.key[b].double().mean(0)
        bias = 0.0 if view.bias is None else view.bias[b, :, 0].double()
        scores = (_cls_logits(view, b) + bias).softmax(-1).mean(0)
        if isinstance(method, EViT):
            k = method.keep_count(N - prefix)
            kept, out = reference.evit(x, scores, k, prefix, method.fuse)
            if method.normalize:
                out[-1] /= 1 - scores[kept].sum()
            return out, torch.tensor(kept + [-1] * method.fuse), None, None
        if isinstance(method, DiffRate):
            kept, merged = min(method.prune[view.block], N), min(method.merge[view.block], N)
            if merged == N:
                return None
            groups, size = reference.diffrate(x, scores, kept, merged, prefix, size)
            return _rows(groups, reference.means(x, groups, torch.ones(N)), N, size)
        if isinstance(method, PiToMe):
            r = int((N - prefix) - (N - prefix) * method.keep)
            groups = reference.pitome(metric, r, prefix, method.margin * (1 - view.block / view.depth), view.block >= view.depth / 2)
        elif isinstance(method, ToFu):
            groups = reference.tome(metric, int((N - prefix) - (N - prefix) * method.keep), prefix)
            if view.block < view.depth // 2:
                index = torch.tensor([group[0] for group in groups])
                return x[index], index, None, None
            return _rows(groups, reference.norm_kept(x, groups), N, None)
        elif isinstance(method, Turbo):
            if method.threshold > N:
                return None
            groups = reference.tome(metric, method.r, prefix, scores * 30 * method.beta ** abs(method.gamma - view.block))
        else:
            groups = reference.tome(metric, method.schedule(view.depth)[view.block], prefix)
        return _rows(groups, reference.means(x, groups, size), N, torch.stack([size[group].sum() for group in groups]))


def _cls_logits(view: BlockView, b: int) -> Tensor:
    return (view.query[b, :, :1].double() @ view.key[b].double().transpose(1, 2))[:, 0] * view.scale


def _rows(groups: list[list[int]], tokens: Tensor, N: int, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    inverse = torch.full((N,), -1)
    for row, group in enumerate(groups):
        inverse[group] = row
    return tokens, torch.tensor([group[0] for group in groups]), inverse, size


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "clip", "dinov2", "siglip"])
def test_the_model_equals_the_method_in_loops(kind: str, method: Any) -> None:
    if kind == "siglip" and isinstance(method, NEEDS_CLS):
        pytest.skip("SigLIP has no CLS token")
    model, image = encoder(kind), pixels(1)
    with torch.no_grad():
        with ts.sieve(model, Loops(method)) as slow:
            expected = run_encoder(model, image)
        with ts.sieve(model, method) as run:
            out = run_encoder(model, image)
        assert torch.equal(run.trace, slow.trace)
        assert run.report.tokens == slow.report.tokens
        assert run.report.tokens[-1] < run.report.dense_tokens[-1] or run.report.flops[-1] < run.report.dense_flops[-1]
        if slow.size is None:
            assert run.size is None
        else:
            torch.testing.assert_close(run.size, slow.size, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "method", [ToMe(r=0), ToMe(r=()), Turbo(r=0), PiToMe(keep=1.0), ToFu(keep=1.0), EViT(keep=1.0), DiffRate((99,), (99,))]
)
def test_nothing_to_merge_is_bit_identical(method: Any) -> None:
    model, image = timm_model(), pixels()
    with torch.no_grad():
        expected = model(image)
        with ts.sieve(model, method) as run:
            assert torch.equal(model(image), expected)
            assert run.report.tokens == run.report.dense_tokens


@pytest.mark.parametrize("method", ONE_EACH, ids=lambda method: type(method).__name__)
def test_compiles_without_a_break_and_without_recompiling(method: BlockMethod) -> None:
    """dynamic=True makes symbols of a method's own numbers too: shares of a symbol, block after block, must not pile up."""
    torch.compiler.reset()
    model = timm_model(depth=2)
    with torch.no_grad(), ts.sieve(model, method) as run:
        expected = [model(pixels(batch)) for batch in (2, 3, 5)]
        assert run.report.tokens[-1] < run.report.dense_tokens[-1]
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        compiled(pixels(2))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, plain in zip((2, 3, 5), expected):
                torch.testing.assert_close(compiled(pixels(batch)), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ONE_EACH)
def test_training_learns(method: BlockMethod) -> None:
    torch.manual_seed(0)
    model = timm_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    image, labels = pixels(8), torch.arange(8) % 7
    losses = []
    with ts.sieve(model, method):
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(image), labels)
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ONE_EACH)
def test_half_precision_runs_and_stays_near(method: BlockMethod, dtype: torch.dtype) -> None:
    """Other pairs may merge: two rounds apart is what half precision allows, not equality."""
    model, image = timm_model(), pixels()
    with torch.no_grad(), ts.sieve(model, method):
        exact = model(image)
    half = model.to(dtype)
    with torch.no_grad(), ts.sieve(half, method) as run:
        out = half(image.to(dtype))
        assert out.dtype == dtype
        assert run.report.tokens[-1] < 65 * len(image)
    assert out.isfinite().all()
    assert torch.nn.functional.cosine_similarity(out.float(), exact, dim=1).min() > 0.9


def test_depth_is_the_encoders() -> None:
    assert DEPTH == 4  # what METHODS are made for

"""ToMe and EViT in whole encoders: against plain torch in float64, in training and compiled, with pictures of what merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import vit as reference
from tokensieve.methods import EViT, ToMe

from models.encoders import MODELS, PairMerge, encoder, pixels, run_encoder, timm_model

METHODS = {
    "tome": (lambda: ToMe(r=8), lambda prefix: reference.tome(8, prefix)),
    "tome, capped": (lambda: ToMe(r=20), lambda prefix: reference.tome(20, prefix)),
    "evit": (lambda: EViT(keep=0.7, layers=(1, 2)), lambda prefix: reference.evit(0.7, (1, 2), prefix)),
}


@pytest.mark.filterwarnings("ignore:.*more than half:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["vit", "registers", "qk_norm", "mean", "distilled"])
def test_matches_plain_torch_in_float64(kind: str, method: str) -> None:
    ours, plain = METHODS[method]
    model, image = timm_model(kind), pixels(3)
    with torch.no_grad():
        with ts.sieve(model, ours()) as run:
            logits = model(image)
        expected = reference.vit(model.double(), image.double(), plain(model.num_prefix_tokens))
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-5)
    assert run.report.tokens[-1] < run.report.tokens[0]


@pytest.mark.parametrize("kind", MODELS)
def test_r_0_and_keep_1_are_bit_identical(kind: str) -> None:
    model, image = encoder(kind), pixels()
    methods: list[Any] = [ToMe(r=0)] + ([EViT(keep=1.0, layers=(1, 2))] if ts.models.towers.find_tower(model).cls else [])
    with torch.no_grad():
        expected = run_encoder(model, image)
        for method in methods:
            with ts.sieve(model, method):
                assert torch.equal(run_encoder(model, image), expected)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_tome_in_transformers_loses_little(kind: str) -> None:
    """Against keeping everything: merging a few alike tokens moves the output less than dropping as many."""
    model, image = encoder(kind), pixels()
    with torch.no_grad():
        expected = run_encoder(model, image)
        with ts.sieve(model, ToMe(r=4)) as run:
            near = (run_encoder(model, image) - expected).norm()
    assert run.size is not None
    assert torch.equal(run.size.sum(1), torch.full((2,), float(run.trace.shape[1])))  # no patch is lost
    assert (torch.bincount(run.trace[0], minlength=run.size.shape[1]) == run.size[0]).all()
    assert near < 0.5 * expected.norm()


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_gradients_match_plain_torch(method: str) -> None:
    ours, plain = METHODS[method]
    model, image = timm_model("registers"), pixels()
    with ts.sieve(model, ours()):
        model(image).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model = timm_model("registers").double()
    reference.vit(model, image.double(), plain(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient, want = got[name], parameter.grad
        assert gradient is not None, name
        assert want is not None, name
        assert (gradient.double() - want).norm() <= 1e-4 * want.norm() + 1e-5, name


def test_vit_s_compiles_without_a_break_and_without_recompiling() -> None:
    """ViT-S/16 as timm makes it, traced whole; the eager backend, because code generation takes a minute and the trace is the question."""
    import timm

    torch.compiler.reset()
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=96, num_classes=5).eval()
    images = {batch: torch.randn(batch, 3, 96, 96) for batch in (2, 3, 5)}
    with torch.no_grad(), ts.sieve(model, ToMe(r=2)) as run:
        expected = {batch: model(image) for batch, image in images.items()}
        tokens = run.report.tokens
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch._dynamo.mark_dynamic(images[2], 0)
        compiled(images[2])
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, image in images.items():
                torch.testing.assert_close(compiled(image), expected[batch], rtol=1e-4, atol=1e-5)
        assert run.report.tokens == tokens


def test_overlay_shows_what_merged() -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    model, photo = timm_model(), Image.effect_noise((64, 64), 60).convert("RGB")
    with torch.no_grad(), ts.sieve(model, ToMe(r=12)) as run:
        model(pixels())
        picture = run.overlay(photo, sample=1)
        early = run.overlay(photo, sample=1, block=0)
    groups = run.trace[1, 1:]
    single = [int(p) for p in range(64) if (groups == groups[p]).sum() == 1]
    assert single
    for patch in single:
        x, y = patch % 8 * 8, patch // 8 * 8
        assert picture.crop((x + 1, y + 1, x + 8, y + 8)).tobytes() == photo.crop((x + 1, y + 1, x + 8, y + 8)).tobytes()
    changed = sum(a != b for a, b in zip(picture.tobytes(), photo.tobytes()))
    assert changed > sum(a != b for a, b in zip(early.tobytes(), photo.tobytes())) > 0
    with pytest.raises(ValueError, match="overlay's sample must be below 2, got 2"):
        run.overlay(photo, sample=2)
    with pytest.raises(ValueError, match=r"needs grid=\(rows, columns\) of 64 patches, got \(3, 3\)"):
        run.overlay(photo, grid=(3, 3))


@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_of_an_encoder_made_inside_a_sieve_is_refused(kind: str) -> None:
    model = encoder(kind)
    with ts.sieve(model, PairMerge()):
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="is a copy made inside a sieve and has half of its hooks; copy it outside"):
            run_encoder(copied, pixels())
        run_encoder(model, pixels())

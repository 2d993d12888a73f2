"""Block methods in LLaVA's vision tower: the decoder sees the tower's own tokens, each in the place of the patch it stands on."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from PIL import Image
from tokensieve.methods import EViT, PiToMe, ToMe
from torch import Tensor

from .tiny import IMAGE, llama, llava, llava_inputs, llava_next, next_inputs, pad, pixels, prompt

METHODS = [ToMe(r=2), EViT(layers=(1, 2), keep=0.6), PiToMe(keep=0.8), EViT(layers=(1,), keep=0.5, fuse=False)]


def features(model: Any, method: Any, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(projected tokens, patches that they stand on; -1 = made) of each image, from the tower alone."""
    with ts.sieve(model.model.vision_tower, method) as run:
        hidden = model.model.vision_tower(values, output_hidden_states=True).hidden_states[-2]
    stands = run.stands(len(model.model.vision_tower.encoder.layers) - 1)
    return list(model.model.multi_modal_projector(hidden[:, 1:])), list(stands[:, 1:] - 1)


def in_order(tokens: Tensor, stands: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Tokens by the place that they take, and the places: made ones the last free."""
    places = stands.tolist()
    free = [n for n in range(N) if n not in places][::-1]
    places = [free.pop(0) if place < 0 else place for place in places]
    order = sorted(range(len(places)), key=places.__getitem__)
    return tokens[order], torch.tensor(sorted(places))


def by_hand(model: Any, method: Any, ids: Tensor, values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of one sample whose image tokens are those of the tower, and their places."""
    tokens, stands = features(model, method, values)
    text, parts, places, at = model.get_input_embeddings()(ids[0]), [], [], 0
    for image, where in zip(tokens, stands, strict=True):
        start = at + int((ids[0, at:] == IMAGE).nonzero()[0])
        kept, place = in_order(image, where, 16)
        parts += [text[at:start], kept]
        places.append(place)
        at = start + 16
    embeds = torch.cat([*parts, text[at:]])[None]
    return model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state), places


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_logits_equal_a_prompt_built_by_hand(method: Any, images: int) -> None:
    model, x = llava(), llava_inputs(images)
    with torch.no_grad():
        want, places = by_hand(model, method, x["input_ids"], x["pixel_values"])
        with ts.sieve(model, method) as run:
            got = model(**x).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.shape[1] < x["input_ids"].shape[1]
    assert [kept.tolist() for kept in run.kept[0][0]] == [place.tolist() for place in places]
    assert run.report.image_tokens[0] == sum(map(len, places))
    assert run.tower.report.tokens[0] == images * 17
    assert run.method == method


@pytest.mark.parametrize(("make", "inputs"), [(llava, llava_inputs), (llava_next, next_inputs)])
def test_nothing_merged_is_the_model_itself_and_it_is_restored(make: Any, inputs: Any) -> None:
    model, x = make(), inputs()
    with torch.no_grad():
        plain = model(**x).logits
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        with ts.sieve(model, ToMe(r=0)):
            assert torch.equal(model(**x).logits, plain)
        wrong = {**x, "attention_mask": torch.ones(3, 3)}
        with pytest.raises((ValueError, RuntimeError, IndexError)), ts.sieve(model, ToMe(r=2)):
            model(**wrong)
        assert torch.equal(model(**x).logits, plain)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_samples(side: str) -> None:
    model, method = llava(), ToMe(r=2)
    rows = [prompt(4, 16, 6, seed=0), prompt(7, 16, 9, seed=1)]
    ids, mask = pad(rows, side)
    values = pixels(2)
    with torch.no_grad(), ts.sieve(model, method) as run:
        got = model(input_ids=ids, attention_mask=mask, pixel_values=values).logits
        real = run.output_mask
    for b in range(2):
        with torch.no_grad(), ts.sieve(model, method):
            want = model(input_ids=rows[b], attention_mask=torch.ones_like(rows[b]), pixel_values=values[b : b + 1]).logits
        torch.testing.assert_close(got[b][real[b]], want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate(options: dict[str, Any]) -> None:
    model, x = llava(), llava_inputs()
    with torch.no_grad(), ts.sieve(model, ToMe(r=2)):
        torch.manual_seed(0)
        out = model.generate(**x, max_new_tokens=5, use_cache=True, **options)
        torch.manual_seed(0)
        again = model.generate(**x, max_new_tokens=5, use_cache=False, **options)
    assert torch.equal(out, again)
    assert out.shape[1] == x["input_ids"].shape[1] + 5


def test_a_second_turn_on_the_cache() -> None:
    model, x = llava(), llava_inputs()
    more = prompt(0, 0, 5, seed=9)
    with torch.no_grad(), ts.sieve(model, ToMe(r=2)):
        first = model(**x, use_cache=True)
        second = model(input_ids=more, past_key_values=first.past_key_values).logits
        ids = torch.cat([x["input_ids"], more], 1)
        want = model(input_ids=ids, pixel_values=x["pixel_values"]).logits[:, -5:]
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-5)


def test_any_resolution_keeps_what_reaches_the_language_model() -> None:
    model, x = llava_next(), next_inputs()
    with torch.no_grad(), ts.sieve(model, ToMe(r=2)) as run:
        out = model(**x).logits
    kept = run.kept[0][0][0]
    ids = run._vision.packed[0]  # crop * 16 + patch of each token
    stands = run.tower.stands(3)[:, 1:] - 1
    reached = {16 * crop + patch for crop in range(3) for patch in stands[crop].tolist()} & set(ids.tolist())
    assert set(ids[kept].tolist()) == reached
    assert out.shape[1] == 10 + len(kept)


def test_training_reaches_the_tower() -> None:
    model, x = llava(), llava_inputs()
    with ts.sieve(model, ToMe(r=2)):
        loss = model(**x, labels=x["input_ids"].masked_fill(x["input_ids"] == IMAGE, -100)).loss
        loss.backward()
    gradient = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad
    assert loss.isfinite()
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_overlay_shows_the_groups() -> None:
    model, x = llava(), llava_inputs(2)
    picture = Image.new("RGB", (32, 32), (10, 200, 30))
    with torch.no_grad(), ts.sieve(model, ToMe(r=2)) as run:
        model(**x)
        assert run.overlay(picture, image_index=1).size == (32, 32)
        with pytest.raises(ValueError, match=r"overlay's image_index must be below 2, got 2"):
            run.overlay(picture, image_index=2)
    model, x = llava_next(), next_inputs()
    with torch.no_grad(), ts.sieve(model, ToMe(r=2)) as run:
        model(**x)
        assert run.overlay(picture).size == (32, 32)


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(TypeError, match=r"model must be timm's VisionTransformer.*got LlamaForCausalLM"):
        ts.sieve(llama(), ToMe(r=2))
    model = llava()
    with pytest.raises(ValueError, match=r"image_mask and spans must be None for ToMe"):
        ts.sieve(model, ToMe(r=2), spans=[(0, 4)])
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(TypeError, match=r"features from one layer.*got layers \[-2, -1\]"):
        ts.sieve(model, ToMe(r=2))
    model = llava()
    with ts.sieve(model, ToMe(r=2)):
        for other in (model, model.model.vision_tower):
            with pytest.raises(RuntimeError, match="already inside a sieve"), ts.sieve(other, EViT(layers=(1,))):
                pass


@pytest.mark.parametrize("tower", ["siglip", "dinov2"])
def test_other_towers_inside_llava(tower: str) -> None:
    """SigLIP has no CLS (strategy "full"); DINOv2 has one, and its features pass a layer norm."""
    model, x = llava(tower=tower), llava_inputs(2)
    with torch.no_grad():
        plain = model(**x).logits
        with ts.sieve(model, ToMe(r=0)):
            assert torch.equal(model(**x).logits, plain)
        with ts.sieve(model, ToMe(r=2)) as run:
            got = model(**x).logits
        assert torch.equal(model(**x).logits, plain)
    kept = [k.tolist() for k in run.kept[0][0]]
    assert all(0 < len(k) < 16 and k == sorted(set(k)) for k in kept)
    assert got.shape[1] == plain.shape[1] - 32 + sum(map(len, kept))
    assert got.isfinite().all()

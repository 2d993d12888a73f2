"""Every method that a sieve drives, through what generation asks of it: later turns, beams, a rearranged cache, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import (  # noqa: E402
    FEATHER,
    AIMMerge,
    DecoderMethod,
    EncoderMethod,
    FasterVLM,
    FastV,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    VisionZip,
)
from tokensieve.methods import METHODS as REGISTRY  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.test_encoder_presets import METHODS as ENCODER  # noqa: E402
from models.test_inside_methods import PRUNING  # noqa: E402

METHODS: dict[str, Any] = {
    **{f"{type(method).__name__} {number}": method for number, method in enumerate(ENCODER)},
    **PRUNING,
    "AIMMerge": AIMMerge(r=(6, 3)),
    "FasterVLM": FasterVLM(tokens=5),
    "FastV": FastV(),
    "PruMerge": PruMerge(neighbors=4, adaptive=False, ratio=0.3),
    "PruMergePlus": PruMergePlus(neighbors=4),
    "PyramidDrop": PyramidDrop((1, 2, 4), (0.5, 0.25, 0.125)),
    "VisionZip": VisionZip(dominant=5, contextual=3),
}


def test_the_list_is_whole() -> None:
    driven = {name for name, method in REGISTRY.items() if issubclass(method, (EncoderMethod, DecoderMethod))}
    assert {REGISTRY[name] for name in driven} <= {type(method) for method in METHODS.values()}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_by_generate_equals_manual_steps(name: str) -> None:
    model, x, question = tiny.llava(), tiny.llava_inputs(), tiny.prompt(4, 0, 3, seed=7)
    model(**x)  # transformers installs its own lazy hooks in a first call
    before = oracles.snapshot(model)
    with sieve(model, METHODS[name]):
        first = model.generate(**x, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        history = torch.cat([first.sequences, question], 1)
        y: dict[str, Any] = {"input_ids": history, "attention_mask": torch.ones_like(history), "past_key_values": first.past_key_values}
        second = model.generate(**y, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        out = model(**x)
        for token in [*first.sequences[:, -3:].split(1, 1), question]:
            out = model(input_ids=token, past_key_values=out.past_key_values)
        manual = [int(out.logits[0, -1].argmax())]
        while len(manual) < 4:
            out = model(input_ids=torch.tensor([manual[-1:]]), past_key_values=out.past_key_values)
            manual.append(int(out.logits[0, -1].argmax()))
    assert second == manual
    oracles.assert_same(before, oracles.snapshot(model))


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_beams_of_a_padded_batch_equal_each_prompt_alone(name: str) -> None:
    """Two images in one sample, one in another, none in the third."""
    model, method, options = tiny.llava(), METHODS[name], {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    rows = [torch.cat([tiny.prompt(3, 16, 2), tiny.prompt(2, 16, 5)], 1), tiny.prompt(4, 16, 6, seed=1), tiny.prompt(5, 0, 3, seed=2)]
    ids, mask = tiny.pad(rows, "left")
    values = tiny.pixels(3)
    with sieve(model, method):
        batch = model.generate(input_ids=ids, attention_mask=mask, pixel_values=values, **options)
    for b, pixels in enumerate((values[:2], values[2:], None)):
        with sieve(model, method):
            x = {} if pixels is None else {"pixel_values": pixels}
            alone = model.generate(input_ids=rows[b], attention_mask=torch.ones_like(rows[b]), **x, **options)
        assert batch[b, -4:].tolist() == alone[0, -4:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_rearranged_cache_goes_on_as_before(name: str) -> None:
    model, later = tiny.llava(), tiny.prompt(2, 0, 0, seed=9)
    rows = [tiny.prompt(4, 16, 6), tiny.prompt(2, 16, 2, seed=1)]
    ids, mask = tiny.pad(rows, "left")
    with sieve(model, METHODS[name]):

        def steps(order: list[int] | None) -> torch.Tensor:
            cache = model(input_ids=ids, attention_mask=mask, pixel_values=tiny.pixels(2)).past_key_values
            padding, logits = mask, []
            if order is not None:
                cache.reorder_cache(torch.tensor(order))
                padding = mask[order]
            for token in later.split(1, 1):
                padding = torch.nn.functional.pad(padding, (0, 1), value=1)
                logits.append(model(input_ids=token.expand(2, -1), attention_mask=padding, past_key_values=cache).logits)
            return torch.cat(logits, 1)

        torch.testing.assert_close(steps([1, 0]), steps(None)[[1, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_has_a_gradient_for_every_weight_of_the_decoder(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]
    model, x = tiny.llava().to(dtype).train(), tiny.llava_inputs()
    for module in (m for value in vars(method).values() if isinstance(value, tuple) for m in value if isinstance(m, torch.nn.Module)):
        if any(p.dtype != dtype for p in module.parameters()):
            pytest.skip("learned parts are float32")
    labels = x["input_ids"].masked_fill(x["input_ids"] == tiny.IMAGE, -100)
    labels[:, :20] = -100
    with sieve(model, method):
        loss = model(**{**x, "pixel_values": x["pixel_values"].to(dtype)}, labels=labels).loss
        loss.backward()
    assert loss.isfinite()
    for parameter in model.model.language_model.layers.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@torch.no_grad()
def test_images_of_a_plain_decoder_are_squares_where_they_fill_one() -> None:
    model = tiny.llama()
    with sieve(model, FEATHER(layers=(1,), ratio=1.0, stride=2), spans=[(4, 16)]) as run:
        model(tiny.prompt(4, 16, 6))
        assert run.kept[0][0][0].tolist() == [0, 2, 8, 10]
    for spans in ([(4, 15)], [(2, 9), (12, 4)]):
        with sieve(model, FEATHER(layers=(1,)), spans=spans), pytest.raises(ValueError, match="FEATHER: stride needs images of one grid"):
            model(tiny.prompt(4, 16, 6))

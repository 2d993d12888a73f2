"""Every corner of the protocol: test doubles inside models, against the unpruned model, single samples and independent routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.doubles import DECODER, ENCODER, Budgets, Depths, Exit, Isolated, Layers, Pivots, PlainGrid, Received  # noqa: E402
from models.tiny import MODELS, llava_inputs  # noqa: E402

FLASH = oracles.register_flash()
IMAGE = [(4, 24)]


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [Pivots(keep=1.0), PlainGrid(share=1.0), Received(keep=(24, 24, 24)), Exit(threshold=1e9), Depths(keep=1.0)]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_keeping_everything_is_bit_equal_to_the_unpruned_model(method: Any, attention: str) -> None:
    model, ids = tiny.llama(attention), tiny.prompt(4, 24, 6)
    dense = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with sieve(model, method, spans=IMAGE):
        ours = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(dense.sequences, ours.sequences)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, ours.logits))


@torch.no_grad()
@pytest.mark.parametrize("method", [Isolated(keep=1.0), Layers(tokens=16), Budgets(total=16)])
def test_encoder_keeping_everything_is_bit_equal_to_the_unpruned_model(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs(2)
    dense = model(**x).logits
    with sieve(model, method):
        assert torch.equal(model(**x).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("method", DECODER)
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_sample_alone(method: Any, attention: str, side: str) -> None:
    """Prompt, then decode steps, on samples with other lengths, one of them text alone."""
    model = tiny.llama(attention)
    rows = [torch.randint(2, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in (34, 28, 12)]
    images: list[Any] = [[(4, 24)], [(2, 17)], []]
    ids, mask = tiny.pad(rows, side)
    spans = [[(s + (ids.shape[1] - row.shape[1] if side == "left" else 0), n) for s, n in image] for row, image in zip(rows, images)]
    with sieve(model, method, spans=spans) as run:
        out = model(ids, attention_mask=mask)
        real, kept = run.output_mask, run.kept
        if side == "left":
            batch = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for b, row in enumerate(rows):
        with sieve(model, method, spans=[images[b]]) as run:
            alone = model(row)
            if images[b]:
                assert [k[0][0].tolist() for k in run.kept] == [k[b][0].tolist() for k in kept]
            visible = run.output_mask[0]
            if side == "left":
                assert batch[b, -4:].tolist() == model.generate(row, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        torch.testing.assert_close(out.logits[b][real[b]], alone.logits[0][visible], rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ENCODER)
def test_encoder_padded_batch_equals_each_prompt_alone(method: Any) -> None:
    model = tiny.llava()
    rows = [torch.cat([tiny.prompt(3, 16, 2), tiny.prompt(2, 16, 5)], 1), tiny.prompt(4, 16, 6, seed=1), tiny.prompt(5, 0, 3, seed=2)]
    ids, mask = tiny.pad(rows, "left")
    values = tiny.pixels(3)
    with sieve(model, method) as run:
        batch = model.generate(input_ids=ids, attention_mask=mask, pixel_values=values, max_new_tokens=5, do_sample=False)
        kept = run.kept[-1]
        beams = model.generate(input_ids=ids, attention_mask=mask, pixel_values=values, max_new_tokens=5, do_sample=False, num_beams=2)
    for b, pixels in enumerate((values[:2], values[2:], None)):
        with sieve(model, method) as run:
            x: dict[str, Any] = {"input_ids": rows[b], "attention_mask": torch.ones_like(rows[b]), "max_new_tokens": 5, "do_sample": False}
            x |= {} if pixels is None else {"pixel_values": pixels}
            alone = model.generate(**x)
            if pixels is not None:
                assert [k.tolist() for k in run.kept[-1][0]] == [k.tolist() for k in kept[b]]
            assert batch[b, -5:].tolist() == alone[0, -5:].tolist()
            assert beams[b, -5:].tolist() == model.generate(**x, num_beams=2)[0, -5:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("method", [*ENCODER, *DECODER])
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_generate_and_a_second_turn_equal_manual_steps(method: Any, make: Any, inputs: Any) -> None:
    model, x = make(), inputs()
    question = tiny.prompt(4, 0, 3, seed=7)
    model(**x)  # transformers installs its own lazy hooks in a first call
    before = oracles.snapshot(model)
    with sieve(model, method) as run:
        first = model.generate(**x, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        history = torch.cat([first.sequences, question], 1)
        y: dict[str, Any] = {"input_ids": history, "attention_mask": torch.ones_like(history), "past_key_values": first.past_key_values}
        second = model.generate(**y, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        out = model(**x)
        lengths = [out.past_key_values.get_seq_length(layer) for layer in range(tiny.LAYERS)]
        assert lengths == list(run.report.tokens) or getattr(method, "masking", False)
        assert min(lengths) < x["input_ids"].shape[1] or getattr(method, "masking", False) or isinstance(method, Exit)
        for token in [*first.sequences[:, -3:].split(1, 1), question]:
            out = model(input_ids=token, past_key_values=out.past_key_values)
        manual = [int(out.logits[0, -1].argmax())]
        while len(manual) < 4:
            out = model(input_ids=torch.tensor([manual[-1:]]), past_key_values=out.past_key_values)
            manual.append(int(out.logits[0, -1].argmax()))
    assert second == manual
    oracles.assert_same(before, oracles.snapshot(model))

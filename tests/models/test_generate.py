"""LLaVA models inside a sieve: generate, several images, second turns, FasterVLM against the shorter prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import FasterVLM, FastV, PyramidDrop  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.tiny import MODELS, llava_inputs  # noqa: E402

PYRAMID = PyramidDrop(layers=(1, 2, 4), keep=(0.5, 0.25, 0.125))
METHODS = [PYRAMID, FastV(), FastV(variant="mask"), FasterVLM(tokens=5)]
FLASH = oracles.register_flash()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_generate_greedy_equals_a_manual_loop(method: Any, make: Any, inputs: Any) -> None:
    model, x = make(), inputs()
    with sieve(model, method):
        generated = model.generate(**x, max_new_tokens=6, do_sample=False)[0, x["input_ids"].shape[1] :].tolist()
        out = model(**x)
        manual = [int(out.logits[0, -1].argmax())]
        while len(manual) < 6:
            out = model(input_ids=torch.tensor([manual[-1:]]), past_key_values=out.past_key_values)
            manual.append(int(out.logits[0, -1].argmax()))
    assert generated == manual


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_generate_on_a_left_padded_batch_equals_each_prompt_alone(method: Any, attention: str) -> None:
    """Two images in one sample, one in another, none in the third."""
    model = tiny.llava(attention)
    rows = [torch.cat([tiny.prompt(3, 16, 2), tiny.prompt(2, 16, 5)], 1), tiny.prompt(4, 16, 6, seed=1), tiny.prompt(5, 0, 3, seed=2)]
    ids, mask = tiny.pad(rows, "left")
    values = tiny.pixels(3)
    with sieve(model, method) as run:
        batch = model.generate(input_ids=ids, attention_mask=mask, pixel_values=values, max_new_tokens=5, do_sample=False)
        kept = run.kept[-1]
    assert [len(sample) for sample in kept] == [2, 1, 0]
    for b, pixels in enumerate((values[:2], values[2:], None)):
        with sieve(model, method) as run:
            x = {} if pixels is None else {"pixel_values": pixels}
            alone = model.generate(input_ids=rows[b], attention_mask=torch.ones_like(rows[b]), **x, max_new_tokens=5, do_sample=False)
            if pixels is not None:
                assert [k.tolist() for k in run.kept[-1][0]] == [k.tolist() for k in kept[b]]
        assert batch[b, -5:].tolist() == alone[0, -5:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_sampling_beams_and_several_sequences(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs(2)
    with sieve(model, method) as run:
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(model.generate(**x, max_new_tokens=5, do_sample=True, temperature=1.5, num_return_sequences=3))
        assert torch.equal(*results)
        kept = run.kept[-1]
        assert [[image.tolist() for image in sample] for sample in kept] == [[image.tolist() for image in kept[0]]] * 3
        beams = model.generate(**x, max_new_tokens=5, num_beams=3, do_sample=False)
        greedy = model.generate(**x, max_new_tokens=5, num_beams=1, do_sample=False)
        lookup = model.generate(**x, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)  # crops the cache
    assert beams.shape == greedy.shape
    assert torch.equal(lookup, greedy)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_second_turn_by_generate_equals_manual_steps(method: Any, make: Any, inputs: Any) -> None:
    """generate() cuts the conversation by the cache's length; where an encoder method shortened the cache the sieve cuts again."""
    model, x = make(), inputs()
    question = tiny.prompt(4, 0, 3, seed=7)
    with sieve(model, method):
        first = model.generate(**x, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        history = torch.cat([first.sequences, question], 1)
        second = model.generate(
            input_ids=history,
            attention_mask=torch.ones_like(history),
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            do_sample=False,
        )[0, -4:].tolist()
        out = model(**x)
        answer = first.sequences[:, -3:]
        for token in answer.split(1, 1):
            out = model(input_ids=token, past_key_values=out.past_key_values)
        out = model(input_ids=question, past_key_values=out.past_key_values)
        manual = [int(out.logits[0, -1].argmax())]
        while len(manual) < 4:
            out = model(input_ids=torch.tensor([manual[-1:]]), past_key_values=out.past_key_values)
            manual.append(int(out.logits[0, -1].argmax()))
    assert second == manual


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_without_a_cache(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs()
    with sieve(model, method):
        cached = model.generate(**x, max_new_tokens=1, do_sample=False)
        bare = model.generate(**x, max_new_tokens=3, do_sample=False, use_cache=False)
    assert bare[0, -3] == cached[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("keep_newlines", [False, True])
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_fastervlm_equals_the_model_on_the_shorter_prompt(make: Any, inputs: Any, keep_newlines: bool) -> None:
    """An independent route: pick the features by CLS attention from eager maps, and give the language model the short prompt."""
    model, x, tokens = make("eager"), inputs(), 5
    with sieve(model, FasterVLM(tokens, keep_newlines)) as run:
        out = model(**x)
        columns, kept = run.output_columns[0], run.kept[0][0][0]
    values = x["pixel_values"].flatten(0, -4)
    attention = model.model.vision_tower(values, output_attentions=True).attentions[-2]
    scores = attention[:, :, 0, 1:].mean(1)
    features = torch.cat(
        model.model.get_image_features(**{k: v for k, v in x.items() if k in ("pixel_values", "image_sizes")}).pooler_output
    )
    if "image_sizes" in x:  # rows 1 and 2 of each crop's 4 are in the prompt, each mosaic row ends with a newline
        inner = torch.arange(4, 12)
        best = [scores[0].topk(tokens)[1], *(inner[scores[c][inner].topk(tokens)[1]] for c in (1, 2))]
        wanted = best[0].sort()[0].tolist()
        for row in (1, 2):
            for crop in (1, 2):
                wanted += [16 + (row - 1) * 9 + (crop - 1) * 4 + p % 4 for p in best[crop].sort()[0].tolist() if p // 4 == row]
            wanted += [16 + (row - 1) * 9 + 8] if keep_newlines else []
    else:
        wanted = scores[0].topk(tokens)[1].sort()[0].tolist()
    assert kept.tolist() == wanted
    embeds = model.get_input_embeddings()(x["input_ids"])
    embeds[0, 4 : 4 + len(features)] = features
    short = embeds[:, columns]
    assert columns.tolist() == [*range(4), *(4 + p for p in wanted), *range(4 + len(features), embeds.shape[1])]
    dense = model.lm_head(model.model.language_model(inputs_embeds=short).last_hidden_state)
    torch.testing.assert_close(out.logits, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adjacent_images_are_told_apart() -> None:
    model = tiny.llava()
    ids = tiny.prompt(3, 32, 4)
    with sieve(model, FasterVLM(tokens=5)) as run:
        model(input_ids=ids, pixel_values=tiny.pixels(2))
    assert [len(image) for image in run.kept[0][0]] == [5, 5]
    assert all(int(image.max()) < 16 for image in run.kept[0][0])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_pictures_of_different_sizes_in_one_batch_equal_each_alone(method: Any) -> None:
    """Any resolution: 34 and 88 image tokens, so crops, budgets and padding all differ."""
    model, first = tiny.llava_next(), tiny.next_inputs()
    generator = torch.Generator().manual_seed(6)
    ids = tiny.prompt(4, 88, 6, seed=3)  # a 31 x 31 picture: a thumbnail and 2 x 2 crops, 16 + 8 * (8 + 1) tokens
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second |= {"pixel_values": torch.randn(1, 5, 3, 16, 16, generator=generator), "image_sizes": torch.tensor([[31, 31]])}
    both: dict[str, torch.Tensor] = dict(zip(("input_ids", "attention_mask"), tiny.pad([first["input_ids"], ids], "left")))
    crops = torch.nn.functional.pad(first["pixel_values"], (0, 0, 0, 0, 0, 0, 0, 2))
    both |= {"pixel_values": torch.cat([crops, second["pixel_values"]])}
    both |= {"image_sizes": torch.cat([first["image_sizes"], second["image_sizes"]])}
    with sieve(model, method) as run:
        batch = model.generate(**both, max_new_tokens=5, do_sample=False)
        kept = run.kept[-1]
        for b, inputs in enumerate((first, second)):
            alone = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            assert batch[b, -5:].tolist() == alone[0, -5:].tolist()
            assert [image.tolist() for image in kept[b]] == [image.tolist() for image in run.kept[-1][0]]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_and_inference_mode(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), sieve(model, method):
        assert model(**x).logits.dtype == torch.bfloat16
    with sieve(model, method):
        wanted = model.generate(**x, max_new_tokens=3, do_sample=False)
        with torch.inference_mode():
            assert torch.equal(model.generate(**x, max_new_tokens=3, do_sample=False), wanted)

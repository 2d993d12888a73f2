"""Every corner of the protocol for methods: test doubles inside models, alone and in batches, in generate, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import DecoderMethod, FastV, PyramidDrop, Stage  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.doubles import DECODER, ENCODER, Depths, EncoderNotes, Exit, Layers, Merging, Notes, Pivots, PlainGrid, Received  # noqa: E402
from models.tiny import MODELS  # noqa: E402

FLASH = oracles.register_flash()
IMAGE = [(4, 24)]
PYRAMID = PyramidDrop((1, 3), (0.5, 0.2))


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


@torch.no_grad()
@pytest.mark.parametrize("method", [PlainGrid(), Received(masking=True), FastV(variant="mask", rerank=True), PYRAMID])
def test_a_rearranged_cache_of_a_padded_batch_goes_on_as_before(method: Any) -> None:
    """By hand, what beam search does: other order, repeated samples, samples left out; and a copy of the cache is its own."""
    model, later = tiny.llama(), tiny.prompt(3, 0, 0, seed=9)
    rows = [torch.randint(2, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in (34, 28, 12)]
    ids, mask = tiny.pad(rows, "left")
    with sieve(model, method, spans=[[(4, 24)], [(8, 17)], []]):

        def steps(cache: Any, order: list[int]) -> torch.Tensor:
            padding, logits = mask[order], []
            for i in range(3):
                padding = torch.nn.functional.pad(padding, (0, 1), value=1)
                logits.append(model(later[:, i : i + 1].expand(len(order), -1), attention_mask=padding, past_key_values=cache).logits)
            return torch.cat(logits, 1)

        def prompt() -> Any:
            return model(ids, attention_mask=mask).past_key_values

        wanted = steps(prompt(), [0, 1, 2])
        cache = prompt()
        copied = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        torch.testing.assert_close(steps(cache, [2, 0, 1]), wanted[[2, 0, 1]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(steps(copied, [0, 1, 2]), wanted, rtol=1e-4, atol=1e-5)
        cache = prompt()
        cache.batch_repeat_interleave(2)
        torch.testing.assert_close(steps(cache, [0, 0, 1, 1, 2, 2]), wanted[[0, 0, 1, 1, 2, 2]], rtol=1e-4, atol=1e-5)
        cache = prompt()
        cache.batch_select_indices(torch.tensor([1, 2]))
        torch.testing.assert_close(steps(cache, [1, 2]), wanted[[1, 2]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", [FastV(ratio=0.6), PYRAMID, *DECODER])
@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_of_a_padded_batch_equal_each_prompt_alone(method: Any, num_beams: int) -> None:
    model, options = tiny.llama(), {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    rows = [torch.randint(2, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in (34, 28, 12)]
    images: list[Any] = [[(4, 24)], [(2, 17)], []]
    ids, mask = tiny.pad(rows, "left")
    with sieve(model, method, spans=[[(4, 24)], [(8, 17)], []]):
        batch = model.generate(ids, attention_mask=mask, **options)
    for b, row in enumerate(rows):
        with sieve(model, method, spans=[images[b]]):
            assert batch[b, -6:].tolist() == model.generate(row, **options)[0, -6:].tolist()


@torch.no_grad()
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_notes_change_nothing_and_are_there_afterwards(make: Any, inputs: Any) -> None:
    model, x = make(), inputs()
    dense = model(**x, output_hidden_states=True)
    with sieve(model, Notes()) as run:
        assert torch.equal(model(**x).logits, dense.logits)
        assert torch.equal(run.state["stage 1"], dense.hidden_states[3].abs().amax(2))
        assert torch.equal(run.state["images"] == 0, x["input_ids"] == tiny.IMAGE)
    eager = make("eager").model.vision_tower(x["pixel_values"].flatten(0, -4), output_attentions=True).attentions
    with sieve(model, EncoderNotes()) as run:
        assert torch.equal(model(**x).logits, dense.logits)
        for ours, layer in zip(run.state["scores"], (0, 2)):
            torch.testing.assert_close(ours, eager[layer][:, :, 0, 1:].mean(1), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_select_that_breaks_its_promise_is_told_so() -> None:
    """Padding of the mosaic does not reach the language model: a method that picks it anyway keeps fewer than it says."""

    class Careless(Merging):
        def select(self, view: Any) -> torch.Tensor:
            return torch.arange(4).expand(view.patches.shape[0], -1)

    class Greedy(Pivots):
        def select(self, view: Any) -> torch.Tensor:
            return view.topk(view.hidden[..., 0].contiguous(), view.images)

    model = tiny.llava_next()
    wanted = r"Careless.select must keep the \[12\] image tokens of its images that keep_count says, got \[4\]"
    with sieve(model, Careless()), pytest.raises(ValueError, match=wanted):
        model(**tiny.next_inputs())
    plain = tiny.llama()
    with sieve(plain, Greedy(), spans=IMAGE), pytest.raises(ValueError, match=r"Greedy.select must keep the \[12\].*got \[24\]"):
        plain(tiny.prompt(4, 24, 6))


@torch.no_grad()
def test_neighbouring_spans_are_images_of_their_own() -> None:
    model, ids = tiny.llama(), torch.randint(2, 90, (1, 34), generator=torch.Generator().manual_seed(1))
    with sieve(model, Notes(), spans=[(4, 10), (14, 10), (24, 4)]) as run:
        model(ids)
        assert run.state["images"][0].tolist() == [-1] * 4 + [0] * 10 + [1] * 10 + [2] * 4 + [-1] * 6
        assert [len(image) for image in run.kept[0][0]] == [10, 10, 4]


def test_stages_that_cannot_be_are_refused() -> None:
    class Odd(Pivots):
        given: tuple[Any, ...] = ()

        @property
        def stages(self) -> tuple[Stage, ...]:
            return self.given

    for stages, rule in (
        ((Stage(2, 1), Stage(2, 2)), "layers of stages must increase"),
        ((Stage(2, 1), Stage(4, 1)), r"source must be None or a layer in \[2, 4\]"),
        ((Stage(2, 3),), r"source must be None or a layer in \[0, 2\]"),
        ((Stage(1, until=3), Stage(2)), "must not begin before the tokens of the stage before are back"),
        ((Stage(1, until=9),), r"until must be None or a layer in \[2, 4\]"),
        ((Stage(1, 0, rows="first"),), "rows must be 'last' or 'all'"),
        ((Stage(7),), r"drops before layers \[7\]"),
    ):
        Odd.given = stages
        with pytest.raises(ValueError, match=rf"tokensieve.sieve: Odd:? .*{rule}"):
            sieve(tiny.llama(), Odd(), spans=IMAGE)

    class Unread(DecoderMethod):
        stages = (Stage(2),)

    with pytest.raises(ValueError, match="a method without select ranks by attention after RoPE"):
        sieve(tiny.llama(), Unread(), spans=IMAGE)
    with pytest.raises(ValueError, match=r"Layers reads encoder layers \[9\], the encoder has layers 0..3"):
        sieve(tiny.llava(), Layers(read=(9,)))

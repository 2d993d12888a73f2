"""Every corner of the protocol: test doubles inside models, against the unpruned model, single samples and independent routes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import FastV, PyramidDrop  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.doubles import DECODER, ENCODER, Budgets, Depths, Exit, Isolated, Layers, Pivots, PlainGrid, Received, Recycling  # noqa: E402
from models.tiny import MODELS, llava_inputs  # noqa: E402

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
@pytest.mark.parametrize("method", [Received(), PlainGrid(), Pivots(), FastV(ratio=0.5), PYRAMID, Exit(-1e9), Depths()])
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_own_select_equals_the_full_model_that_masks_what_was_dropped(method: Any, attention: str) -> None:
    """Positions kept: from each stage on the full model hides the keys that are gone, layer by layer."""
    if isinstance(method, PyramidDrop):
        method = dataclasses.replace(method, renumber=False)
    model, full, ids = tiny.llama(attention), tiny.llama("eager"), torch.randint(2, 90, (1, 34), generator=torch.Generator().manual_seed(1))
    with sieve(model, method, spans=IMAGE) as run:
        out = model(ids, use_cache=True)
        steps = [model(torch.tensor([[7 + i]]), past_key_values=out.past_key_values).logits for i in range(2)]
        columns, kept = run.output_columns[0], [k[0][0] for k in run.kept]
        tokens = run.report.tokens
    whole = torch.cat([ids, torch.tensor([[7, 8]])], 1)
    stages = method.stages
    if isinstance(method, Depths):
        wanted = _depths(full, whole, stages, kept)
        assert tokens == (34, 22, 22, 22, 34)
    else:
        visible = torch.ones(tiny.LAYERS, 36, dtype=torch.bool)
        for stage, patches in zip(stages, kept):
            visible[stage.layer :, 4:28] = False
            visible[stage.layer :, 4 + patches] = True
        with oracles.hidden_keys_of_each_layer(full, visible):
            wanted = full(whole).logits
        assert list(tokens) == [int(row.sum()) - 2 for row in visible]
    torch.testing.assert_close(out.logits, wanted[:, columns], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat(steps, 1), wanted[:, 34:], rtol=1e-4, atol=2e-5)


def _depths(full: Any, whole: torch.Tensor, stages: Any, kept: Any) -> torch.Tensor:
    """Mixture of depths on the full model: every layer runs on all tokens, but what skips is no key and keeps its hidden state."""
    handles: list[Any] = []
    saved: dict[int, torch.Tensor] = {}
    for stage, patches in zip(stages, kept):
        stays = torch.ones(36, dtype=torch.bool)
        stays[4:28] = False
        stays[4 + patches] = True
        bias = torch.zeros(1, 1, 36, 36).masked_fill(~(torch.ones(36, 36).tril().bool() & stays), torch.finfo(torch.float32).min)
        for layer in range(stage.layer, stage.until):

            def before(_module: Any, args: Any, kwargs: Any, bias: Any = bias, layer: int = layer) -> Any:
                saved[layer] = args[0]
                return args, {**kwargs, "attention_mask": bias}

            def after(_module: Any, _args: Any, output: Any, stays: Any = stays, layer: int = layer) -> Any:
                return torch.where(stays[:, None], output, saved[layer])

            handles.append(full.model.layers[layer].register_forward_pre_hook(before, with_kwargs=True))
            handles.append(full.model.layers[layer].register_forward_hook(after))
    try:
        return full(whole).logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # flash attention gives rows that are hidden no output
def test_hiding_ranks_with_all_rows_as_attention_maps_do(attention: str) -> None:
    """Rows that were hidden still rank (ghosts), and their keys count no more: read from the maps of an eager model."""
    model, full = tiny.llama(attention), tiny.llama("eager")
    ids = torch.randint(2, 90, (1, 34), generator=torch.Generator().manual_seed(1))
    with sieve(model, Received(masking=True), spans=IMAGE) as run:
        logits = model(ids).logits
        kept = [k[0][0].tolist() for k in run.kept]
        assert run.report.tokens == (34,) * tiny.LAYERS
    visible = torch.ones(tiny.LAYERS, 34, dtype=torch.bool)
    for number, layer in enumerate((2, 3, 4)):
        with oracles.hidden_keys_of_each_layer(full, visible):
            weights = full(ids, output_attentions=True).attentions[layer - 1][0]
        scores = weights.mean((0, 1))[4:28].masked_fill(~visible[layer, 4:28], -1)
        chosen = scores.topk((12, 6, 0)[number])[1].sort()[0]
        assert kept[number] == chosen.tolist()
        visible[layer:, 4:28] = False
        visible[layer:, 4 + chosen] = True
    with oracles.hidden_keys_of_each_layer(full, visible):
        torch.testing.assert_close(logits, full(ids).logits, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_samples_leave_by_a_gate_at_their_own_layers() -> None:
    model = tiny.llama()
    rows = [torch.randint(2, 90, (1, 34), generator=torch.Generator().manual_seed(n)) for n in range(6)]
    values = []
    for row in rows:
        states = model(row, output_hidden_states=True).hidden_states
        values.append([float(state[0, -1].mean()) for state in states[1:5]])
    limit = sorted(v for value in values for v in value)[-4]  # a few gates fire
    with sieve(model, Exit(threshold=limit), spans=IMAGE) as run:
        model(torch.cat(rows))
        kept = run.kept
    first = [next((layer for layer, v in enumerate(value) if v > limit), None) for value in values]
    assert len(set(first)) > 1, "the seeds no longer tell gates apart"
    for b, layer in enumerate(first):
        assert [len(stage[b][0]) for stage in kept] == [24 if layer is None or s < layer else 0 for s in range(4)]


@torch.no_grad()
def test_recycled_tokens_follow_the_kept_ones() -> None:
    """One prompt by hand: the short sequence through the layers that are left, with the mean of the dropped tokens after the kept ones."""
    model, ids = tiny.llama("eager"), torch.randint(2, 90, (1, 34), generator=torch.Generator().manual_seed(1))
    with sieve(model, Recycling(), spans=IMAGE) as run:
        logits, columns = model(ids).logits, run.output_columns[0].tolist()
    states = model(ids, output_hidden_states=True, output_attentions=True)
    embedded, hidden, weights = states.hidden_states[0][0], states.hidden_states[2][0], states.attentions[1][0].mean(0)
    text = [*range(4), *range(28, 34)]
    rater = text[int((embedded[text] @ embedded[4:28].mean(0)).argmax())]
    best = (4 + weights[rater, 4:28].topk(7)[1]).tolist()
    assert columns == [0, 1, 2, 3, *best, *range(28, 34)]
    gone = [c for c in range(4, 28) if c not in best]
    sequence = torch.cat([hidden[:4], hidden[best[:6]], hidden[gone].mean(0, keepdim=True), hidden[28:]])[None]
    bias = torch.full((17, 17), torch.finfo(torch.float32).min).triu(1)[None, None]
    rope = model.model.rotary_emb(sequence, torch.arange(17)[None])
    for layer in model.model.layers[2:]:
        sequence = layer(sequence, attention_mask=bias, position_embeddings=rope)
    torch.testing.assert_close(logits, model.lm_head(model.model.norm(sequence)), rtol=1e-4, atol=2e-5)

"""Decoder methods with their own select, against the unpruned model with masks and layers run by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import DecoderMethod, FastV, PyramidDrop  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.doubles import Depths, Early, Exit, Pivots, PlainGrid, Received, Recycling  # noqa: E402

FLASH = oracles.register_flash()
IMAGE = [(4, 24)]
PYRAMID = PyramidDrop((1, 3), (0.5, 0.2))


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


@torch.no_grad()
def test_the_default_select_is_what_the_fused_op_does() -> None:
    class Slow(FastV):
        def select(self, view: Any) -> Any:
            return DecoderMethod.select(self, view)

    for fast, slow in ((FastV(), Slow()), (FastV(normalize="range"), Slow(normalize="range"))):
        results = []
        for method in (fast, slow):
            with sieve(tiny.llama(), method, spans=IMAGE) as run:
                logits = run._parts.model(torch.randint(2, 90, (2, 34), generator=torch.Generator().manual_seed(1))).logits
                results.append((logits, [k.tolist() for sample in run.kept[0] for k in sample]))
        assert results[0][1] == results[1][1]
        assert torch.equal(results[0][0], results[1][0])


def test_training_through_skipped_layers_reaches_the_router() -> None:
    """Gradients of the loss through tokens that skip layers equal those of the full model with masks."""
    ids = torch.randint(2, 90, (1, 36), generator=torch.Generator().manual_seed(1))
    model, full, method = tiny.llama(), tiny.llama("eager"), Depths()
    with sieve(model, method, spans=IMAGE) as run:
        model(ids).logits.square().mean().backward()
        kept = [k[0][0] for k in run.kept]
    _depths(full, ids, method.stages, kept).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), full.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("method", [Received(), Received(masking=True), PlainGrid(), Pivots(), Exit(-1e9), Early(renumber=False)])
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_a_second_turn_with_another_image_equals_masks_on_the_full_model(method: Any, attention: str) -> None:
    """Keys of the first turn are in the cache, other ones in every layer; then a decode step."""
    if attention == FLASH and method.masking:
        pytest.skip("flash attention gives rows that are hidden no output")
    model, full = tiny.llama(attention), tiny.llama("eager")
    ids = torch.randint(2, 90, (1, 60), generator=torch.Generator().manual_seed(3))
    visible = torch.ones(tiny.LAYERS, 61, dtype=torch.bool)
    with sieve(model, method) as run:
        cache, logits = None, []
        for start, end, image in ((0, 34, (4, 24)), (34, 60, (38, 18))):
            run.set_images(spans=[image])
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append((start + run.output_columns[0], out.logits[0]))
            for stage, patches in zip(method.stages, [k[0][0] for k in run.kept]):
                visible[stage.layer :, image[0] : sum(image)] = False
                visible[stage.layer :, image[0] + patches] = True
        step = model(torch.tensor([[7]]), past_key_values=cache).logits
    assert any(0 < int(row[38:56].sum()) < 18 for row in visible) or isinstance(method, Exit)
    with oracles.hidden_keys_of_each_layer(full, visible):
        wanted = full(torch.cat([ids, torch.tensor([[7]])], 1), output_attentions=True)
    for columns, got in logits:
        torch.testing.assert_close(got, wanted.logits[0, columns], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(step[0, 0], wanted.logits[0, 60], rtol=1e-4, atol=2e-5)
    if isinstance(method, Received) and method.masking:  # what the second turn's rows, hidden ones too, attend to in layer 1
        scores = wanted.attentions[1][0, :, 34:60, 38:56].mean((0, 1))
        assert visible[2, 38:56].nonzero()[:, 0].tolist() == scores.topk(12)[1].sort()[0].tolist()

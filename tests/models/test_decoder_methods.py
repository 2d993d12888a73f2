"""PyramidDrop and FastV inside decoders, against the unpruned model and its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import FastV, PyramidDrop  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402

FLASH = oracles.register_flash()
PYRAMID = PyramidDrop(layers=(1, 2, 4), keep=(0.5, 0.25, 0.125))
METHODS = [PYRAMID, PyramidDrop((1, 3), (0.6, 0.3), renumber=False, normalize="range"), FastV(), FastV(layer=3, ratio=0.75, renumber=True)]
IMAGE = [(4, 24)]


def lengths(cache: Any) -> list[int]:
    return [cache.get_seq_length(layer) for layer in range(tiny.LAYERS)]


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.llama, tiny.qwen2])
@pytest.mark.parametrize("method", [PyramidDrop((1, 2), (1.0, 1.0)), FastV(ratio=0.0), FastV(ratio=0.0, variant="mask")])
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_keep_everything_is_bit_equal_to_the_unpruned_model(make: Any, method: Any, attention: str) -> None:
    model, ids = make(attention), tiny.prompt(4, 24, 6)
    dense = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with sieve(model, method, spans=IMAGE):
        ours = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(dense.sequences, ours.sequences)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, ours.logits))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_text_only_prompt_is_bit_equal_to_the_unpruned_model(method: Any) -> None:
    model, ids = tiny.llama(), tiny.prompt(5, 0, 6)
    dense = model(ids).logits
    with sieve(model, method, spans=[]):
        assert torch.equal(model(ids).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_fastv_equals_the_full_model_that_masks_the_dropped_keys(attention: str, kv_heads: int) -> None:
    """Prompt, two decode steps and a second turn on the same cache, in one sequence of the masked full model."""
    model, ids, later = tiny.llama(attention, kv_heads), tiny.prompt(4, 24, 6), tiny.prompt(3, 0, 4, seed=9)
    full = tiny.llama("eager", kv_heads)
    with sieve(model, FastV(layer=2, ratio=0.75), spans=IMAGE) as run:
        out = model(ids, use_cache=True)
        cache, columns = out.past_key_values, run.output_columns
        assert lengths(cache) == [34, 34, 16, 16, 16]
        assert run.positions[2].tolist() == columns.tolist()
        assert run.positions[1].tolist() == [list(range(34))]
        steps = [model(later[:, i : i + 1], past_key_values=cache).logits for i in range(2)]
        assert [p.tolist() for p in run.positions] == [[[35]]] * tiny.LAYERS
        steps.append(model(later[:, 2:], past_key_values=cache).logits)
        assert lengths(cache) == [41, 41, 23, 23, 23]
    visible = torch.zeros(1, 41, dtype=torch.bool).index_fill_(1, torch.cat([columns[0], torch.arange(34, 41)]), True)
    with oracles.hidden_keys(full, 2, visible):
        wanted = full(torch.cat([ids, later], 1)).logits
    torch.testing.assert_close(out.logits, wanted[:, columns[0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(steps, 1), wanted[:, 34:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_fastv_mask_variant_equals_compact_on_the_survivors(attention: str) -> None:
    model, ids, later = tiny.qwen2(attention), tiny.prompt(4, 24, 6), tiny.prompt(3, 0, 0, seed=9)
    outputs = {}
    for variant in ("compact", "mask"):
        with sieve(model, FastV(variant=variant), spans=IMAGE) as run:
            out = model(ids)
            steps = [model(later[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(3)]
            outputs[variant] = (out, torch.cat(steps, 1), run.kept[0][0][0], run.output_columns[0])
    (compact, steps, kept, columns), (masked, masked_steps, masked_kept, _) = outputs.values()
    assert torch.equal(kept, masked_kept)
    assert lengths(masked.past_key_values) == [37] * 5
    torch.testing.assert_close(masked.logits[:, columns], compact.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked_steps, steps, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fastv_rerank_chooses_as_a_run_without_a_cache_does() -> None:
    """Layer 0 is dense, so the newest token ranks with the same queries and keys with and without a cache."""
    model, ids, later = tiny.llama(), tiny.prompt(4, 24, 6), tiny.prompt(3, 0, 0, seed=9)
    choices = []
    with sieve(model, FastV(layer=1, variant="mask", rerank=True, ratio=0.75), spans=IMAGE) as run:
        cache = model(ids).past_key_values
        for i in range(3):
            model(later[:, i : i + 1], past_key_values=cache)
            choices.append(cache._tokensieve_held.groups[1].valid[0, 4:28].nonzero()[:, 0].tolist())
        for i in range(3):
            model(torch.cat([ids, later[:, : i + 1]], 1), use_cache=False)
            assert run.kept[0][0][0].tolist() == choices[i]
    assert all(len(choice) == 6 for choice in choices)
    assert choices[0] != choices[2]  # else this test could not tell ranking again from a frozen choice


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [tiny.llama, tiny.qwen2])
def test_attention_back_ends_agree(method: Any, make: Any) -> None:
    ids, results = tiny.prompt(4, 24, 6), []
    for attention in ("eager", "sdpa", FLASH):
        model = make(attention)
        with sieve(model, method, spans=IMAGE) as run:
            out = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
            results.append((torch.stack(out.logits), [k[0][0].tolist() for k in run.kept]))
    for logits, kept in results[1:]:
        assert kept == results[0][1]
        torch.testing.assert_close(logits, results[0][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_sample_alone(method: Any, attention: str, side: str) -> None:
    """Different lengths, image sizes and places, and one text-only sample; then two decode steps and a padded second turn."""
    model = tiny.llama(attention, kv_heads=2)
    layout = [(4, 24, 6), (2, 17, 3), (9, 0, 2), (3, 8, 12)]
    rows = [tiny.prompt(*sizes, seed=i) for i, sizes in enumerate(layout)]
    spans = [[(before, image)] if image else [] for before, image, _ in layout]
    ids, mask = tiny.pad(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    later = torch.stack([tiny.prompt(5, 0, 0, seed=20 + i)[0] for i in range(4)])
    counts = [5, 3, 5, 4]  # tokens of each sample's second turn
    turn, turn_mask = tiny.pad([row[None, :n] for row, n in zip(later, counts)], side)
    with sieve(model, method, spans=_shifted(spans, mask, side)) as run:
        out = model(ids, attention_mask=mask, position_ids=positions)
        kept, out_mask, cache, total = run.kept, run.output_mask, out.past_key_values, mask
        steps = []
        for i in range(2):
            total = torch.cat([total, torch.ones(4, 1, dtype=torch.long)], 1)
            position = total.sum(1, keepdim=True) - 1
            steps.append(model(later[:, i : i + 1], attention_mask=total, position_ids=position, past_key_values=cache).logits)
        seen = total.sum(1, keepdim=True)
        total = torch.cat([total, turn_mask], 1)
        position = (seen + turn_mask.cumsum(1) - 1) * turn_mask
        second = model(turn, attention_mask=total, position_ids=position, past_key_values=cache).logits
    for b, row in enumerate(rows):
        with sieve(model, method, spans=spans[b]) as alone:
            single = model(row)
            torch.testing.assert_close(out.logits[b][out_mask[b]], single.logits[0], rtol=2e-4, atol=2e-5)
            assert [[k.tolist() for k in stage[b]] for stage in kept] == [
                [k.tolist() for k in stage[0]] for stage in _kept(alone, spans[b], method)
            ]
            for i in range(2):
                step = model(later[b : b + 1, i : i + 1], past_key_values=single.past_key_values).logits
                torch.testing.assert_close(steps[i][b], step[0], rtol=2e-4, atol=2e-5)
            answer = model(later[b : b + 1, : counts[b]], past_key_values=single.past_key_values).logits[0]
            torch.testing.assert_close(second[b][turn_mask[b].bool()], answer, rtol=2e-4, atol=2e-5)


def _shifted(spans: list[Any], mask: torch.Tensor, side: str) -> list[Any]:
    shift = (mask.shape[1] - mask.sum(1)).tolist() if side == "left" else [0] * len(spans)
    return [[(start + by, n) for start, n in sample] for sample, by in zip(spans, shift)]


def _kept(run: Any, spans: Any, method: Any) -> Any:
    return run.kept if spans else [[[]] for _ in method.stages]


@torch.no_grad()
def test_left_padding_without_position_ids_works_too() -> None:
    """transformers then counts positions through the padding; only relative positions matter."""
    model, rows = tiny.llama(), [tiny.prompt(4, 24, 6), tiny.prompt(2, 24, 3, seed=1)]
    ids, mask = tiny.pad(rows, "left")
    with sieve(model, PYRAMID, spans=_shifted([[(4, 24)], [(2, 24)]], mask, "left")):
        out = model(ids, attention_mask=mask)
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        step = model(torch.tensor([[5], [6]]), attention_mask=more, past_key_values=out.past_key_values).logits
    for b, (row, start) in enumerate(zip(rows, (4, 2))):
        with sieve(model, PYRAMID, spans=[(start, 24)]):
            single = model(row)
            torch.testing.assert_close(out.logits[b, -1], single.logits[0, -1], rtol=2e-4, atol=2e-5)
            one = model(torch.tensor([[5 + b]]), past_key_values=single.past_key_values).logits
            torch.testing.assert_close(step[b], one[0], rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_pyramiddrop_cache_lengths_and_positions() -> None:
    model, ids = tiny.llama(), tiny.prompt(4, 24, 6)
    with sieve(model, PYRAMID, spans=IMAGE) as run:
        cache = model(ids).past_key_values
        assert lengths(cache) == [34, 22, 16, 16, 13]
        assert [p[0, -1].item() for p in run.positions] == [33, 21, 15, 15, 12]
        model(ids[:, :1], past_key_values=cache)
        assert [p[0, -1].item() for p in run.positions] == [34, 22, 16, 16, 13]
        assert [len(stage[0][0]) for stage in run.kept] == [12, 6, 3]
    with sieve(model, PyramidDrop((1, 2, 4), (0.5, 0.25, 0.125), renumber=False), spans=IMAGE) as run:
        cache = model(ids).past_key_values
        assert [p[0, -1].item() for p in run.positions] == [33] * 5
        model(ids[:, :1], past_key_values=cache)
        assert [p[0, -1].item() for p in run.positions] == [34] * 5


@torch.no_grad()
def test_report_counts_tokens_and_flops() -> None:
    model, ids = tiny.llama(), tiny.prompt(4, 24, 6)
    with sieve(model, PYRAMID, spans=IMAGE) as run:
        model(ids)
    report = run.report
    assert report.tokens == (34, 22, 16, 16, 13)
    assert report.image_tokens == (24, 12, 6, 6, 3)
    assert report.dense_tokens == (34,) * 5
    assert report.dense_flops[0] == report.flops[0] > report.flops[1] > report.flops[4]
    assert len(report.prune_seconds) == 3
    assert all(s > 0 for s in report.prune_seconds)
    assert "PyramidDrop" in str(report)
    assert 0.3 < report.saved < 0.6


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_several_images_share_one_budget(method: Any) -> None:
    model = tiny.llama()
    ids = torch.cat([tiny.prompt(3, 12, 4), tiny.prompt(1, 20, 5, seed=2)], 1)
    with sieve(model, method, spans=[(3, 12), (20, 20)]) as run:
        out = model(ids)
        for stage, images in enumerate(run.kept):
            assert sum(len(image) for image in images[0]) == method.keep_count(stage, 32)
        assert all(image.min() >= 0 and image.max() < n for image, n in zip(images[0], (12, 20)) if len(image))
        assert out.logits.shape[1] == 45 - 32 + method.keep_count(stage, 32)
    mask = torch.zeros(1, 45, dtype=torch.bool)
    mask[:, 3:15] = mask[:, 20:40] = True
    with sieve(model, method, image_mask=mask):
        assert torch.equal(model(ids).logits, out.logits)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_image_in_a_later_turn_is_pruned_too(method: Any) -> None:
    """The second image ranks against everything that the layer's cache holds; layer by layer lengths follow."""
    model, first, second = tiny.llama(), tiny.prompt(4, 24, 6), tiny.prompt(2, 16, 3, seed=4)
    with sieve(model, method, spans=[(4, 24), (36, 16)]) as run:
        cache = model(first).past_key_values
        before = lengths(cache)
        model(second, past_key_values=cache)
        assert [len(stage[0][0]) for stage in run.kept] == [method.keep_count(s, 16) for s in range(len(method.stages))]
        groups = [sum(stage.layer <= layer for stage in method.stages) for layer in range(tiny.LAYERS)]
        added = [21 if g == 0 else 5 + method.keep_count(g - 1, 16) for g in groups]
        assert lengths(cache) == [a + b for a, b in zip(before, added)]
        if method.renumber:
            assert [int(p.max()) + 1 for p in run.positions] == lengths(cache)


@torch.no_grad()
def test_max_length_cuts_long_samples() -> None:
    model, ids = tiny.llama(), tiny.prompt(4, 24, 6)
    with sieve(model, PyramidDrop((1, 2), (0.5, 0.25), max_length=12), spans=IMAGE) as run:
        out = model(ids)
        assert lengths(out.past_key_values) == [34, 12, 10, 10, 10]  # 4 text + 8 of 12 kept; then 6 of those 8
        assert run.output_columns[0, :4].tolist() == [0, 1, 2, 3]
        assert [len(stage[0][0]) for stage in run.kept] == [8, 6]

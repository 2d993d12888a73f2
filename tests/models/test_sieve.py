"""The context manager itself: restoring the model, errors, generate, training, LLaVA models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import FasterVLM, FastV, PyramidDrop  # noqa: E402
from tokensieve.models import attach, detach, sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402

PYRAMID = PyramidDrop(layers=(1, 2, 4), keep=(0.5, 0.25, 0.125))
METHODS = [PYRAMID, FastV(), FastV(variant="mask"), FasterVLM(tokens=5)]
FLASH = oracles.register_flash()


def llava_inputs(images: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.cat([tiny.prompt(4, 16, 6, seed=i) for i in range(images)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.pixels(images)}


def next_inputs() -> dict[str, torch.Tensor]:
    ids = tiny.prompt(4, 34, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tiny.next_inputs()}


MODELS = [(tiny.llava, llava_inputs), (tiny.llava_next, next_inputs)]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
@pytest.mark.parametrize("failing", [False, True])
def test_model_is_exactly_as_before(method: Any, make: Any, inputs: Any, failing: bool) -> None:
    model, x = make(), inputs()
    dense = model(**x).logits
    before = oracles.snapshot(model)
    if failing:
        broken = model.model.language_model.layers[3].mlp.register_forward_pre_hook(_explode)
        with pytest.raises(ZeroDivisionError), sieve(model, method):
            model(**x)
        broken.remove()
    else:
        with sieve(model, method):
            assert model(**x).logits.shape[1] <= dense.shape[1]
    oracles.assert_same(before, oracles.snapshot(model))
    assert torch.equal(model(**x).logits, dense)


def _explode(*_: Any) -> None:
    raise ZeroDivisionError


@torch.no_grad()
def test_a_call_that_failed_leaves_the_sieve_usable() -> None:
    model, x = tiny.llava(), llava_inputs()
    with sieve(model, PYRAMID) as run:
        first = model(**x).logits
        broken = model.model.language_model.layers[2].self_attn.register_forward_pre_hook(_explode)
        with pytest.raises(ZeroDivisionError):
            model(**x)
        broken.remove()
        assert torch.equal(model(**x).logits, first)
        assert run.report.tokens == (26, 18, 14, 14, 12)


def test_attach_and_detach() -> None:
    model = tiny.llava()
    with torch.no_grad():
        model(**llava_inputs())  # transformers installs its own lazy hooks in a first call
        before = oracles.snapshot(model)
        run = attach(model, PYRAMID)
        model(**llava_inputs())
    detach(run)
    detach(run)
    oracles.assert_same(before, oracles.snapshot(model))
    assert run.report.tokens[-1] == 12


def test_nested_and_repeated_use_are_errors_that_say_so() -> None:
    model = tiny.llava()
    with sieve(model, PYRAMID) as run:
        with pytest.raises(RuntimeError, match=r"already inside a sieve with PyramidDrop.*can't be nested"), sieve(model, FastV()):
            pass
        with pytest.raises(RuntimeError, match="already inside"), sieve(model.model.language_model, FastV()):
            pass
        with pytest.raises(RuntimeError, match="used once, this one is attached"):
            run.__enter__()
    with pytest.raises(RuntimeError, match="used once, this one is finished"):
        run.__enter__()
    with sieve(model, FastV()):  # one after the other is fine
        pass


def test_unsupported_models_and_methods_are_named() -> None:
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(TypeError, match=r"must be one of LlavaForConditionalGeneration.*got GPT2LMHeadModel"):
        sieve(gpt, FastV())
    sliding = transformers.Qwen2Config(**tiny.TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(TypeError, match="full attention in every layer, got Qwen2Model with sliding_attention"):
        sieve(transformers.Qwen2Model(sliding), FastV())
    gemma = transformers.GemmaConfig(**tiny.TEXT, head_dim=8, num_key_value_heads=2)
    inside = transformers.LlavaConfig(vision_config=tiny._vision(), text_config=gemma, image_token_id=90)
    with pytest.raises(TypeError, match="got LlavaForConditionalGeneration with a GemmaModel inside"):
        sieve(transformers.LlavaForConditionalGeneration(inside), FastV())
    with pytest.raises(TypeError, match=r"FasterVLM works on the vision encoder.*got LlamaForCausalLM"):
        sieve(tiny.llama(), FasterVLM())
    with pytest.raises(TypeError, match="got the class FastV; call it"):
        sieve(tiny.llama(), FastV)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got str"):
        sieve(tiny.llama(), "FastV")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"PyramidDrop drops before layers \[8, 16, 24\], the model has layers 0..4"):
        sieve(tiny.llama(), PyramidDrop())


@torch.no_grad()
def test_bad_calls_say_what_is_wrong() -> None:
    model, ids = tiny.llama(), tiny.prompt(4, 24, 6)
    with sieve(model, PYRAMID) as run:
        with pytest.raises(ValueError, match="does not say where its image tokens are: pass image_mask"):
            model(ids)
        with pytest.raises(RuntimeError, match="nothing has run yet"):
            run.output_mask  # noqa: B018
        with pytest.raises(RuntimeError, match="no prompt with image tokens"):
            run.report  # noqa: B018
        run.set_images(spans=[(4, 24)])
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, S\), the padding mask, got \(1, 1, 34, 34\)"):
            model(ids, attention_mask=torch.ones(1, 1, 34, 34))
        with pytest.raises(ValueError, match=r"must be a DynamicCache.*got StaticCache"):
            model(ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=64))
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match=r"labels must be \(B, S\)"):
            model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="image_mask or spans, not both"):
        sieve(model, PYRAMID, image_mask=torch.zeros(1, 3, dtype=torch.bool), spans=[])
    with pytest.raises(ValueError, match=r"image_mask must be \(B, S\) bool"):
        sieve(model, PYRAMID, image_mask=torch.zeros(3))
    with sieve(model, FastV(), spans=[(4, 24)]), pytest.raises(ValueError, match="was pruned before layers"):
        model(ids[:, :1], past_key_values=cache)
    with sieve(model, FastV(count=30), spans=[(4, 24)]), pytest.raises(ValueError, match="FastV: count must be at most the prompt's 24"):
        model(ids)
    faster = tiny.llava()
    with sieve(faster, FasterVLM(tokens=17)), pytest.raises(ValueError, match="FasterVLM: tokens must be at most N=16 patches, got 17"):
        faster(**llava_inputs())
    with sieve(faster, FasterVLM(tokens=5)) as run:
        run.set_images(spans=[(4, 16)])
        with pytest.raises(ValueError, match="FasterVLM needs the images"):
            faster(input_ids=tiny.prompt(4, 0, 30))


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_through_pyramiddrop_equals_masks_on_the_full_model(side: str) -> None:
    """Positions kept and one stage, so the full model with hidden keys has the same loss and gradients; labels shrink along."""
    method = PyramidDrop(layers=(2,), keep=(0.25,), renumber=False)
    model, full = tiny.llama().train(), tiny.llama("eager").train()
    ids = tiny.prompt(4, 24, 10)
    labels = torch.full_like(ids, -100)
    labels[:, 30:33] = ids[:, 30:33]
    labels[:, 35:] = ids[:, 35:]  # two answers
    with sieve(model, method, spans=[(4, 24)]) as run:
        out = model(ids, labels=labels)
        out.loss.backward()
        columns = run.output_columns[0]
        assert run.labels is not None
        assert torch.equal(run.labels[0], labels[0, columns])
    visible = torch.zeros(1, 38, dtype=torch.bool).index_fill_(1, columns, True)
    with oracles.hidden_keys(full, 2, visible):
        logits = full(ids).logits[:, columns]
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, columns][1:], ignore_index=-100)
        loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), full.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_training_batch_with_text_only_and_unanswered_samples() -> None:
    model = tiny.llama().train()
    rows = [tiny.prompt(4, 16, 8), tiny.prompt(6, 0, 5, seed=1), tiny.prompt(3, 12, 4, seed=2)]
    ids, mask = tiny.pad(rows, "right")
    labels = torch.full_like(ids, -100)
    labels[0, 22:28] = ids[0, 22:28]
    labels[1, 7:11] = ids[1, 7:11]  # sample 2 has no answer: it passes unchanged
    with sieve(model, PYRAMID, spans=[[(4, 16)], [], [(3, 12)]]) as run:
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        assert [[len(image) for image in sample] for sample in run.kept[-1]] == [[2], [], [12]]
        assert run.output_mask.sum(1).tolist() == [14, 11, 19]
        assert run.output_mask[0, 14:].sum() == 0  # right padded, as the official code
        assert (run.labels != -100).sum(1).tolist() == [6, 4, 0]  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = tiny.prompt(4, 24, 10)
    labels = torch.where(torch.arange(38) < 32, -100, ids)
    grads = []
    for checkpointing in (False, True):
        model = tiny.llama().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with sieve(model, PYRAMID, spans=[(4, 24)]):
            model(ids, labels=labels, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@torch.no_grad()
def test_adjacent_images_are_told_apart() -> None:
    model = tiny.llava()
    ids = tiny.prompt(3, 32, 4)
    with sieve(model, FasterVLM(tokens=5)) as run:
        model(input_ids=ids, pixel_values=tiny.pixels(2))
    assert [len(image) for image in run.kept[0][0]] == [5, 5]
    assert all(int(image.max()) < 16 for image in run.kept[0][0])


@torch.no_grad()
def test_a_dense_cache_can_be_continued_inside_a_sieve() -> None:
    model, x = tiny.llava(), llava_inputs()
    token = torch.tensor([[7]])
    dense = model(**x)
    wanted = model(input_ids=token, past_key_values=dense.past_key_values).logits
    dense = model(**x)
    with sieve(model, PYRAMID):
        assert torch.equal(model(input_ids=token, past_key_values=dense.past_key_values).logits, wanted)


@torch.no_grad()
def test_overlay_gives_the_kept_patches_and_their_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    calls: list[Any] = []
    stub = types.ModuleType("tokensieve.viz")
    stub.overlay = lambda image, kept, grid: calls.append((kept.tolist(), grid)) or image  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokensieve.viz", stub)
    import tokensieve

    monkeypatch.setattr(tokensieve, "viz", stub, raising=False)
    for make, inputs, grid in ((tiny.llava, llava_inputs, (4, 4)), (tiny.llava_next, next_inputs, (2, 8))):
        model = make()
        with sieve(model, FasterVLM(tokens=5)) as run:
            model(**inputs())
            assert run.overlay("photo") == "photo"
        kept, got = calls.pop()
        assert got == grid
        assert max(kept) < grid[0] * grid[1]
        assert len(kept) == (5 if grid == (4, 4) else 10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: Any, dtype: torch.dtype) -> None:
    model, x = tiny.llava().to(dtype), llava_inputs()
    with sieve(model, method) as run:
        out = model.generate(**{**x, "pixel_values": x["pixel_values"].to(dtype)}, max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 29)
    assert [len(run.kept[-1][0][0])] == [{"PyramidDrop": 2, "FastV": 8, "FasterVLM": 5}[type(method).__name__]]


@torch.no_grad()
def test_top_level_name_and_real_overlay() -> None:
    import tokensieve

    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    model, photo = tiny.llava(), image_module.new("RGB", (64, 48), "white")
    with tokensieve.sieve(model, tokensieve.methods.FasterVLM(tokens=5)) as run:
        model(**llava_inputs())
        picture = run.overlay(photo)
    assert picture.size == photo.size
    assert picture.tobytes() != photo.tobytes()


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("method", [PYRAMID, FastV()])
def test_layers_of_a_gpu_prefill_never_wait_for_the_host(cuda: str, method: Any) -> None:
    """Sizes are read once a prompt, before the first layer; after that nothing synchronises."""
    model, ids = tiny.llama().to(cuda), tiny.prompt(4, 24, 6).to(cuda)

    def strict(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def relaxed(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    with sieve(model, method, spans=[(4, 24)]) as run:
        wanted = model(ids).logits
        layers = model.model.layers
        handles = [layers[0].register_forward_pre_hook(strict), layers[-1].register_forward_hook(relaxed, always_call=True)]
        try:
            logits = model(ids).logits
        finally:
            relaxed()
            for handle in handles:
                handle.remove()
        assert torch.equal(logits, wanted)
        assert all(seconds > 0 for seconds in run.report.prune_seconds)

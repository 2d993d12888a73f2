"""The context manager itself: restoring the model, errors, generate, training, LLaVA models."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import FasterVLM, FastV, PyramidDrop  # noqa: E402
from tokensieve.models import attach, detach, sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.tiny import MODELS, llava_inputs, next_inputs  # noqa: E402

PYRAMID = PyramidDrop(layers=(1, 2, 4), keep=(0.5, 0.25, 0.125))
METHODS = [PYRAMID, FastV(), FastV(variant="mask"), FasterVLM(tokens=5)]


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


@pytest.mark.parametrize(
    "spans", ["ab", 7, torch.tensor([[4, 24]]), [4, 24], (4, 24), [(4, 24, 1)], [(4.0, 24.0)], [(-4, 24)], [(4, -2)], [(4, 10), (8, 10)]]
)
def test_bad_spans(spans: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^tokensieve.sieve: spans must be \(start, length\) pairs of ints"):
        sieve(tiny.llama(), PYRAMID, spans=spans)


@torch.no_grad()
def test_more_bad_calls_say_what_is_wrong() -> None:
    model, ids = tiny.llama(), tiny.prompt(4, 24, 6)
    with pytest.raises(TypeError, match=r"image_mask must be a torch\.Tensor, got list"):
        sieve(model, PYRAMID, image_mask=[[True]])  # type: ignore[arg-type]
    with sieve(model, PYRAMID, spans=[(4, 24)]) as run:
        with pytest.raises(RuntimeError, match="no prompt with image tokens"):
            run.overlay(None, grid=(4, 6))
        with pytest.raises(ValueError, match=r"attention_mask must be \(B=1, S=34\), got \(1, 10\)"):
            model(ids, attention_mask=torch.ones(1, 10))
        with pytest.raises(ValueError, match=r"input_ids must hold at least one sample and one token, got \(0, 34\)"):
            model(ids[:0])
        model(ids)
        with pytest.raises(ValueError, match="overlay's stage must be below 3, got 3"):
            run.overlay(None, stage=3, grid=(4, 6))
    with sieve(model, FastV(ratio=1.0), spans=[(0, 34)]), pytest.raises(ValueError, match="a prompt must keep at least one token"):
        model(ids)


def test_compiled_models_are_refused() -> None:
    """Code compiled before does not run the sieve's hooks: it would keep every token in silence."""
    model = tiny.llama()
    with pytest.raises(TypeError, match=r"got OptimizedModule; it is compiled: sieve the model itself"):
        sieve(torch.compile(model, backend="eager"), FastV(), spans=[(4, 24)])
    model.model.layers[0].mlp.compile(backend="eager")
    with pytest.raises(RuntimeError, match="model must not be compiled, got a compiled LlamaMLP"), sieve(model, FastV(), spans=[(4, 24)]):
        pass
    assert not model.model._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_generate_stopped_in_the_middle_leaves_the_model_as_before(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs()
    wanted = model(**x).logits

    class Stop(transformers.StoppingCriteria):
        def __call__(self, ids: torch.Tensor, *_: Any, **__: Any) -> Any:
            if ids.shape[1] > x["input_ids"].shape[1] + 2:
                raise KeyError("stopped")
            return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyError, match="stopped"), sieve(model, method):
        model.generate(**x, max_new_tokens=6, do_sample=False, stopping_criteria=[Stop()])
    assert torch.equal(model(**x).logits, wanted)


@torch.no_grad()
def test_a_copy_made_inside_a_sieve_is_refused() -> None:
    model = tiny.llama()
    with torch.no_grad(), sieve(model, FastV(layer=1), spans=[(2, 8)]):
        copied = copy.deepcopy(model)
        model(torch.arange(14)[None])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"LlamaModel is a copy made inside a sieve .* copy it outside"):
        copied(torch.arange(14)[None])


def test_a_second_thread_in_the_middle_of_a_call_is_refused_and_one_after_it_is_not() -> None:
    model, said = tiny.llama(), []

    def forward(*_: Any) -> None:
        try:
            with torch.no_grad():
                model(torch.arange(14)[None])
        except RuntimeError as error:
            said.append(str(error))

    def elsewhere(*_: Any) -> None:
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    with sieve(model, FastV(layer=1), spans=[(2, 8)]) as run:
        handle = model.model.layers[2].register_forward_pre_hook(elsewhere)
        forward()
        handle.remove()
        assert len(said) == 2
        assert all("one thread at a time, got two" in line for line in said)
        forward()
        elsewhere()
        assert len(said) == 2
        assert run.report.tokens[-1] == 10


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_and_attentions_can_be_asked_for(method: Any) -> None:
    model, x = tiny.llava("eager"), llava_inputs()
    with sieve(model, method) as run:
        out = model(**x, output_hidden_states=True, output_attentions=True)
        tokens = run.report.tokens
    sizes = (26,) * 5 if getattr(method, "masking", False) else tokens
    assert tuple(attention.shape[-1] for attention in out.attentions) == sizes
    assert out.hidden_states[-1].shape[1] == out.logits.shape[1] == sizes[-1]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_position_ids_of_the_caller_are_used(method: Any) -> None:
    """RoPE is relative, so shifted positions give the same logits, and only rounding tells them apart."""
    model, x = tiny.llava(), llava_inputs()
    with sieve(model, method):
        plain = model(**x).logits
        given = model(**x, position_ids=torch.arange(26)[None]).logits
        shifted = model(**x, position_ids=torch.arange(26)[None] + 7).logits
    assert torch.equal(plain, given)
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-4)

"""Methods inside encoder blocks: nothing to do is bit-identical, equal tokens merge without loss, the model comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from tokensieve.methods import BlockMethod, BlockStep, BlockView
from torch import Tensor

from models.encoders import DEPTH, HF_MODELS, MODELS, TIMM_MODELS, KeepSeen, PairMerge, encoder, pixels, run_encoder, timm_model

CLS = [kind for kind in MODELS if kind not in ("registers_only", "avgmax", "map", "siglip", "siglip_classifier")]


class Nothing(BlockMethod):
    """All tokens stay: the block is put together from its parts, and no part of it may change."""

    def __init__(self, at: tuple[int, ...]) -> None:
        object.__setattr__(self, "at", at)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return self.at

    def step(self, view: BlockView) -> BlockStep | None:
        return None


def snapshot(model: Any) -> list[Any]:
    """What an attached method could leave behind: attributes, hooks and classes of every module."""
    return [
        (type(m), {k: v for k, v in vars(m).items() if not k.startswith("_")}, *(len(vars(m)[h]) for h in vars(m) if h.endswith("_hooks")))
        for m in model.modules()
    ]


@pytest.mark.parametrize("at", [(), tuple(range(DEPTH))])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_without_effect_is_bit_identical(kind: str, at: tuple[int, ...]) -> None:
    model, image = encoder(kind), pixels()
    with torch.no_grad():
        expected = run_encoder(model, image)
        before = snapshot(model)
        with ts.sieve(model, Nothing(at)) as run:
            assert torch.equal(run_encoder(model, image), expected)
            assert run.report.tokens == run.report.dense_tokens
            assert run.report.flops == run.report.dense_flops
        assert snapshot(model) == before
        assert torch.equal(run_encoder(model, image), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", HF_MODELS)
def test_every_attention_of_transformers_is_bit_identical(kind: str, attention: str) -> None:
    model, image = encoder(kind, attention), pixels()
    with torch.no_grad():
        expected = run_encoder(model, image)
        with ts.sieve(model, Nothing(tuple(range(DEPTH)))):
            assert torch.equal(run_encoder(model, image), expected)


def test_timm_without_fused_attention_is_bit_identical() -> None:
    model, image = timm_model("qk_norm"), pixels()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        expected = model(image)
        with ts.sieve(model, Nothing((0, 1, 2, 3))):
            assert torch.equal(model(image), expected)
        pairs(model)
        image = twins(image)
        expected = model(image)
        with ts.sieve(model, PairMerge(at=(0,))):
            torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def pairs(model: Any) -> None:
    """Position embeddings of patches 2i and 2i + 1 become equal."""
    for name, parameter in model.named_parameters():
        if "pos" in name and "embed" in name and "patch_embed" not in name:
            table = parameter.data.view(-1, parameter.shape[-1])
            patches = table[-64:]
            patches[1::2] = patches[::2]


def twins(image: Tensor) -> Tensor:
    """Patches 2i and 2i + 1 of 4 x 4 pixels become equal."""
    image = image.clone().view(*image.shape[:3], 4, 2, 4)
    image[..., 1, :] = image[..., 0, :]
    return image.flatten(3)


@pytest.mark.parametrize("kind", MODELS)
def test_merging_equal_tokens_loses_nothing(kind: str) -> None:
    """A token of size 2 must count as its two equal patches in attention and in every kind of pooling: the output stays."""
    model, image = encoder(kind), twins(pixels())
    pairs(model)
    with torch.no_grad():
        expected = run_encoder(model, image)
        with ts.sieve(model, PairMerge(at=(0,))) as run:
            merged = run_encoder(model, image)
            assert run.size is not None
            assert run.size[0, -32:].tolist() == [2.0] * 32
    assert (merged - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)


class HalfMerge(PairMerge):
    """The first 32 of 64 patches in pairs, the others alone: groups of unequal size."""

    def step(self, view: BlockView) -> BlockStep:
        B, first = len(view.tokens), torch.arange(32)
        index = torch.cat([first[::2], first + 32])
        size = torch.cat([torch.full((16,), 2.0), torch.ones(32)]).expand(B, 48)
        return BlockStep(view.tokens[:, index], index.expand(B, 48), torch.cat([first // 2, first + 16]).expand(B, 64), size)


class HalfMergeUnweighted(HalfMerge):
    proportional = False


@pytest.mark.parametrize("kind", ["avgmax", "map", "siglip", "siglip_classifier"])
def test_sizes_count_in_attention_and_in_pooling(kind: str) -> None:
    """The test above with groups of unequal size, and without the bias, where it must fail."""
    model, image = encoder(kind), twins(pixels())
    pairs(model)
    with torch.no_grad():
        expected = run_encoder(model, image)
        with ts.sieve(model, HalfMerge(at=(0,))):
            good = (run_encoder(model, image) - expected).abs().max()
        with ts.sieve(model, HalfMergeUnweighted(at=(0,))):
            bad = (run_encoder(model, image) - expected).abs().max()
    assert good < 2e-5
    assert bad > 100 * good


@pytest.mark.parametrize("kind", CLS)
def test_kept_trace_and_report_agree(kind: str) -> None:
    """What the run says was kept, counted and dropped is one story."""
    model, image = encoder(kind), pixels()
    with torch.no_grad(), ts.sieve(model, KeepSeen()) as run:
        run_encoder(model, image)
        assert [len(kept[0]) for kept in run.kept] == [40, 20]
        prefix = run.trace.shape[1] - 64
        assert [n // 2 - prefix for n in run.report.tokens] == [64, 64, 40, 20]
        assert run.report.image_tokens == (128, 128, 80, 40)
        assert (run.trace[:, :prefix] == torch.arange(prefix)).all()
        rows = run.trace[0, prefix:]
        assert (rows >= 0).sum() == 20
        assert torch.equal((rows >= 0).nonzero()[:, 0], run.kept[1][0])
        assert 0.25 < run.report.saved < 0.75


def test_trace_composes_merges() -> None:
    model = timm_model("registers")
    with torch.no_grad(), ts.sieve(model, PairMerge(at=(0, 2))) as run:
        model(pixels())
        assert run.trace[0].tolist() == [0, 1, 2, 3] + [4 + i // 4 for i in range(64)]
        assert run.size is not None
        assert run.size[0].tolist() == [1.0] * 4 + [4.0] * 16


def test_a_float64_reference_in_plain_torch() -> None:
    """The whole patched model, merging included, against a loop over timm's weights in float64."""
    model, image = timm_model("registers").double(), pixels().double()

    def attention(block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        B, N, C = x.shape
        q, k, v = (t.view(B, N, 4, 8).transpose(1, 2) for t in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        logits = q @ k.mT / 8**0.5
        weights = (logits if bias is None else logits + bias[:, None, None]).softmax(-1)
        return x + block.ls1(block.attn.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))

    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(image))
        size = None
        for number, block in enumerate(model.blocks):
            x = attention(block, x, None if size is None else size.log())
            if number in (1, 2):
                s = torch.ones_like(x[..., 0]) if size is None else size
                total = torch.cat([s[:, :4], s[:, 4::2] + s[:, 5::2]], 1)
                x = torch.cat([x[:, :4], x[:, 4::2] * s[:, 4::2, None] + x[:, 5::2] * s[:, 5::2, None]], 1)
                x[:, 4:] /= total[:, 4:, None]
                size = total
            x = x + block.ls2(block.mlp(block.norm2(x)))
        expected = model.head(model.norm(x)[:, 0])
        with ts.sieve(model, PairMerge()):
            torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-6)  # PairMerge's means are float32


def test_state_goes_from_step_to_step_and_not_from_call_to_call() -> None:
    seen = []

    class Spy(KeepSeen):
        def step(self, view: BlockView) -> BlockStep | None:
            seen.append(None if view.state is None else int(view.state))
            return super().step(view)

    model = timm_model()
    with torch.no_grad(), ts.sieve(model, Spy()):
        model(pixels())
        model(pixels(3))
    assert seen == [None, 1, None, 1]


def test_restores_after_an_exception() -> None:
    model = timm_model()
    before = snapshot(model)

    class Broken(KeepSeen):
        def step(self, view: BlockView) -> BlockStep | None:
            raise ArithmeticError

    with pytest.raises(ArithmeticError), ts.sieve(model, Broken()):
        model(pixels())
    assert snapshot(model) == before
    run = ts.attach(model, KeepSeen())
    ts.detach(run)
    ts.detach(run)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_forward_that_someone_else_replaced_stays(kind: str) -> None:
    """accelerate and others put a forward of their own on the instance: it is called where blocks run whole, and comes back."""
    model = encoder(kind)
    block = model.blocks[0] if kind == "vit" else model.encoder.layers[0]
    calls, plain = [], block.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = own
    with torch.no_grad(), ts.sieve(model, KeepSeen()):
        run_encoder(model, pixels())
    assert calls == [1]
    assert block.forward is own


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
def test_hidden_states_of_transformers(kind: str) -> None:
    model = encoder(kind)
    with torch.no_grad(), ts.sieve(model, PairMerge()):
        out = model(pixels(), output_hidden_states=True)
    prefix = 0 if kind == "siglip" else 1
    assert [h.shape[1] - prefix for h in out.hidden_states] == [64, 64, 32, 16, 16]
    assert out.last_hidden_state.shape[1] == prefix + 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["vit", "mean", "map", "clip", "siglip", "dinov2"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    model, image = encoder(kind), twins(pixels())
    pairs(model)
    with torch.no_grad():
        exact = run_encoder(model, image)
        half = model.to(dtype)
        plain = run_encoder(half, image.to(dtype)).float()
        with ts.sieve(half, PairMerge(at=(0,))):
            merged = run_encoder(half, image.to(dtype))
    assert merged.dtype == dtype
    assert (merged.float() - exact).abs().max() <= 3 * (plain - exact).abs().max() + 1e-3


def test_autocast() -> None:
    model, image = timm_model("mean"), twins(pixels())
    pairs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(image)
        with ts.sieve(model, PairMerge(at=(0,))):
            torch.testing.assert_close(model(image), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", ["vit", "distilled", "clip", "siglip", "dinov2"])
def test_training_reaches_every_block_and_checkpointing_changes_nothing(kind: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        calls = []

        class Counted(PairMerge):
            def step(self, view: BlockView) -> BlockStep:
                calls.append(view.block)
                return super().step(view)

        model = encoder(kind).train()
        if checkpointing and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        elif checkpointing:
            model.gradient_checkpointing_enable()
        with ts.sieve(model, Counted()):
            run_encoder(model, pixels()).square().sum().backward()
        assert calls == ([1, 2, 2, 1] if checkpointing else [1, 2])  # recomputed, last block first
        return {name: p.grad for name, p in model.named_parameters() if p.dim() > 1 and "mask_token" not in name}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(recomputed[name], gradient)


def test_training_a_patched_model_for_a_few_steps_learns() -> None:
    torch.manual_seed(0)
    model = timm_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    image, labels = pixels(8), torch.arange(8) % 7
    losses = []
    with ts.sieve(model, PairMerge()):
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(image), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", [PairMerge(), KeepSeen()])
def test_compiles_without_a_break_and_without_recompiling(method: BlockMethod) -> None:
    torch.compiler.reset()
    model = timm_model()
    with torch.no_grad(), ts.sieve(model, method) as run:
        expected = [model(pixels(batch)) for batch in (2, 3, 5)]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        first = pixels(2)
        torch._dynamo.mark_dynamic(first, 0)
        compiled(first)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, plain in zip((2, 3, 5), expected):
                torch.testing.assert_close(compiled(pixels(batch)), plain, rtol=1e-4, atol=1e-5)
                assert run.trace.shape == (batch, 65)


def refusals() -> list[tuple[Any, Any, type[Exception], str]]:
    from models.tiny import llama

    class Far(KeepSeen):
        def blocks(self, depth: int) -> tuple[int, ...]:
            return (1, depth)

    class Backwards(KeepSeen):
        def blocks(self, depth: int) -> tuple[int, ...]:
            return (2, 1)

    return [
        (lambda: torch.nn.Linear(1, 1), PairMerge(), TypeError, "model must be timm's VisionTransformer.*got Linear"),
        (lambda: llama(), PairMerge(), TypeError, "got LlamaForCausalLM"),
        (lambda: torch.compile(timm_model()), PairMerge(), TypeError, "it is compiled"),
        (lambda: encoder("siglip"), KeepSeen(), ValueError, "KeepSeen ranks by the CLS token, and SiglipVisionModel has none"),
        (lambda: timm_model(), Far(), ValueError, r"Far's blocks must be ascending numbers of the model's blocks 0\.\.3, got \(1, 4\)"),
        (lambda: timm_model(), Backwards(), ValueError, r"blocks must be ascending.*got \(2, 1\)"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_refuses_what_it_cannot_do(number: int) -> None:
    model, method, error, message = refusals()[number]
    with pytest.raises(error, match=message):
        ts.sieve(model(), method)


def test_refuses_other_blocks_of_timm() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(TypeError, match=r"plain Block and Attention, got VisionTransformer with ParallelScalingBlock"):
        ts.sieve(timm_model(block_fn=ParallelScalingBlock), PairMerge())


def test_refuses_masks_maps_and_intermediates() -> None:
    model, image = timm_model(), pixels()
    with torch.no_grad(), ts.sieve(model, PairMerge()):
        with pytest.raises(ValueError, match="attn_mask and is_causal must be left out"):
            model(image, attn_mask=torch.zeros(65, 65))
        with pytest.raises(NotImplementedError, match="different number of tokens"):
            model.forward_intermediates(image)
    dino = encoder("dinov2", "eager")
    with torch.no_grad(), ts.sieve(dino, PairMerge()):
        with pytest.raises(ValueError, match="output_attentions must be off"):
            dino(image, output_attentions=True)
        with pytest.raises(ValueError, match="attention_mask must be left out"):
            dino(image, attention_mask=torch.ones(2, 65))
        dino(image)
    with pytest.raises(ValueError, match="image_mask and spans must be None"):
        ts.sieve(model, PairMerge(), spans=[(0, 3)])


@pytest.mark.parametrize("kind", ["vit", "clip_projection"])
def test_nesting_and_using_twice_are_errors(kind: str) -> None:
    model = encoder(kind)
    inner = model.vision_model if kind == "clip_projection" else model
    with ts.sieve(model, PairMerge()) as run, pytest.raises(RuntimeError, match="already inside a sieve with PairMerge"):
        ts.sieve(inner, KeepSeen()).__enter__()
    with pytest.raises(RuntimeError, match="used once, this one is finished"):
        run.__enter__()
    with pytest.raises(RuntimeError, match="nothing has run yet"):
        _ = run.report
    with ts.sieve(inner, KeepSeen()):
        pass


def test_a_compiled_model_is_refused_and_compiling_inside_is_not() -> None:
    model = timm_model()
    model.compile()
    with pytest.raises(RuntimeError, match="model must not be compiled"):
        ts.sieve(model, PairMerge()).__enter__()


def test_every_timm_kind_is_in_the_matrix() -> None:
    assert set(TIMM_MODELS) < set(MODELS)

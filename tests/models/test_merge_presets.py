"""Encoder methods that merge, inside LLaVA models: the language model on the tokens that loops in float64 make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from reference import encoder as crops  # noqa: E402
from reference import merge_methods as reference  # noqa: E402
from tokensieve.methods import AIMMerge, PruMerge, PruMergePlus, VisionZip  # noqa: E402
from tokensieve.models import sieve  # noqa: E402
from torch import Tensor  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.tiny import MODELS, llava_inputs  # noqa: E402

N, SIDE, GRID, SIZE = 16, (4, 4), (2, 1), (31, 10)  # what `tiny` makes; SIZE is (width, height)
METHODS = [
    VisionZip(5, 2),
    VisionZip(4, 0),
    VisionZip(1, 3),
    PruMerge(neighbors=4),
    PruMergePlus(neighbors=3),
    AIMMerge((6, 4)),
    AIMMerge((99,)),
]


def seen(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """Queries and keys of all encoder layers, features before the projector, CLS, and tokens as the language model gets them."""
    values, found, hooks = x["pixel_values"].flatten(0, -4), {}, []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        for name in ("q_proj", "k_proj"):
            hook = getattr(layer.self_attn, name).register_forward_hook(lambda _m, _i, out, at=(number, name): found.update({at: out}))
            hooks.append(hook)
    out = model.model.vision_tower(values, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    tokens = model.model.get_image_features(**{k: v for k, v in x.items() if k in ("pixel_values", "image_sizes")}).pooler_output
    return {"projections": found, "hidden": out.hidden_states[-2], "tokens": torch.cat(list(tokens))}


def made(model: Any, method: Any, now: dict[str, Any], row: int, among: list[int]) -> tuple[list[int], Tensor]:
    """One row of the encoder: the patches in whose places the tokens are counted, and the tokens, in their order."""
    hidden = now["hidden"][row].double()
    if isinstance(method, PruMerge):
        query, key = (now["projections"][3, name][row].double() for name in ("q_proj", "k_proj"))
        centers, tokens = reference.prumerge(query[0], key, hidden[1:], method.neighbors, isinstance(method, PruMergePlus), among)
        free = [n for n in among if n not in centers]
        places, tokens = (centers + free[:1], tokens) if free else (centers, tokens[:-1])
    else:
        query, key = (now["projections"][2, name][row].double().unflatten(-1, (3, 8)).transpose(0, 1) for name in ("q_proj", "k_proj"))
        scores = (query[:, :1] @ key.transpose(1, 2) * 8**-0.5).softmax(-1)[:, 0].sum(0)[1:]
        best, targets, joined = reference.visionzip(scores, key.mean(0)[1:], *method.split(len(among)), among)
        x = hidden[1:]
        more = [x[t] + (x[j].mean(0) if j else 0) for t, j in zip(targets, joined)]
        tokens = torch.stack([hidden[0], *x[best], *more])
        places = [next(n for n in among if n not in best + targets), *best, *targets]
    return places, model.model.multi_modal_projector(tokens.float())


def wanted(model: Any, method: Any, now: dict[str, Any], anyres: bool) -> Tensor:
    """(T, C) image tokens for the language model."""
    prompt: list[Any] = [(0, n) for n in range(N)]
    if anyres:
        for line in crops.unpadded(crops.stitched(GRID, SIDE), SIZE):
            prompt += [*((1 + crop, patch) for crop, patch in line), None]
    if isinstance(method, AIMMerge):
        return reference.aim(now["tokens"].double(), method.r).float()
    rows = range(3 if anyres else 1)
    queue, where = {}, {}
    for row in rows:
        places, tokens = made(model, method, now, row, [n for p, n in filter(None, prompt) if p == row])
        queue[row], where[row] = list(tokens), places
    # the places of a row's tokens in the prompt, ascending, get them in their order
    return torch.stack([queue[p].pop(0) for p, n in filter(None, prompt) if n in where[p]])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_preset_equals_the_model_on_the_merged_prompt(make: Any, inputs: Any, method: Any) -> None:
    model, x = make("eager"), inputs()
    anyres = "image_sizes" in x
    now = seen(model, x)
    tokens = wanted(model, method, now, anyres)
    with sieve(model, method) as run:
        out = model(**x)
    before = oracles.snapshot(model)
    length = len(now["tokens"])
    assert run.report.image_tokens[-1] == len(tokens) <= length
    embeds = model.get_input_embeddings()(x["input_ids"])[0]
    embeds = torch.cat([embeds[:4], tokens, embeds[4 + length :]])
    short = model.lm_head(model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state)
    torch.testing.assert_close(out.logits, short, rtol=1e-3, atol=1e-4)
    oracles.assert_same(before, oracles.snapshot(model))


@torch.no_grad()
@pytest.mark.parametrize("method", [AIMMerge(()), AIMMerge((0,))])
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_merging_nothing_is_the_model_itself(make: Any, inputs: Any, method: Any) -> None:
    model, x = make(), inputs()
    dense = model(**x).logits
    with sieve(model, method):
        assert torch.equal(model(**x).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_two_images_and_generation_equal_each_alone(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs(images=2)
    with sieve(model, method) as run:
        both = model.generate(**x, max_new_tokens=3, do_sample=False)
        counts = [len(image) for image in run.kept[-1][0]]
        for image in range(2):
            one = {"input_ids": x["input_ids"][:, 26 * image : 26 * (image + 1)], "pixel_values": x["pixel_values"][image : image + 1]}
            model.generate(**one, attention_mask=torch.ones_like(one["input_ids"]), max_new_tokens=1)
            assert [len(kept) for kept in run.kept[-1][0]] == counts[image : image + 1]
    assert both.shape[1] == x["input_ids"].shape[1] + 3


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_pictures_of_different_sizes_in_one_batch_equal_each_alone(method: Any) -> None:
    oracles.assert_each_picture_as_alone(method)


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[3:6], ids=repr)
def test_gradients_reach_the_projector_through_merged_tokens(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs()
    with sieve(model, method):
        model(**x).logits.square().sum().backward()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    if not isinstance(method, AIMMerge):  # features of the tower, too
        gradient = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_budgets_that_do_not_fit() -> None:
    model = tiny.llava()
    with (
        torch.no_grad(),
        sieve(model, VisionZip()),
        pytest.raises(ValueError, match=r"VisionZip: dominant \+ contextual must be at most N=16"),
    ):
        model(**llava_inputs())
    with (
        torch.no_grad(),
        sieve(model, PruMerge()),
        pytest.raises(ValueError, match="PruMerge: neighbors must be below N=16 patches, got 32"),
    ):
        model(**llava_inputs())

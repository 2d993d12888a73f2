"""Encoder methods inside LLaVA models, against the model's own attention maps and the language model on the shorter prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from reference import encoder as reference  # noqa: E402
from tokensieve.methods import DAMRO, VTCCLS, DivPrune, FoPru, GlobalCom2, HiRED, VisPruner  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402
from models.tiny import MODELS, llava_inputs  # noqa: E402

N, SIDE, GRID, SIZE = 16, (4, 4), (2, 1), (31, 10)  # what `tiny` makes; SIZE is (width, height)
METHODS = [
    VTCCLS(tokens=5, first_layer=0),
    VTCCLS(tokens=7, first_layer=-2, keep_newlines=True),
    FoPru(ratio=0.4),
    FoPru(ratio=0.5, strategy="row", keep_newlines=True),
    HiRED(rate=0.5, alpha=0.4),
    HiRED(rate=0.4, regions="cells", keep_newlines=True),
    GlobalCom2(ratio=0.5),
    GlobalCom2(ratio=0.3, temperature=1.0, keep_newlines=False),
    DivPrune(ratio=0.4),
    VisPruner(tokens=6),
    VisPruner(tokens=9, important=0.3, keep_newlines=True),
]


def seen(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """Eager maps of all encoder layers, logits of the last one's CLS row, features before the projector, tokens after it."""
    layer, values, heads = model.model.vision_tower.encoder.layers[-1].self_attn, x["pixel_values"].flatten(0, -4), {}
    hooks = [
        getattr(layer, name).register_forward_hook(lambda _m, _i, out, name=name: heads.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    out = model.model.vision_tower(values, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    query, key = (heads[name].unflatten(-1, (3, 8)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    tokens = model.model.get_image_features(**{k: v for k, v in x.items() if k in ("pixel_values", "image_sizes")}).pooler_output
    logits = (query[:, :, :1] @ key.transpose(2, 3)).mean(1)[:, 0, 1:] * 8**-0.5
    return {"maps": out.attentions, "logits": logits, "features": out.hidden_states[-2][:, 1:], "tokens": torch.cat(list(tokens))}


def in_prompt(anyres: bool) -> list[Any]:
    """What each image token of the prompt is: (row of the encoder, patch), or None for a newline."""
    prompt: list[Any] = [(0, n) for n in range(N)]
    if anyres:
        for row in reference.unpadded(reference.stitched(GRID, SIDE), SIZE):
            prompt += [*((1 + crop, patch) for crop, patch in row), None]
    return prompt


def choose(method: Any, now: dict[str, Any], there: list[list[int]]) -> list[list[int]]:
    """Kept patches of each row of the encoder, in the order in which they follow each other; `there`: those in the prompt."""
    rows, maps = range(len(there)), now["maps"]
    late = maps[-2][:, :, 0, 1:]

    def top(scores: torch.Tensor, among: list[int], k: int) -> list[int]:
        return sorted(sorted(among, key=lambda n: (-float(scores[n]), n))[:k])

    if isinstance(method, VTCCLS):
        total = sum(m[:, :, 0, 1:].mean(1) for m in maps[method.first_layer : -1])
        return [top(total[p], there[p], method.tokens) for p in rows]
    if isinstance(method, FoPru):
        received = maps[-2].mean(1)[:, 1:, 1:].mean(1)
        if method.strategy == "rank":
            return [top(received[p], there[p], int(len(there[p]) * method.ratio)) for p in rows]
        best = [top(received[p].view(SIDE).sum(1), list(range(4)), int(4 * method.ratio)) for p in rows]
        return [[4 * y + x for y in best[p] for x in range(4)] for p in rows]
    if isinstance(method, VisPruner):
        return [reference.vispruner(late.mean(1)[p], now["features"][p], method.tokens, method.important) for p in rows]
    if isinstance(method, HiRED):
        if len(rows) == 1:
            return [top(late.sum(1)[0], list(range(N)), int(N * method.rate))]
        first = maps[0][0, :, 0, 1:].sum(0)
        if method.regions == "cells":  # patches in the order of the bands: the left half of the thumbnail, then the right
            first = first.view(SIDE).unflatten(1, (2, 2)).transpose(0, 1).flatten()
        full, budgets = reference.hired_counts(first, len(rows), method.rate, method.alpha)
        return [top(late.sum(1)[p], list(range(N)), n) for p, n in enumerate([full, *budgets])]
    scores = now["logits"]
    thumbnail = reference.best(scores[0], int(N * method.ratio))
    if len(rows) == 1:
        return [thumbnail]
    shares, combined = reference.globalcom2(scores, method.ratio, method.temperature, SIZE, GRID, SIDE)
    return [thumbnail, *(top(values, there[1 + c], int(len(there[1 + c]) * shares[c])) for c, values in enumerate(combined))]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_preset_equals_the_model_on_the_shorter_prompt(make: Any, inputs: Any, method: Any) -> None:
    model, x = make("eager"), inputs()
    with sieve(model, method) as run:
        out = model(**x)
        columns = run.output_columns[0]
    anyres = "image_sizes" in x
    now, prompt = seen(model, x), in_prompt(anyres)
    if isinstance(method, DivPrune):
        wanted = sorted(reference.divprune(now["tokens"], round(method.ratio * len(prompt))))
    else:
        kept = choose(method, now, [[n for p, n in filter(None, prompt) if p == row] for row in range(3 if anyres else 1)])
        place = {token: i for i, token in enumerate(prompt) if token is not None}
        crops = sorted(place[p, n] for p, patches in enumerate(kept) if p for n in patches if (p, n) in place)
        lines = [i for i, token in enumerate(prompt) if token is None and method.keep_newlines]
        wanted = kept[0] + sorted(crops + lines)
    assert columns.tolist() == [*range(4), *(4 + i for i in wanted), *range(4 + len(prompt), x["input_ids"].shape[1])]
    embeds = model.get_input_embeddings()(x["input_ids"])
    embeds[0, 4 : 4 + len(prompt)] = now["tokens"]
    short = model.lm_head(model.model.language_model(inputs_embeds=embeds[:, columns]).last_hidden_state)
    torch.testing.assert_close(out.logits, short, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        VTCCLS(tokens=16, first_layer=0, keep_newlines=True),
        FoPru(ratio=1.0, keep_newlines=True),
        FoPru(ratio=1.0, strategy="row", keep_newlines=True),
        DivPrune(ratio=1.0),
        VisPruner(tokens=16, keep_newlines=True),
    ],
)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_keeping_everything_is_the_unpruned_model(make: Any, inputs: Any, method: Any) -> None:
    model, x = make(), inputs()
    dense = model(**x).logits
    before = oracles.snapshot(model)
    with sieve(model, method):
        assert torch.equal(model(**x).logits, dense)
    oracles.assert_same(before, oracles.snapshot(model))


@pytest.mark.parametrize("method", METHODS)
def test_pictures_of_different_sizes_in_one_batch_equal_each_alone(method: Any) -> None:
    oracles.assert_each_picture_as_alone(method)


@torch.no_grad()
def test_budgets_that_do_not_fit_and_methods_without_a_sieve() -> None:
    model = tiny.llava()
    with sieve(model, VTCCLS(first_layer=0)), pytest.raises(ValueError, match="VTCCLS: tokens must be at most N=16 patches, got 256"):
        model(**llava_inputs())
    with sieve(model, VisPruner()), pytest.raises(ValueError, match="VisPruner: tokens must be at most N=16 patches, got 128"):
        model(**llava_inputs())
    with pytest.raises(ValueError, match="VTCCLS: first_layer must leave a layer before the last of 4"):
        sieve(model, VTCCLS(first_layer=12))
    with pytest.raises(TypeError, match=r"sieve: DAMRO is called through the functions of tokensieve\.methods\.damro"):
        sieve(model, DAMRO())

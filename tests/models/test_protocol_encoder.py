"""Encoder methods against prompts made by hand from features and eager attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods.base import EncoderMethod  # noqa: E402
from tokensieve.methods.views import ImageView  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import tiny  # noqa: E402
from models.doubles import ENCODER, Budgets, Isolated, Layers  # noqa: E402
from models.tiny import MODELS, llava_inputs  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize("method", [Isolated(keep=1.0), Layers(tokens=16), Budgets(total=16)])
def test_encoder_keeping_everything_is_bit_equal_to_the_unpruned_model(method: Any) -> None:
    model, x = tiny.llava(), llava_inputs(2)
    dense = model(**x).logits
    with sieve(model, method):
        assert torch.equal(model(**x).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("method", ENCODER)
@pytest.mark.parametrize(("make", "inputs"), MODELS)
def test_encoder_methods_equal_the_model_on_the_prompt_that_they_make(method: Any, make: Any, inputs: Any) -> None:
    """By hand: read features and eager attention maps, choose, build the short prompt, run the language model on it."""
    model, x = make("eager"), inputs()
    with sieve(model, method) as run:
        logits, columns = model(**x).logits, run.output_columns[0].tolist()
    values = x["pixel_values"].flatten(0, -4)
    tower = model.model.vision_tower(values, output_attentions=True, output_hidden_states=True)
    maps, patches = tower.attentions, tower.hidden_states[-2][:, 1:]
    features = torch.cat(
        model.model.get_image_features(**{k: v for k, v in x.items() if k not in ("input_ids", "attention_mask")}).pooler_output
    )
    embeds = model.get_input_embeddings()(x["input_ids"])[0]
    embeds[4 : 4 + len(features)] = features
    place = _places(len(values))  # column of the prompt of each (crop, patch)

    def best(scores: torch.Tensor, counts: list[int], falling: bool = False) -> list[int]:
        chosen: list[int] = []
        for crop, (row, k) in enumerate(zip(scores, counts)):
            inside = [p for p in range(16) if (crop, p) in place]
            order = sorted(inside, key=lambda p: -float(row[p]))[:k]
            chosen += [place[crop, p] for p in (order if falling else sorted(order))]
        return chosen

    if isinstance(method, Isolated):
        far = (features - features.mean(0)).norm(dim=1)
        wanted = sorted((4 + far.topk(round(len(features) / 2))[1]).tolist())
    elif isinstance(method, Layers):
        rows = slice(None) if method.every else slice(0, 1)
        wanted = sorted(best(sum(maps[i][:, :, rows, 1:].mean((1, 2)) for i in method.read), [5] * len(values)))
    elif isinstance(method, Budgets):
        counts = [12]
        if len(values) > 1:
            marked = maps[0][0, :, 0, 1:].mean(0).topk(8)[1].tolist()
            counts = [6, *(int(sum(m * 2 // 16 == crop for m in marked) / 8 / 2 * 12) for crop in range(2))]
        wanted = sorted(best(maps[2][:, :, 0, 1:].mean(1), counts))
    else:
        scores = maps[2][:, :, 0, 1:].mean(1)
        made = model.model.multi_modal_projector(patches.mean(1))
        wanted = [0] * 4 * len(values)
        for crop in range(len(values)):  # a crop's tokens stand at the places of its kept ones, in their own order
            chosen = best(
                scores.where(torch.arange(len(values))[:, None] == crop, -1.0), [4 if c == crop else 0 for c in range(len(values))], True
            )
            kept_all = sorted(best(scores, [4] * len(values)))
            slots = [i for i, c in enumerate(kept_all) if c in chosen]
            embeds[chosen[-1]] = made[crop]
            for slot, column in zip(slots, chosen):
                wanted[slot] = column
    end = 4 + len(features)
    assert columns == [*range(4), *wanted, *range(end, len(embeds))]
    dense = model.lm_head(model.model.language_model(inputs_embeds=embeds[columns][None]).last_hidden_state)
    torch.testing.assert_close(logits, dense, rtol=1e-4, atol=2e-5)


def _places(crops: int) -> dict[tuple[int, int], int]:
    """LLaVA: 16 patches; LLaVA-NeXT's prompt: a thumbnail, then rows 1 and 2 of two crops of 4 x 4, a newline after each."""
    place = {(0, p): 4 + p for p in range(16)}
    for crop in range(1, crops):
        place |= {(crop, p): 20 + (p // 4 - 1) * 9 + (crop - 1) * 4 + p % 4 for p in range(4, 12)}
    return place


def test_a_position_beyond_the_patches_is_an_error() -> None:
    @dataclass(frozen=True)
    class Beyond(EncoderMethod):
        def select(self, view: ImageView) -> torch.Tensor:
            return torch.tensor([[3, 16]])

    model, x = MODELS[0][0](), MODELS[0][1]()
    message = r"Beyond's select must give positions below 16, got 16"
    with torch.no_grad(), sieve(model, Beyond()), pytest.raises(ValueError, match=message):
        model(**x)

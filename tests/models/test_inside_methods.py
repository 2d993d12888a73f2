"""Every other method between decoder layers, on a tiny LLaVA: neutral settings change nothing, padding changes nothing, caches are as long
as the counts say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from tokensieve import methods  # noqa: E402
from tokensieve.methods.atp_thresholds import Thresholds  # noqa: E402
from tokensieve.methods.dyvte import ExitGate  # noqa: E402
from tokensieve.methods.videollm_mod import Router  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import tiny  # noqa: E402


class Constant(nn.Module):
    """The same row of numbers for every token or sample."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Any, valid: Any = None) -> Tensor:
        x = x if isinstance(x, Tensor) else x.own
        out = torch.tensor(self.values)
        shape = x.shape[:-1] if len(self.values) == 1 else (x.shape[0], len(self.values))
        return out.expand(shape).contiguous()


def seeded(make: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(len(arguments) + 3)
    return make(*arguments)


NEUTRAL = {
    "DART": methods.DART(tokens=None, ratio=0.0, image_pivots=8, text_pivots=0),
    "FEATHER": methods.FEATHER(layers=(1, 3), ratio=0.0),
    "GSearch": methods.GSearch(rates=(1.0,) * 5),
    "DyVTE": methods.DyVTE(gates=(Constant(1.0, 0.0), Constant(1.0, 1.0))),
    "ATP-LLaVA": methods.ATPLLaVA(layers=(1,), heads=(Constant(-99.0, 1.0),)),
    "VideoLLM-MoD": methods.VideoLLMMoD(layers=(1, 3), keep=1.0, routers=(Constant(1.0), Constant(1.0))),
}
PRUNING = {
    "DART": methods.DART(tokens=6, image_pivots=2, text_pivots=1),
    "FEATHER": methods.FEATHER(layers=(1, 3), ratio=0.5),
    "FEATHER rope": methods.FEATHER(layers=(2,), ratio=0.5, stride=0, rope=True),
    "SparseVLM": methods.SparseVLM(layers=(0, 2), budget=(6, 3)),
    "SparseVLM+": methods.SparseVLM(layers=(0, 2), budget=(6, 3), plus=True, heads=3, renumber=False),
    "AIM": methods.AIM(first=1, step=0.5),
    "AIM compact": methods.AIM(first=1, step=0.5, variant="compact"),
    "DyVTE": methods.DyVTE(gates=(seeded(ExitGate, 32, 16), Constant(0.0, 1.0))),
    "ATP-LLaVA": methods.ATPLLaVA(layers=(1,), heads=(seeded(Thresholds, 8),)),
    "VideoLLM-MoD": methods.VideoLLMMoD(layers=(1, 3), keep=0.25, routers=(seeded(Router, 32), seeded(Router, 32))),
    "GSearch": methods.GSearch(rates=(1.0, 0.75, 0.5, 0.5, 0.25)),
    "PSigmoid": methods.PSigmoid(num_layers=5, steepness=1.0, centre=2.0),
}
LENGTHS = {  # keys per layer of a prompt of 10 text and 16 image tokens
    "DART": [26, 26, 18, 18, 18],  # 2 pivots and 3 * 2 picks
    "FEATHER rope": [26, 26, 18, 18, 18],
    "SparseVLM": [26, 17, 17, 14, 14],  # 6 + 1 of 10 dropped ones; 3 + 1
    "SparseVLM+": [26, 16, 16, 13, 13],
    "AIM": [26, 26, 26, 26, 26],
    "AIM compact": [26, 26, 18, 10, 10],
    "VideoLLM-MoD": [26, 14, 26, 14, 26],
    "GSearch": [26, 22, 18, 18, 14],
}


def lengths(cache: Any) -> list[int]:
    return [cache.get_seq_length(layer) for layer in range(tiny.LAYERS)]


@torch.no_grad()
@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_neutral_settings_equal_the_unpruned_model(name: str, attention: str) -> None:
    model, inputs = tiny.llava(attention), tiny.llava_inputs()
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(**inputs, **options)
    with sieve(model, NEUTRAL[name]):
        ours = model.generate(**inputs, **options)
    for want, got in zip(dense.logits, ours.logits):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", PRUNING)
def test_padded_batch_equals_single_prompts(name: str) -> None:
    model, method = tiny.llava(), PRUNING[name]
    rows = [tiny.prompt(4, 16, 6), tiny.prompt(2, 16, 5, seed=1)]
    images = tiny.pixels(2)
    for side in ("left", "right"):
        ids, mask = tiny.pad(rows, side)
        with sieve(model, method) as run:
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # rotated keys are compared by their norms
            out = model(input_ids=ids, attention_mask=mask, pixel_values=images, position_ids=positions)
            batch = [[kept.tolist() for kept in sample] for stage in run.kept for sample in stage]
            ends = [int(row.nonzero()[-1]) for row in mask]
            last = [int((columns == end).nonzero()[0]) for columns, end in zip(run.output_columns, ends)]
        for b, row in enumerate(rows):
            with sieve(model, method) as run:
                alone = model(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=images[b : b + 1])
                single = [[kept.tolist() for kept in sample] for stage in run.kept for sample in stage]
            torch.testing.assert_close(out.logits[b, last[b]], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
            assert batch[b::2] == single


@torch.no_grad()
@pytest.mark.parametrize("name", LENGTHS)
def test_cache_lengths(name: str) -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    with sieve(model, PRUNING[name]) as run:
        cache = model(**inputs, use_cache=True).past_key_values
        assert lengths(cache) == LENGTHS[name]
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert lengths(cache) == [n + 1 for n in LENGTHS[name]]
        assert run.positions[0].tolist() == [[26]]


@torch.no_grad()
@pytest.mark.parametrize("name", PRUNING)
def test_generate_and_a_second_turn(name: str) -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    with sieve(model, PRUNING[name]):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        again = torch.cat([out.sequences, tiny.prompt(3, 0, 0, seed=5)], 1)
        second = model.generate(
            input_ids=again, attention_mask=torch.ones_like(again), past_key_values=out.past_key_values, max_new_tokens=2, do_sample=False
        )
    assert second.shape[1] == again.shape[1] + 2


@torch.no_grad()
def test_aim_compact_equals_masking_where_rank_is_given() -> None:
    """The first stage sees the same tokens either way, so both variants keep the same ones there."""
    model, inputs = tiny.llava(), tiny.llava_inputs()
    kept = []
    for variant in ("mask", "compact"):
        with sieve(model, methods.AIM(first=1, step=0.5, variant=variant)) as run:
            model(**inputs)
            kept.append(run.kept[0][0][0].tolist())
    assert kept[0] == kept[1]
    assert len(kept[0]) == 8


def test_mixture_of_depths_trains_its_routers() -> None:
    torch.manual_seed(0)
    model, inputs = tiny.llava(), tiny.llava_inputs()
    routers = (Router(32), Router(32))
    method = methods.VideoLLMMoD(layers=(1, 3), keep=0.5, routers=routers)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, -100)
    optimiser = torch.optim.Adam([p for router in routers for p in router.parameters()], 0.05)
    losses = []
    for _ in range(12):
        with sieve(model, method):
            loss = model(**inputs, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for router in routers for p in router.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

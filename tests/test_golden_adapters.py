"""Golden adapters on what a folder of unseen vectors may hold: options, layouts and lists that the vectors at hand do not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_adapters import ADAPTERS, Case
from torch import Tensor


def run(name: str, params: dict[str, Any], **inputs: Tensor) -> dict[str, Any]:
    adapter = ADAPTERS[name]
    assert all(adapter.takes(array) for array in inputs)
    return adapter.run(Case(adapter.params(params), inputs, torch.float32))


def test_counts_written_as_floats_and_missing_parameters() -> None:
    found = ADAPTERS["globalcom2"].params({"side": 12.0, "retention_ratio": 0.5, "image_size_wh": [330.0, 330.5]})
    assert found == {"side": 12, "retention_ratio": 0.5, "image_size_wh": [330, 330.5], "temperature": 10}
    assert isinstance(found["side"], int)


@pytest.mark.parametrize("direct", [False, True])
def test_tomesd_draws_for_an_odd_batch_when_called_directly(direct: bool) -> None:
    x = torch.randn(3, 24, 8)
    drawn = torch.randint(4, (2, 3), generator=torch.Generator().manual_seed(3)) if direct else torch.zeros(2, 3, dtype=torch.long)
    corner = torch.arange(2)[:, None] * 12 + torch.arange(3) * 2
    b = (corner + drawn // 2 * 6 + drawn % 2).flatten()
    a = torch.tensor([token for token in range(24) if token not in b.tolist()])
    params = {"h": 4, "w": 6, "ratio": 0.25, "use_rand": True, "generator_seed": 3, "via_compute_merge": not direct}
    found = run("tomesd", params, metric=x, x=x, a_idx=a, b_idx=b)
    cosine = torch.nn.functional.cosine_similarity(x[:, a, None], x[:, None, b], dim=-1)
    assert torch.equal(found["dst_idx"], cosine.argmax(2).gather(1, found["src_idx"]))


def sparsevlm(stages: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 60, 16, generator=generator) * 0.3
    params = {"pre_text": 5, "n_visual": 40, "post_text": 15, "budget": [20, 10, 4], "prune_layers": [1, 3, 4]}
    share = (embeds[0, 5:45] @ embeds[0, 45:].T).softmax(1).mean(0)
    raters, inputs = int((share > share.mean()).sum()), {"embeds": embeds}
    for stage, tokens in zip((0, 1, 2), (60, 40, 30)):
        query, key = torch.randn(16, raters, 8, generator=generator), torch.randn(16, tokens, 8, generator=generator)
        inputs |= {f"s{stage}_q_raters": query, f"s{stage}_k": key} if stage in stages else {}
    return params, inputs


@pytest.mark.parametrize("stages", [(0,), (0, 2)])
def test_sparsevlm_with_stages_that_are_not_stored(stages: tuple[int, ...]) -> None:
    """Plus: positions behind a stage that is not there are not known, so nothing of the later ones is returned."""
    params, inputs = sparsevlm(stages)
    found, whole = run("sparsevlmplus", params, **inputs), run("sparsevlmplus", params, **sparsevlm((0, 1, 2))[1])
    assert found["kv_len_after_prefill"].tolist() == whole["kv_len_after_prefill"].tolist() == [60, 60, 40, 40, 30, 24]
    for name in ("s0_scores", "s0_kept_rel", "s0_next_positions"):
        assert torch.equal(found[name], whole[name])
    assert not any(name.startswith(("s1", "s2")) for name in found)


def test_sparsevlm15_goes_on_behind_a_stage_that_is_not_stored() -> None:
    """v1.5 numbers its positions anew; a stage without recycled tokens' hidden states is no stage of SparseVLM+."""
    params, inputs = sparsevlm((0, 2))
    inputs |= {"s0_recycle_x": torch.randn(7, 16), "s2_recycle_x": torch.randn(3, 16)}
    inputs["s2_k"] = torch.randn(16, 5 + 11 + 15, 8)  # 10 kept and a merged one
    found = run("sparsevlm15", params, **inputs)
    assert "s1_scores" not in found
    assert found["s0_merged"].shape == (1, 16)
    assert found["s2_scores"].shape == (11,)
    assert found["kv_len_after_prefill"].tolist() == [60, 60, 41, 41, 31, 25]


@pytest.mark.parametrize("r", [19, 20])
def test_tofu_prunes_and_takes_either_way_of_counting(r: int) -> None:
    x = torch.randn(2, 41, 6)  # floor(40 - 40 * 0.51) without CLS, floor(41 - 41 * 0.51) with it
    found = run("tofu", {"ratio": 0.51, "r": r, "class_token": True}, metric=x, x=x)
    assert found["src_idx"].shape == (2, r)
    assert torch.equal(found["out_prune"][:, -20:], x[:, 1::2])
    with pytest.raises(AssertionError):
        run("tofu", {"ratio": 0.51, "r": 18, "class_token": True}, metric=x, x=x)


def test_dart_takes_the_count_of_llava_next() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, keys = torch.randn(60, 8, generator=generator), torch.randn(2, 60, 4, generator=generator)
    inputs = {"hidden": hidden, "norm_weight": torch.ones(8), "keys": keys}
    pivots = keys.abs().sum((0, 2))
    order = torch.cat([pivots[5:50].topk(4).indices + 5, pivots[50:].topk(4).indices + 50])
    params = {"image_start": 5, "N": 45, "max_num_trunction": 8, "reduction_ratio": 0.5}
    assert len(run("dart", params, **inputs, pivot_order=order)["kept_idx"]) == 4 + 8 * 1
    assert len(run("dart", params | {"retain_num": 33}, **inputs, pivot_order=order)["kept_idx"]) == 4 + 8 * 4


def test_what_is_not_built_is_refused() -> None:
    damped = {"retain_rate": [0.5], "damping": 0.15, "pre_text": 0, "n_visual": 1}
    with pytest.raises(AssertionError, match="damped"):
        run("aim_prune", damped, token_mask_per_layer=torch.ones(2, 1, 1))
    with pytest.raises(AssertionError, match="alpha"):
        run("pitome", {"alpha": 0.5}, x0=torch.ones(1, 2, 2))

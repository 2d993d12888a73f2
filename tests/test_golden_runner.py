"""The golden runner's rules, on vectors made here: unseen shapes run, and nothing passes in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_golden as runner
import torch


def write(folder: Path, stem: str, params: dict[str, Any], **arrays: torch.Tensor) -> None:
    (folder / f"{stem}.json").write_text(json.dumps({"params": params}))
    np.savez(folder / f"{stem}.npz", **{name: value.numpy() for name, value in arrays.items()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    return tmp_path


def exact(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16).float()


def attend(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(H, D), (Hkv, N, D) -> (N,)."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    return (torch.einsum("hd,hnd->hn", query.double(), key.double()) * query.shape[-1] ** -0.5).softmax(-1).mean(0).float()


ANYRES = [
    {"gw": 2, "gh": 1},
    {"crops_wide": 2, "crops_high": 1},
    {"grid_rows_cols": [1, 2]},
    {"grid_wh": [2, 1]},
    [2, 1],
    {"image_size_wh": [600, 310], "grid_pinpoints_wh": [[336, 672], [672, 336], [672, 672]]},
    {"image_size_hw": [310, 600], "grid_pinpoints_hw": [[672, 336], [336, 672], [672, 672]], "tile": 336},
]


@pytest.mark.parametrize("anyres", ANYRES)
def test_unseen_any_resolution_vector(folder: Path, anyres: Any) -> None:
    torch.manual_seed(0)
    rows, columns, tokens = 3, 5, 4
    query, key, hidden = exact(3, 2, 16), exact(3, 2, 16, 16), exact(3, 16, 8)
    scores = torch.stack([attend(q, k)[1:] for q, k in zip(query, key)])
    order = scores.topk(tokens)[1]
    kept = order.sort(1)[0]
    flat = hidden[:, 1:]
    crops = [(p // columns, c, p % columns) for c in (0, 1) for p in kept[1 + c].tolist()]
    picked = [flat[0, kept[0]], *(flat[1 + c, r * columns + x][None] for r, c, x in sorted(crops))]
    params = {"grid_hw": [rows, columns], "visual_token_num": tokens, "anyres": anyres}
    write(
        folder,
        "fastervlm_holdout_7",
        params,
        q_cls=query,
        k=key,
        hidden=hidden,
        cls_score=scores,
        topk_idx=order,
        kept_idx=kept,
        out=torch.cat(picked),
    )
    runner.test_golden("fastervlm_holdout_7")


def test_unseen_pyramiddrop_vector_with_grouped_heads_and_a_text_only_sample(folder: Path) -> None:
    torch.manual_seed(1)
    features, query, key = exact(2, 20, 8), exact(2, 4, 1, 16), exact(2, 2, 20, 16)
    scores = attend(query[0, :, 0], key[0])[3:13]
    kept = scores.topk(5)[1].sort()[0] + 3
    survivors = torch.cat([torch.arange(3), kept, torch.arange(13, 20)])
    params = {"ratio_list": [1.0, 0.5], "stage": 0, "training": False, "n_image_full": [10, 0], "prompt_len": [10, 15]}
    write(
        folder,
        "pyramiddrop_holdout_3",
        params,
        features=features,
        valid_mask=(torch.arange(20) < torch.tensor([[20], [15]])).to(torch.uint8),
        position_ids=torch.arange(20).repeat(2, 1),
        q_rows=query,
        q_positions=torch.tensor([[19], [14]]),
        k=key,
        image_pos=torch.tensor([3, -1]),
        n_image_cur=torch.tensor([10, 0]),
        n_keep=torch.tensor([5, 0]),
        scores=torch.stack([scores, torch.full((10,), torch.nan)]),
        kept_positions=torch.stack([kept, torch.full((5,), -1)]),
        out_features=torch.stack([features[0, survivors], features[1, :15]]),
        out_position_ids=torch.arange(15).repeat(2, 1),
        out_len=torch.tensor([15, 15]),
    )
    runner.test_golden("pyramiddrop_holdout_3")


def test_a_wrong_answer_an_unknown_set_and_a_vector_without_outputs_fail(folder: Path) -> None:
    key = exact(2, 20, 8)
    params = {"K": 2, "r": 0.5, "n_image": 10, "n_keep": 5, "image_start": 4}
    write(folder, "fastv_holdout_1", params, q_last=exact(4, 8), k=key, kept_positions=torch.arange(4, 9))
    with pytest.raises(AssertionError, match=r"fastv_holdout_1\[torch.float32\].kept_positions: \d of 5 differ"):
        runner.test_golden("fastv_holdout_1")
    write(folder, "fastv_holdout_2", params, q_last=exact(4, 8), k=key, mystery=torch.zeros(3))
    with pytest.raises(AssertionError, match="no output was compared"):
        runner.test_golden("fastv_holdout_2")
    write(folder, "newmethod_dev_1", {}, x=torch.zeros(1))
    with pytest.raises(AssertionError, match="no adapter for the set 'newmethod'"):
        runner.test_golden("newmethod_dev_1")


def test_arrays_that_nobody_compares_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(2)
    query, key = exact(4, 8), exact(2, 20, 8)
    params = {"K": 2, "r": 0.5, "n_image": 10, "n_keep": 5, "image_start": 4}
    write(folder, "fastv_holdout_1", params, q_last=query, k=key, scores=attend(query, key)[4:14], mystery=torch.zeros(3))
    runner.test_golden("fastv_holdout_1")
    out = capsys.readouterr().out
    assert "torch.bfloat16: compared scores; not compared: mystery (neither taken nor returned by the adapter)" in out


IDLE: list[tuple[str, dict[str, Any]]] = [
    ("evit", {"keep_rates": [1.0], "fuse_token": True, "left_tokens": [44], "scale": 0.25}),
    ("tome", {"r": [0], "class_token": True, "prop_attn": True}),
    ("turbo", {"r": [0, 4], "alpha": 1.0, "beta": 0.5, "gamma": 5, "num_layer_start": 4, "r_threshold": 40, "scale": 0.25}),
    ("turbo", {"r": [8], "alpha": 1.0, "beta": 1.0, "gamma": 0, "r_threshold": 80, "scale": 0.25}),
    ("diffrate", {"prune_kept": [45], "merge_kept": [45]}),
]


@pytest.mark.parametrize(("name", "params"), IDLE)
def test_a_layer_that_nothing_leaves(folder: Path, name: str, params: dict[str, Any]) -> None:
    """The attention's output is all that changes the tokens; DiffRate's official code puts them in order all the same."""
    torch.manual_seed(0)
    x, (q, k, v) = exact(2, 45, 32), (exact(2, 2, 45, 16) for _ in range(3))
    shares = (q.double() @ k.double().transpose(2, 3) * 0.25).softmax(-1)
    after = x + (shares @ v.double()).transpose(1, 2).flatten(2)
    if name == "diffrate":
        order = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + shares[:, :, 0, 1:].mean(1).argsort(1, descending=True)], 1)
        after = after.gather(1, order[..., None].expand_as(after))
    write(folder, f"{name}_holdout_1", params, x0=x, l0_q=q, l0_k=k, l0_v=v, l0_x_out=after.float())
    runner.test_golden(f"{name}_holdout_1")


def test_padded_tokens_of_a_clustering_vector(folder: Path) -> None:
    """The official code sets the distance to padding equal for all centres: the first one gets it."""
    torch.manual_seed(3)
    x, noise, score = exact(1, 12, 8), torch.rand(1, 12), exact(1, 12)
    mask = torch.arange(12)[None] < 9
    apart = torch.cdist(x.double(), x.double()) / 8**0.5
    apart = torch.where(mask[:, None], apart, apart.max() + 1)
    density = ((-apart.topk(3, largest=False)[0].square().mean(-1)).exp() + noise * 1e-6) * mask
    above = torch.where(density[:, None] > density[:, :, None], apart, torch.inf).min(-1)[0]
    centers = (density * above.minimum(apart.max())).topk(4)[1]
    labels = apart[:, centers[0]].argmin(1)
    labels[0, centers[0]] = torch.arange(4)
    share = torch.nn.functional.one_hot(labels, 4).double() * score.double().exp()[..., None]
    merged = share.transpose(1, 2) @ x.double() / (share.sum(1)[..., None] + 1e-6)
    arrays = {"centers": centers, "idx_cluster": labels, "x_merged": merged.float()}
    write(folder, "dpcknn_holdout_1", {"cluster_num": 4, "k": 3}, x=x, noise=noise, token_score=score, token_mask=mask.float(), **arrays)
    runner.test_golden("dpcknn_holdout_1")

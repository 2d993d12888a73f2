"""fastervlm: CLS top-k of images, and of a thumbnail with its any-resolution crops."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import FasterVLM
from tokensieve.methods.fastervlm import crop_grid, keep_patches, mosaic_order
from tokensieve.ops import gather_tokens, select_topk

from .base import Adapter, Case


def _pair(facts: dict[str, Any], *names: str) -> tuple[int, int] | None:
    """(wide, high) from whichever spelling is there; a name that ends in hw or says rows first is turned round."""
    for name in names:
        value = facts.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 2:
            turned = name.endswith("hw") or "rows" in name
            return (value[1], value[0]) if turned else (value[0], value[1])
    return None


def _crops(case: Case) -> tuple[int, int]:
    """(wide, high) crops of an any-resolution vector, from its params."""
    given = case.params["anyres"]
    facts = {**case.params, **(given if isinstance(given, dict) else {"grid_wh": given})}
    for wide, high in (("crops_wide", "crops_high"), ("gw", "gh"), ("grid_w", "grid_h"), ("num_patch_width", "num_patch_height")):
        if wide in facts and high in facts:
            return facts[wide], facts[high]
    grid = _pair(facts, "grid_wh", "gw_gh", "crop_grid_wh", "crops_wh", "gh_gw_hw", "crop_grid_hw", "crops_hw", "grid_rows_cols", "grid")
    if grid is not None:
        return grid
    size = _pair(facts, "image_size_wh", "image_size_hw", "image_size")
    points = next(facts[n] for n in facts if "pinpoints" in n)
    if any("pinpoints_hw" in n for n in facts):
        points = [p[::-1] for p in points]
    tile = next((facts[n] for n in ("tile", "tile_size", "crop_size", "vision_image_size") if n in facts), None)
    tile = tile or min(min(p) for p in points)
    assert size is not None
    return crop_grid(size, [tuple(p) for p in points], tile)


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = FasterVLM(tokens=p["visual_token_num"])
    out, index, scores = keep_patches(x["q_cls"][:, :, None], x["k"], x["hidden"][:, 1:], method.tokens)
    if p.get("anyres"):
        order = mosaic_order(index, _crops(case), tuple(p["grid_hw"]))
        out = gather_tokens(out.flatten(0, 1)[None], order[None])
    return {
        "cls_score": scores,
        "topk_idx": select_topk(scores, method.tokens, order="score"),
        "kept_idx": index,
        "out": out,
    }


FASTERVLM = Adapter("fastervlm", ("q_cls", "k", "hidden"), _run)

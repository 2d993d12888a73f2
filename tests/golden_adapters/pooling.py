"""llavolta, llava_ov_pool and leopard: pooled sequences, frames and views."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokensieve.methods import Leopard, LLaVAOneVision
from tokensieve.methods.leopard import space_to_depth
from tokensieve.methods.llava_ov_pool import pool_grid
from tokensieve.methods.llavolta import pool_image, pool_sequence

from .base import Adapter, Case


def _llavolta(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    images = [row if isinstance(row, list) else [row] for row in p["images_idx"]]
    hidden, positions = pool_sequence(x["hidden"], x["position_ids"], images, p["VISUAL_LENGTH"], p["stride"])
    return {
        "hidden_out": hidden,
        "position_ids_out": positions,
        "image_features_out": pool_image(x["image_features"], p["stride"]),
    }


def _llava_ov_pool(case: Case) -> dict[str, Any]:
    side, features = case.params["S"], case.inputs["features"]
    out = {}
    for kind in ("bilinear", "average", "max"):
        to = LLaVAOneVision(stride=case.params["s"], kind=kind).side(side)
        out[f"out_{kind}"] = pool_grid(features, (side, side), (to, to), kind, stride=case.params["s"])
    return out


def _leopard(case: Case) -> dict[str, Any]:
    sizes = [(wide, high) for wide, high in case.inputs["image_sizes"].tolist()]
    views = case.params["budget"] + len(sizes) if "budget" in case.params else 50
    method = Leopard(views=max(views, 1), tile=case.params.get("patch_size", 364))
    tiles = method.tiles(sizes)
    side = math.isqrt(case.inputs["features"].shape[1])
    return {
        "patch_counts": torch.tensor(tiles),
        "resolutions": torch.tensor([method.canvas(size, count) for size, count in zip(sizes, tiles)]),
        "shuffled": space_to_depth(case.inputs["features"], (side, side), method.block),
    }


LLAVOLTA = Adapter("llavolta", ("hidden", "position_ids", "image_features"), _llavolta, half=False)
LLAVA_OV_POOL = Adapter("llava_ov_pool", ("features",), _llava_ov_pool, half=False, normwise=True)
LEOPARD = Adapter("leopard", ("image_sizes", "features"), _leopard, half=False)

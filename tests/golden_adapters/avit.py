"""avit: attention over tokens that run, and the halting state through all blocks."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import AViT
from tokensieve.methods.avit import halt_bias, start, update
from torch.nn.functional import scaled_dot_product_attention

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = AViT(gate_scale=p["gate_scale"], gate_center=p["gate_center"], eps=p["eps"])
    bias = halt_bias(1 - x["mask"], masked=p["masked_bias"])
    out = scaled_dot_product_attention(x["q"], x["k"], x["v"], attn_mask=bias)
    blocks = x["block_outputs"]
    state = start(blocks[0])
    for layer, block in enumerate(blocks):
        state = update(state, block, method.halting(block * state.alive[..., None], layer == len(blocks) - 1), eps=method.eps)
    return {
        "attn_out": out.transpose(1, 2).flatten(2),
        "halted_output": state.output,
        "rho": state.ponder,
        "counter": state.counter,
    }


AVIT = Adapter(
    "avit", ("q", "k", "v", "mask", "block_outputs"), _run, {"eps": 0.01, "masked_bias": -1000}, half=False
)  # the official state is float32; halves move the halts

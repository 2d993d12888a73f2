"""dyvte: a tiny Llama with the vector's weights and gates inside a sieve: features and logits per gate, the exit, cached decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tokensieve.methods import DyVTE
from tokensieve.methods.dyvte import ExitGate, leaves
from torch import Tensor

from .base import Adapter, Case

IMAGE = (35, 576)  # start and length, where the official code has it


class Recorder(ExitGate):
    """A gate that keeps what it saw."""

    def forward(self, features: Tensor) -> Tensor:
        self.seen, self.said = features, super().forward(features)
        return self.said


def _gates(case: Case) -> tuple[Recorder, ...]:
    weights = {name: x for name, x in case.inputs.items() if name.startswith("w.visual_gates_router.")}
    gates = []
    for layer in range(len(weights) // 2):
        w1, w2 = (weights[f"w.visual_gates_router.{layer}.{w}.weight"] for w in ("w1", "w2"))
        gate = Recorder(w1.shape[1] // 2, w1.shape[0]).to(case.dtype)
        gate.load_state_dict({"w1.weight": w1, "w2.weight": w2})
        gates.append(gate)
    return tuple(gates)


def _run(case: Case) -> dict[str, Any]:
    from tokensieve.models import sieve

    from . import llama

    gates = _gates(case)
    plain = {name: x for name, x in case.inputs.items() if "visual_gates_router" not in name}
    model = llama.build(dataclasses.replace(case, inputs=plain))
    with sieve(model, DyVTE(gates=gates), spans=[IMAGE]) as run:
        prefill, decoded, lengths, _ = llama.prefill_and_decode(model, case, run)
    seen = [gate for gate in gates if hasattr(gate, "seen")]
    logits = torch.cat([gate.said for gate in seen])
    out = leaves(logits).nonzero()[:, 0]
    return {
        "gate_features": torch.cat([gate.seen for gate in seen]),
        "gate_logits": logits,
        "exit_layer": out[:1] if len(out) else torch.tensor([-1]),
        "kv_len_after_prefill": torch.tensor(lengths),
        "prefill_out": prefill,
        "decode_out": decoded,
    }


DYVTE = Adapter("dyvte", ("inputs_embeds", "decode_embeds", "w."), _run, half=False, needs="transformers", rtol=1e-4, atol=1e-5)

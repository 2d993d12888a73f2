"""How many ops one prune step launches: a step that falls off the fused path still gives the right tokens, only slower."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from tokensieve.methods import FasterVLM, FastV, PyramidDrop  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import tiny  # noqa: E402
from models.doubles import Pivots  # noqa: E402
from models.tiny import llava_inputs  # noqa: E402


class Calls(TorchDispatchMode):
    """Counts calls of tokensieve's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tokensieve":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def calls(method: Any, batch: int = 1, padded: bool = False) -> dict[str, int]:
    model, x = tiny.llava(), llava_inputs()
    if batch > 1:
        x = {name: value.repeat_interleave(batch, 0) for name, value in x.items()}
    if padded:
        x["input_ids"] = torch.nn.functional.pad(x["input_ids"], (2, 0))
        x["attention_mask"] = torch.nn.functional.pad(x["attention_mask"], (2, 0))
    with torch.no_grad(), sieve(model, method), Calls() as seen:
        out = model(**x)
        prompt = dict(seen.counts)
        model(input_ids=torch.full((batch, 1), 7), past_key_values=out.past_key_values)
        assert dict(seen.counts) == prompt, "a decode step prunes nothing"
    return prompt


@pytest.mark.parametrize("batch", [1, 3])
def test_uniform_batches_take_the_fused_op_alone(batch: int) -> None:
    assert calls(FastV(), batch) == {"prune_tokens": 1}
    assert calls(FastV(renumber=True), batch) == {"prune_tokens": 1}
    assert calls(PyramidDrop((1, 2, 4), (0.5, 0.25, 0.125)), batch) == {"prune_tokens": 3}


def test_padded_batches_score_select_and_gather_once_a_step() -> None:
    assert calls(FastV(), padded=True) == {"attention_scores": 1, "select_topk": 1, "gather_tokens": 1}
    assert calls(PyramidDrop((1, 2), (0.5, 0.25)), padded=True) == {"attention_scores": 2, "select_topk": 2, "gather_tokens": 2}


def test_masking_gathers_columns_alone() -> None:
    assert calls(FastV(variant="mask")) == {"attention_scores": 1, "select_topk": 1, "gather_tokens": 1}


@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_methods_score_all_images_at_once(batch: int) -> None:
    """One selection of patches, one of the sequence around them, one gather."""
    assert calls(FasterVLM(tokens=5), batch) == {"attention_scores": 1, "select_topk": 2, "gather_tokens": 1}


def test_an_own_select_adds_what_it_calls_and_no_more() -> None:
    """Pivots itself: two selections and a gather; the driver: the selection of the sequence, and a gather."""
    assert calls(Pivots()) == {"select_topk": 3, "gather_tokens": 2}

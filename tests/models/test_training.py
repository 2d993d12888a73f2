"""Training through PyramidDrop: shortened labels, loss and gradients."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokensieve.methods import PyramidDrop  # noqa: E402
from tokensieve.models import sieve  # noqa: E402

from models import oracles, tiny  # noqa: E402

PYRAMID = PyramidDrop(layers=(1, 2, 4), keep=(0.5, 0.25, 0.125))


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_through_pyramiddrop_equals_masks_on_the_full_model(side: str) -> None:
    """Positions kept and one stage, so the full model with hidden keys has the same loss and gradients; labels shrink along."""
    method = PyramidDrop(layers=(2,), keep=(0.25,), renumber=False)
    model, full = tiny.llama().train(), tiny.llama("eager").train()
    ids = tiny.prompt(4, 24, 10)
    labels = torch.full_like(ids, -100)
    labels[:, 30:33] = ids[:, 30:33]
    labels[:, 35:] = ids[:, 35:]  # two answers
    with sieve(model, method, spans=[(4, 24)]) as run:
        out = model(ids, labels=labels)
        out.loss.backward()
        columns = run.output_columns[0]
        assert run.labels is not None
        assert torch.equal(run.labels[0], labels[0, columns])
    visible = torch.zeros(1, 38, dtype=torch.bool).index_fill_(1, columns, True)
    with oracles.hidden_keys(full, 2, visible):
        logits = full(ids).logits[:, columns]
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, columns][1:], ignore_index=-100)
        loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), full.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_training_batch_with_text_only_and_unanswered_samples() -> None:
    model = tiny.llama().train()
    rows = [tiny.prompt(4, 16, 8), tiny.prompt(6, 0, 5, seed=1), tiny.prompt(3, 12, 4, seed=2)]
    ids, mask = tiny.pad(rows, "right")
    labels = torch.full_like(ids, -100)
    labels[0, 22:28] = ids[0, 22:28]
    labels[1, 7:11] = ids[1, 7:11]  # sample 2 has no answer: it passes unchanged
    with sieve(model, PYRAMID, spans=[[(4, 16)], [], [(3, 12)]]) as run:
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        assert [[len(image) for image in sample] for sample in run.kept[-1]] == [[2], [], [12]]
        assert run.output_mask.sum(1).tolist() == [14, 11, 19]
        assert run.output_mask[0, 14:].sum() == 0  # right padded, as the official code
        assert (run.labels != -100).sum(1).tolist() == [6, 4, 0]  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = tiny.prompt(4, 24, 10)
    labels = torch.where(torch.arange(38) < 32, -100, ids)
    grads = []
    for checkpointing in (False, True):
        model = tiny.llama().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with sieve(model, PYRAMID, spans=[(4, 24)]):
            model(ids, labels=labels, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))

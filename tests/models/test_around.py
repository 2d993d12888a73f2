"""Merging around a module: every token comes back, with the output of its group."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from tokensieve.methods import ToMeSD
from tokensieve.models import merge_around
from torch import Tensor, nn


class Tokens(nn.Module):
    """Self-attention of one argument, as diffusers calls it; notes how many tokens it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.rows = 0

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        self.rows = hidden_states.shape[1]
        return self.attention(hidden_states, hidden_states, hidden_states)[0], "extra"


class Block(nn.Module):
    """A transformer block as in a latent diffusion U-Net: self-attention, attention to a text, MLP, each with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(16) for _ in range(3))
        self.attn1 = Tokens()
        self.attn2 = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(hidden_states=self.norm1(x))[0]
        x = x + self.attn2(self.norm2(x), text, text)[0]
        return x + self.mlp(self.norm3(x))


def test_each_token_gets_the_output_of_its_group() -> None:
    torch.manual_seed(0)
    module, x = Tokens().eval(), torch.randn(2, 48, 16)
    method = ToMeSD(ratio=0.5, random=False)
    plan = method.plan(x, (6, 8))
    assert plan is not None
    means = torch.stack([torch.stack([x[b][plan.inverse[b] == row].mean(0) for row in range(24)]) for b in range(2)])
    with torch.no_grad():
        expected = module(means)[0].gather(1, plan.inverse[..., None].expand(-1, -1, 16))
        with merge_around(module, method, size=(6, 8)):
            for out, extra in (module(x), module(hidden_states=x)):
                assert module.rows == 24
                assert extra == "extra"
                torch.testing.assert_close(out, expected)
    assert "forward" not in vars(module)


def test_one_plan_for_the_modules_inside_and_residuals_outside() -> None:
    torch.manual_seed(0)
    block, x, text = Block().eval(), torch.randn(2, 64, 16), torch.randn(2, 5, 16)
    method = ToMeSD(ratio=0.5, random=False)
    plan = method.plan(x, (8, 8))

    def merged(module: nn.Module, h: Tensor) -> Tensor:
        out = module(ts.merge_tokens(h, plan).tensors)
        return ts.unmerge_tokens(out[0] if isinstance(out, tuple) else out, plan)

    with torch.no_grad():
        plain = block(x, text)
        y = x + merged(block.attn1, block.norm1(x))
        y = y + block.attn2(block.norm2(y), text, text)[0]
        expected = y + merged(block.mlp, block.norm3(y))
        with merge_around(block, method, size=(8, 8), inside=("attn1", "mlp")):
            torch.testing.assert_close(block(x, text), expected)
            assert block.attn1.rows == 32
        assert torch.equal(block(x, text), plain)


@pytest.mark.parametrize(("size", "method"), [((8, 8), ToMeSD(ratio=0.0)), ((16, 16), ToMeSD()), ((8, 8), ToMeSD(sx=9, sy=9))])
def test_nothing_to_merge_is_bit_identical(size: tuple[int, int], method: Any) -> None:
    block, x, text = Block().eval(), torch.randn(2, 64, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = block(x, text)
        with merge_around(block, method, size=size):
            assert torch.equal(block(x, text), expected)


def test_gradients_reach_every_token_and_checkpointing_repeats_the_draw() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    module, x = Tokens(), torch.randn(2, 64, 16)
    results = []
    with merge_around(module, ToMeSD(ratio=0.6), size=(8, 8)):
        for again in (False, True):
            torch.manual_seed(5)
            leaf = x.clone().requires_grad_()
            out = (checkpoint(module, leaf, use_reentrant=False) if again else module(leaf))[0]
            out.square().sum().backward()
            assert leaf.grad is not None
            assert (leaf.grad.abs().sum(-1) > 0).all()
            results.append((out.detach(), leaf.grad))
    for first, second in zip(*results):
        torch.testing.assert_close(first, second)


def test_restores_after_an_exception_and_refuses_misuse() -> None:
    block, x = Block(), torch.randn(2, 64, 16)
    with pytest.raises(TypeError, match="text"), merge_around(block, ToMeSD(), size=(8, 8), inside=("attn1",)):
        block(x)
    assert "forward" not in vars(block)
    assert "forward" not in vars(block.attn1)
    with merge_around(block, ToMeSD(), size=(8, 8)):
        with pytest.raises(RuntimeError, match="already inside a sieve"):
            merge_around(block, ToMeSD(), size=(8, 8)).__enter__()
        with pytest.raises(TypeError, match=r"tokens must be a \(B, N, C\) tensor"):
            block(x[0], x)
    with pytest.raises(TypeError, match="inside must name modules of Block, got 'attn9'"):
        merge_around(block, ToMeSD(), size=(8, 8), inside=("attn9",))
    block.compile()
    with pytest.raises(RuntimeError, match="must not be compiled"):
        merge_around(block, ToMeSD(), size=(8, 8)).__enter__()

"""attention_pagerank: tokens ranked by repeated walks over the attention map, which is never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import explain
from .score import check_scores

_op = torch.ops.tokensieve.attention_pagerank.default
MAX_CUDA_DIM = 256  # kMaxDim of csrc/score/colsum_args.h


def attention_pagerank(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = 5,
) -> Tensor:
    """PageRank of the tokens of every head: v <- v softmax(Q K^T / temperature), `iterations` times, from v = 1 / N.

    Args:
        query: (B, H, N, D), float32, float16 or bfloat16; any strides with a contiguous last dimension; D up to 256 on CUDA. All tokens.
        key: (B, Hkv, N, D), dtype of query: the same tokens; query head h reads key head h // (H // Hkv).
        scale: factor of the logits; D ** -0.5 where None.
        temperature: the logits are divided by it (AIM: 0.1).
        causal: token l sees tokens <= l.
        mask: (B, N) bool, False = no token sees this one. It still spreads its own mass as a query.
        start: (B, N) float32, the first v of every head; 1 / N where None.
        iterations: passes over the map; 0 gives start.

    Returns:
        (B, H, N) float32. AIM's importance is its root mean square over the heads: `rank.square().mean(1).sqrt()`.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, option, device or stride that breaks a rule above.

    Accumulates in float32 in a fixed order: the same call gives the same bits on any number of threads and on every CPU level. A token
    that sees nothing spreads nothing. Memory is O(B H N). Not differentiable.

    Source: AIM (arXiv 2412.03248); its PageRank runs inside the language model.

    Example:
        >>> import torch, tokensieve as ts
        >>> query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
        >>> ts.attention_pagerank(query, key, causal=True, iterations=1)
        tensor([[[0.6111, 0.2778, 0.1111]]])
    """
    try:
        _checks.no_bools(scale, temperature, iterations)
        seen, first = mask if mask is None else mask.contiguous(), start if start is None else start.contiguous()
        return _op(query, key, scale, temperature, causal, seen, first, iterations)
    except Exception as error:
        explain(error, _check, query, key, scale, temperature, causal, mask, start, iterations)


def _check(query: Any, key: Any, scale: Any, temperature: Any, causal: Any, mask: Any, start: Any, iterations: Any) -> None:
    op = "attention_pagerank"
    check_scores(op, query, key, scale, causal, None, None, None, "row", "sum", None, None, None)
    B, L, N = query.shape[0], query.shape[2], key.shape[2]
    if L != N:
        _checks.bad_value(op, f"query and key must be the same tokens, got L={L}, N={N}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, torch.SymFloat)):
        _checks.bad_type(op, f"temperature must be a float, got {type(temperature).__name__}")
    if not temperature > 0:
        _checks.bad_value(op, f"temperature must be above 0, got {temperature}")
    for name, value, dtype in (("mask", mask, torch.bool), ("start", start, torch.float32)):
        if value is not None:
            _checks.tensor(op, name, value, 2, "(B, N)", (dtype,))
            _checks.exact_shape(op, name, value, (B, N), "(B, N)")
            _checks.same_device(op, name, value, "query", query)
    _checks.integer(op, "iterations", iterations)
    if iterations < 0:
        _checks.bad_value(op, f"iterations must be at least 0, got {iterations}")
    if query.device.type == "cuda" and query.shape[3] > MAX_CUDA_DIM and iterations > 0 and query.numel() > 0:
        _checks.bad_value(op, f"query must have D <= {MAX_CUDA_DIM} on CUDA, got D={query.shape[3]}")


@torch.library.register_fake("tokensieve::attention_pagerank")
def _fake(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    temperature: float,
    causal: bool,
    mask: Tensor | None,
    start: Tensor | None,
    iterations: int,
) -> Tensor:
    _check(query, key, scale, temperature, causal, mask, start, iterations)
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32)


_library = torch.library.Library("tokensieve", "FRAGMENT")  # no gradient, as attention_scores
_library.impl("attention_pagerank", torch.library.fallthrough_kernel, "Autograd")

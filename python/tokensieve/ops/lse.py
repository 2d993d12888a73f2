"""attention_lse: the row normalisers of softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import explain
from .score import check_scores

_op = torch.ops.tokensieve.attention_lse.default


def attention_lse(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of every row of the logits: what `attention_scores` takes as `lse`.

    Args:
        query: (B, H, L, D), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        key: (B, Hkv, N, D), dtype of query.
        scale, causal, bias, query_positions: as in `attention_scores`.

    Returns:
        (B, H, L) float32, natural logarithm; -inf where a row sees nothing.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, option, device or stride that breaks a rule above.

    The bits of attention_scores(..., return_lse=True). Memory is O(B H N), whatever L. Not differentiable.

    Source: FlashAttention (arXiv 2205.14135, section 3.1).

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.attention_lse(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 8, 4))
        tensor([[[2.0794, 2.0794]]])
    """
    try:
        return _op(query, key, scale, causal, bias, query_positions if query_positions is None else query_positions.contiguous())
    except Exception as error:
        explain(error, _check, query, key, scale, causal, bias, query_positions)


def _check(query: Tensor, key: Tensor, scale: float | None, causal: bool, bias: Tensor | None, query_positions: Tensor | None) -> None:
    check_scores("attention_lse", query, key, scale, causal, bias, None, None, "row", "sum", "sum", None, query_positions)


@torch.library.register_fake("tokensieve::attention_lse")
def _fake(query: Tensor, key: Tensor, scale: float | None, causal: bool, bias: Tensor | None, query_positions: Tensor | None) -> Tensor:
    _check(query, key, scale, causal, bias, query_positions)
    return query.new_empty(query.shape[:3], dtype=torch.float32)


_library = torch.library.Library("tokensieve", "FRAGMENT")  # no gradient, as attention_scores
_library.impl("attention_lse", torch.library.fallthrough_kernel, "Autograd")

"""merge_into_nearest: tokens folded into given centres by cosine similarity (PruMerge, VisionZip, clusters)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _autograd, _checks, _debug
from ._checks import FLOATS
from .gather import gather_tokens
from .segments import merge_by_label
from .select import select_topk
from .similarity import cosine_match, cosine_scores

_sum_pairs = torch.ops.tokensieve.sum_pairs.default
_pair_dots = torch.ops.tokensieve.pair_dots.default

MODES = {"sum": 0, "mean": 0, "add_mean": 0}


class Nearest(NamedTuple):
    """What `merge_into_nearest` returns.

    Attributes:
        tensors: (B, K, ...) of x's dtype, one token a centre, in the order of centers.
        assigned: the centre of every token, (B, N) int64 in [0, K), or, with neighbors, the tokens of every centre, (B, K, neighbors)
            int64, nearest first.
    """

    tensors: Tensor
    assigned: Tensor


def merge_into_nearest(
    x: Tensor, metric: Tensor, centers: Tensor, *, weights: Tensor | None = None, neighbors: int | None = None, mode: str = "add_mean"
) -> Nearest:
    """Folds tokens into given centres: each other token into its nearest centre, or into each centre its nearest other tokens.

    PruMerge is `neighbors=32, mode="sum"` with the attention scores as weights (lists overlap, and hold other centres); VisionZip's
    contextual tokens are `mode="add_mean"`; the mean of clusters is `mode="mean"`.

    Args:
        x: (B, N, ...) float32, float16 or bfloat16, laid out as in `gather_tokens`: what is merged.
        metric: (B, N, D) float32, float16 or bfloat16: what cosine similarity compares, a zero row is similar to nothing (0).
        centers: (B, K) int64 in [0, N), no token twice in a row.
        weights: (B, N) float32 factors of the tokens that are folded in; None = 1.
        neighbors: None, every other token goes to its nearest centre; or how many nearest others each centre takes, 1 to N - 1.
        mode: "sum": centre + sum(w x); "add_mean": centre + sum(w x) / sum(w), the centre alone where nothing came;
            "mean": sum(w x) / sum(w), the centre and its weight among them.

    Returns:
        Nearest(tensors, assigned).

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device or option that breaks a rule above.

    Ties go to the first centre of the list, or to the lower token id. Differentiable in x and weights, not in metric. Deterministic.

    Sources: LLaVA-PruMerge (arXiv 2403.15388, section 3.2), VisionZip (2412.04467, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.1], [5.0, 0.0]]])
        >>> ts.merge_into_nearest(x, x, torch.tensor([[0, 1]]))
        Nearest(tensors=tensor([[[5.0000, 0.0500],
                 [0.0000, 1.0000]]]), assigned=tensor([[0, 1, 0, 0]]))
    """
    check_nearest(x, metric, centers, weights, neighbors, mode)
    if _debug.readable(centers) and (_debug.enabled or centers.device.type == "cpu"):
        _debug.centers("merge_into_nearest", centers, x.shape[1])
    centers = centers.contiguous()
    if neighbors is None:
        return _partition(x, metric, centers, weights, mode)
    return _lists(x, metric, centers, weights, neighbors, mode)


def _partition(x: Tensor, metric: Tensor, centers: Tensor, weights: Tensor | None, mode: str) -> Nearest:
    B, K = centers.shape
    _, labels = cosine_match(metric.detach(), gather_tokens(metric.detach(), centers))
    labels = labels.scatter(1, centers, torch.arange(K, device=centers.device).expand(B, K))
    if mode == "mean":
        return Nearest(merge_by_label(x, labels, K, weights=weights)[0], labels)
    others = labels.scatter(1, centers, -1)
    folded, _ = merge_by_label(x, others, K, weights=weights, mode="sum" if mode == "sum" else "mean")
    return Nearest(gather_tokens(x, centers) + folded, labels)


def _lists(x: Tensor, metric: Tensor, centers: Tensor, weights: Tensor | None, neighbors: int, mode: str) -> Nearest:
    B, K = centers.shape
    N = x.shape[1]
    scores = cosine_scores(gather_tokens(metric.detach(), centers), metric.detach(), reduction=None)
    scores = scores.scatter(2, centers[..., None], -torch.inf)
    near = select_topk(scores.view(B * K, N), neighbors, order="score").view(B, K, neighbors)
    source = torch.cat([centers[..., None], near], 2).flatten(1)
    row = torch.arange(K, device=x.device).repeat_interleave(neighbors + 1).expand(B, -1)
    factors = torch.ones(B, K, neighbors + 1, device=x.device) if weights is None else weights.gather(1, source).view(B, K, -1)
    own, rest = factors[..., :1], factors[..., 1:]
    if mode == "mean":
        factors = factors / _divisor(factors)
    elif mode == "add_mean":
        factors = torch.cat([torch.ones_like(own), rest / _divisor(rest)], 2)
    else:
        factors = torch.cat([torch.ones_like(own), rest], 2)
    flat = factors.flatten(1)
    return Nearest(_autograd.call(_sum_pairs, (x, flat), x, source, row, K, flat), near)


def _divisor(factors: Tensor) -> Tensor:
    total = factors.sum(2, keepdim=True)
    return total.masked_fill(total == 0, torch.inf)  # weights that add up to 0: nothing is added, as in merge_by_label


def check_nearest(x: Any, metric: Any, centers: Any, weights: Any, neighbors: Any, mode: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "merge_into_nearest"
    _checks.option(op, "mode", mode, MODES)
    _checks.tensor(op, "x", x, dtypes=FLOATS)
    if x.dim() < 2:
        _checks.bad_value(op, f"x must be (B, N, ...), got shape {_checks.shape(x)}")
    _checks.token_layout(op, "x", x)
    _checks.tensor(op, "metric", metric, 3, "(B, N, D)", FLOATS)
    if metric.shape[:2] != x.shape[:2]:
        _checks.bad_value(op, f"metric must be (B={x.shape[0]}, N={x.shape[1]}, D), got shape {_checks.shape(metric)}")
    _checks.same_device(op, "metric", metric, "x", x)
    _checks.contiguous_last(op, "metric", metric)
    _checks.tensor(op, "centers", centers, 2, "(B, K)", (torch.int64,))
    if centers.shape[0] != x.shape[0]:
        _checks.bad_value(op, f"centers must be (B={x.shape[0]}, K), got shape {_checks.shape(centers)}")
    if x.shape[0] and x.shape[1] and centers.shape[1] == 0:
        _checks.bad_value(op, "centers must hold at least one token a row, got none")
    _checks.same_device(op, "centers", centers, "x", x)
    if weights is not None:
        _checks.tensor(op, "weights", weights, 2, "(B, N)", (torch.float32,))
        _checks.exact_shape(op, "weights", weights, tuple(x.shape[:2]), "(B, N)")
        _checks.same_device(op, "weights", weights, "x", x)
    if neighbors is not None:
        _checks.integer(op, "neighbors", neighbors)
        if not 1 <= neighbors < x.shape[1]:
            _checks.bad_value(op, f"neighbors must be in [1, N - 1 = {x.shape[1] - 1}], got {neighbors}")


# ---- sum_pairs: what the lists are summed with --------------------------------------------------------------------------------


@torch.library.register_fake("tokensieve::sum_pairs")
def _fake(x: Tensor, source: Tensor, row: Tensor, rows: int, weights: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], rows, *x.shape[2:]))


@torch.library.register_fake("tokensieve::pair_dots")
def _fake_dots(grad: Tensor, x: Tensor, source: Tensor, row: Tensor) -> Tensor:
    return source.new_empty(source.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, source, row, _, weights = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(x, source, row, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, source, row, weights = ctx.saved_tensors
    dense = grad.contiguous()
    of_x = _sum_pairs(dense, row, source, ctx.tokens, weights) if ctx.needs_input_grad[0] else None
    of_weights = _pair_dots(dense, x, source, row) if weights is not None and ctx.needs_input_grad[4] else None
    return of_x, None, None, None, of_weights


def _setup_dots(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward_dots(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, x, source, row = ctx.saved_tensors
    weights = grad.contiguous()
    return _sum_pairs(x, source, row, rows.shape[1], weights), _sum_pairs(rows, row, source, x.shape[1], weights), None, None


torch.library.register_autograd("tokensieve::sum_pairs", _backward, setup_context=_setup_context)
torch.library.register_autograd("tokensieve::pair_dots", _backward_dots, setup_context=_setup_dots)

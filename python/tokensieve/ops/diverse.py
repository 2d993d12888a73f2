"""select_diverse: the k tokens that are farthest from each other, greedily."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import explain

METRICS = {"cosine": 0, "euclidean": 1}
PICK_ORDERS = {"position": 0, "pick": 1}
_op = torch.ops.tokensieve.select_diverse.default


def select_diverse(
    x: Tensor, k: int, *, candidates: Tensor | None = None, first: Tensor | None = None, metric: str = "cosine", order: str = "position"
) -> Tensor:
    """Positions of k tokens by greedy max-min: each pick is the token whose nearest pick so far is farthest.

    Args:
        x: (B, N, C), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        k: tokens to keep, 0 <= k <= N.
        candidates: (B, N) bool, False = does not exist: neither picked nor anyone's neighbour.
        first: (B,) int64, the first pick of every row; the token whose nearest other token is farthest where None, where -1, and where it
            names no candidate.
        metric: "cosine", 1 - cosine similarity (1 to everything for a row of norm 0), or "euclidean", squared distance.
        order: "position", ascending positions, or "pick", the order in which they were picked.

    Returns:
        (B, k) int64. A row with fewer than k candidates ends with -1.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, k, option, device, stride or (CPU) first pick that breaks a rule above.

    The picks of the O(k^2 N) loop over the same distances, in O(k N) after N^2 C / 2 multiply-adds. Ties go to the lowest index and rows of
    the same values are at distance exactly 0; duplicates come only when nothing else is left, lowest index first. A row with NaN is at
    distance 0 from everything. Distances are float32 in a fixed order, so one device gives the same picks in every run. Memory on the CPU:
    the inputs in float32 and the N x N matrix of one image at least; matrices above 2 GB are not stored, which costs time.

    Source: DivPrune (arXiv 2503.02175, section 3.3).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[0.0], [1.0], [10.0], [11.0], [30.0]]])
        >>> ts.select_diverse(x, 3, metric="euclidean")
        tensor([[0, 3, 4]])
        >>> ts.select_diverse(x, 3, metric="euclidean", order="pick", first=torch.tensor([1]))
        tensor([[1, 4, 3]])
    """
    try:
        _checks.no_bools(k)
        start = first if first is None else first.contiguous()
        return _op(x, k, candidates, start, METRICS[metric], PICK_ORDERS[order])
    except Exception as error:
        explain(error, _explain, x, k, candidates, first, metric, order)


def _explain(x: Any, k: Any, candidates: Any, first: Any, metric: Any, order: Any) -> None:
    check_diverse(x, k, candidates, first, metric, order)
    if first is not None and first.device.type == "cpu":
        _debug.first_picks("select_diverse", first, x.shape[1])


def check_diverse(x: Any, k: Any, candidates: Any, first: Any, metric: Any, order: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "select_diverse"
    _checks.tensor(op, "x", x, 3, "(B, N, C)", _checks.FLOATS)
    _checks.contiguous_last(op, "x", x)
    B, N, _ = x.shape
    _checks.integer(op, "k", k)
    if not 0 <= k <= N:
        _checks.bad_value(op, f"k must be in [0, N={N}], got {k}")
    if candidates is not None:
        _checks.token_mask(op, "candidates", candidates, "x", x)
    if first is not None:
        _checks.tensor(op, "first", first, 1, "(B,)", (torch.int64,))
        _checks.exact_shape(op, "first", first, (B,), "(B,)")
        _checks.same_device(op, "first", first, "x", x)
    _checks.option(op, "metric", metric, METRICS)
    _checks.option(op, "order", order, PICK_ORDERS)


@torch.library.register_fake("tokensieve::select_diverse")
def _fake(x: Tensor, k: int, candidates: Tensor | None, first: Tensor | None, metric: int, order: int) -> Tensor:
    check_diverse(x, k, candidates, first, tuple(METRICS)[metric], tuple(PICK_ORDERS)[order])
    return x.new_empty((x.shape[0], k), dtype=torch.int64)

"""select_topk: the k best tokens of every row, in order, with an exact tie rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import ORDERS, explain

_op = torch.ops.tokensieve.select_topk.default


def select_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    always_keep: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """Positions of the k largest scores of every row, ascending by default.

    Args:
        scores: (B, N), float32, float16 or bfloat16; rows may be strided, columns are contiguous.
        k: tokens to keep per row, 0 <= k <= N; or a (B,) int64 tensor of them on the device of scores, each in [0, max_k].
        max_k: width K of the output where k is a tensor (a Python int, so no host sync is needed).
        candidates: (B, N) bool, False = never selected.
        always_keep: (B, N) bool, True = ranks above every other token, candidate or not; these tokens count towards k.
        order: "position", ascending positions, or "score", descending score.

    Returns:
        (B, K) int64. A row with fewer than K tokens to give ends with -1, which `gather_tokens` turns into zero rows.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, k, option, device or stride that breaks a rule above.

    Ties go to the lowest position, NaN ranks below -inf, and -0.0 equals +0.0, so the answer is unique: every back end, thread count and
    run gives the same indices. No host sync. Values of a k tensor are checked on the CPU and by `debug_checks`.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.select_topk(torch.tensor([[0.1, 0.7, 0.7, 0.2]]), 2)
        tensor([[1, 2]])
        >>> ts.select_topk(torch.tensor([[0.1, 0.5, 0.7, 0.2]]), 3, order="score")
        tensor([[2, 1, 3]])
    """
    try:
        if _debug.enabled and _debug.readable(scores):
            _debug_select(scores, k, max_k)
        if isinstance(k, Tensor):
            _checks.no_bools(max_k)
            return _op(scores, max_k, k.contiguous(), candidates, always_keep, ORDERS[order])
        width = k if max_k is None and not isinstance(k, bool) else None  # None: refused, explained below
        return _op(scores, width, None, candidates, always_keep, ORDERS[order])
    except Exception as error:
        explain(error, _explain, scores, k, max_k, candidates, always_keep, order)


def _debug_select(scores: Tensor, k: int | Tensor, max_k: int | None) -> None:
    rows = k if isinstance(k, Tensor) else None
    _debug.selection("select_topk", scores, rows, int(max_k or 0) if rows is not None else 0)


def _explain(scores: Any, k: Any, max_k: Any, candidates: Any, always_keep: Any, order: Any) -> None:
    check_select(scores, k, max_k, candidates, always_keep, order)
    if isinstance(k, Tensor) and k.device.type == "cpu":
        _debug.counts("select_topk", k, max_k)


def check_select(scores: Any, k: Any, max_k: Any, candidates: Any, always_keep: Any, order: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "select_topk"
    _checks.tensor(op, "scores", scores, 2, "(B, N)", _checks.FLOATS)
    _checks.contiguous_last(op, "scores", scores)
    B, N = scores.shape
    name, width = ("max_k", max_k) if isinstance(k, Tensor) else ("k", k)
    if isinstance(k, Tensor):
        _checks.tensor(op, "k", k, 1, "(B,)", (torch.int64,))
        _checks.exact_shape(op, "k", k, (B,), "(B,)")
        _checks.same_device(op, "k", k, "scores", scores)
        if max_k is None:
            _checks.bad_value(op, "max_k must be given when k is a tensor, got None")
    elif max_k is not None:
        _checks.bad_value(op, f"max_k goes with a tensor k, got max_k={max_k} with k={k!r}")
    _checks.integer(op, name, width)
    if not 0 <= width <= N:
        _checks.bad_value(op, f"{name} must be in [0, N={N}], got {width}")
    for mask, mask_name in ((candidates, "candidates"), (always_keep, "always_keep")):
        if mask is not None:
            _checks.tensor(op, mask_name, mask, 2, "(B, N)", (torch.bool,))
            _checks.exact_shape(op, mask_name, mask, (B, N), "(B, N)")
            _checks.same_device(op, mask_name, mask, "scores", scores)
            _checks.contiguous_last(op, mask_name, mask)
    _checks.option(op, "order", order, ORDERS)


@torch.library.register_fake("tokensieve::select_topk")
def _fake(scores: Tensor, k: int, k_rows: Tensor | None, candidates: Tensor | None, always_keep: Tensor | None, order: int) -> Tensor:
    counts, width = (k, None) if k_rows is None else (k_rows, k)
    check_select(scores, counts, width, candidates, always_keep, tuple(ORDERS)[order])
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)

"""allocate_budget: how many tokens each part of an image or video may keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import explain

_op = torch.ops.tokensieve.allocate_budget.default

MODES = {"proportional": 0, "softmax": 1, "capped": 2, "adjusted": 3}
REMAINDERS = {"drop": 0, "largest": 1}
DTYPES = (torch.float32, torch.float64)
MAX_PARTS = 4096


def allocate_budget(
    weights: Tensor,
    total: int | Tensor | None = None,
    *,
    mode: str = "proportional",
    cap: int | Tensor | None = None,
    ratio: float | None = None,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    remainder: str = "drop",
    return_shares: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token counts of the parts of every row (crops, frames, regions), from the weights of the parts; made on the device for `select_topk`.

    Every step is rounded in the dtype of weights and sums run from the first part on, as in the methods' own loops: where a product lies at
    a whole number, float32 and float64 truncate differently. With s the share of a part:

    - "proportional": s = w / sum(w), budget trunc(s * total), at most cap (HiRED, in float32).
    - "softmax": the same with s = exp((w - max(w)) / temperature) / (sum of these + epsilon).
    - "capped": s = w / sum(w), cut at cap / total; what is cut goes once to the parts below their cap, by their shares, part by part; what
      exceeds a cap then goes to the parts that follow, and is lost after the last (QuoTA, in float64).
    - "adjusted": s = min(1, ratio * (1 + t - mean(t))) with the softmax shares t, budget trunc(cap * s): each part keeps about `ratio` of
      its own cap tokens, more where it weighs more (GlobalCom2, in float64 with epsilon=1e-8). Takes ratio instead of total.

    Args:
        weights: (B, P), float32 or float64; P at most 4096.
        total: tokens of a row, an int >= 0 or (B,) int64; None for "adjusted".
        mode: one of the above.
        cap: the most a part can take (its own tokens), an int >= 0 or (B, P) int64; "capped" and "adjusted" need it.
        ratio: the share of its cap that a part of average weight keeps; for "adjusted" only.
        temperature, epsilon: of the softmax.
        remainder: "drop", what truncation and caps leave is not given out, as in these methods, so a row may sum to less than total; or
            "largest": it goes round after round to the parts below their cap, by falling fraction of s * total, ties to the lower part, so
            that a row sums to min(total, sum of its caps).
        return_shares: whether the (B, P) shares s are returned too, in the dtype of weights.

    Returns:
        (B, P) int64 budgets, or the pair (budgets, shares).

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, option, device or number that breaks a rule above.

    A part whose share is negative or not a number (the weights sum to 0) gets 0, before the remainder is given out. Deterministic, the
    same bits on every back end; no host sync. The rules are those of HiRED (arXiv 2408.10945), QuoTA (arXiv 2503.08689) and GlobalCom2
    (arXiv 2501.05179).

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.allocate_budget(torch.tensor([[3.0, 1.0, 1.0]]), 12)
        tensor([[7, 2, 2]])
        >>> ts.allocate_budget(torch.tensor([[3.0, 1.0, 1.0]]), 12, cap=6, remainder="largest")
        tensor([[6, 3, 3]])
        >>> ts.allocate_budget(torch.tensor([[9.0, 0.0]]), mode="adjusted", cap=144, ratio=0.25, temperature=10.0)
        tensor([[43, 28]])
    """
    try:
        _checks.no_bools(total, cap, ratio, temperature, epsilon)
        budget, shares = _op(
            weights.contiguous(),
            *(None, total.contiguous()) if isinstance(total, Tensor) else (total, None),
            *(None, cap.contiguous()) if isinstance(cap, Tensor) else (cap, None),
            ratio,
            MODES[mode],
            REMAINDERS[remainder],
            temperature,
            epsilon,
        )
    except Exception as error:
        explain(error, check_budget, weights, total, mode, cap, ratio, temperature, epsilon, remainder)
    return (budget, shares) if return_shares else budget


def check_budget(weights: Any, total: Any, mode: Any, cap: Any, ratio: Any, temperature: Any, epsilon: Any, remainder: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "allocate_budget"
    _checks.tensor(op, "weights", weights, 2, "(B, P)", DTYPES)
    B, P = weights.shape
    if P > MAX_PARTS:
        _checks.bad_value(op, f"weights must be (B, P) with P <= {MAX_PARTS}, got P={P}")
    _checks.option(op, "mode", mode, MODES)
    _checks.option(op, "remainder", remainder, REMAINDERS)
    adjusted = mode == "adjusted"
    for name, value, wanted in (("total", total, not adjusted), ("ratio", ratio, adjusted)):
        if (value is not None) != wanted:
            _checks.bad_value(op, f"{name} must be {'given' if wanted else 'None'} with mode {mode!r}, got {'None' if wanted else value}")
    _amount(op, "total", total, weights, (B,), "(B,)")
    _amount(op, "cap", cap, weights, (B, P), "(B, P)")
    if cap is None and mode in ("capped", "adjusted"):
        _checks.bad_value(op, f"cap must be given with mode {mode!r}, got None")
    if adjusted and remainder == "largest":
        _checks.bad_value(op, "remainder must be 'drop' with mode 'adjusted', which has no total, got 'largest'")
    for name, value in (("ratio", 1.0 if ratio is None else ratio), ("temperature", temperature), ("epsilon", epsilon)):
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            _checks.bad_type(op, f"{name} must be a float, got {type(value).__name__}")
    if not temperature > 0:
        _checks.bad_value(op, f"temperature must be positive, got {temperature}")


def _amount(op: str, name: str, value: Any, weights: Tensor, shape: tuple[int, ...], layout: str) -> None:
    if isinstance(value, Tensor):
        _checks.tensor(op, name, value, len(shape), layout, (torch.int64,))
        _checks.exact_shape(op, name, value, shape, layout)
        _checks.same_device(op, name, value, "weights", weights)
    elif value is not None:
        _checks.integer(op, name, value)
        if value < 0:
            _checks.bad_value(op, f"{name} must be at least 0, got {value}")


@torch.library.register_fake("tokensieve::allocate_budget")
def _fake(
    weights: Tensor,
    total: int | None,
    total_rows: Tensor | None,
    cap: int | None,
    cap_parts: Tensor | None,
    ratio: float | None,
    mode: int,
    remainder: int,
    temperature: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    given = total if total_rows is None else total_rows, cap if cap_parts is None else cap_parts
    check_budget(weights, given[0], tuple(MODES)[mode], given[1], ratio, temperature, epsilon, tuple(REMAINDERS)[remainder])
    return weights.new_empty(weights.shape, dtype=torch.int64), weights.new_empty(weights.shape)

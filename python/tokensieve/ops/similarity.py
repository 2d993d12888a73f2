"""cosine_match and cosine_scores: how similar every token is to the tokens of a set, without the matrix of all pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import explain

MAX_NEIGHBOURS = 32
COSINE_REDUCTIONS: dict[str | None, int] = {None: 1, "mean": 2, "sum": 3, "max": 4}
_match = torch.ops.tokensieve.cosine_match.default
_scores = torch.ops.tokensieve.cosine_scores.default


def cosine_match(
    a: Tensor, b: Tensor, *, k: int | None = None, largest: bool = True, candidates: Tensor | None = None, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The row of b that each row of a is most similar to, or the k most similar ones.

    Args:
        a: (B, M, C), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        b: (B, N, C), dtype of a.
        k: matches per row, 1 <= k <= 32; None is one match without the last axis.
        largest: highest similarity first; False gives the lowest first.
        candidates: (B, N) bool, False = b[n] is no match for anything.
        exclude_self: a and b are the same tokens (M = N), and none may match itself.

    Returns:
        The pair (value, index): cosine similarities float32 and rows of b int64, both (B, M), or (B, M, k) best first. Where a row has
        fewer than k candidates the index is -1 and the value 0.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, k, device or stride that breaks a rule above.

    A row of norm 0 has similarity 0 to everything; NaN ranks last either way. Ties go to the lowest index. Sums are float32 in a fixed
    order, so one device gives the same bits in every run. Memory is O(B (M + N) C). The values carry no gradient: index a and b by the
    matches where one is needed.

    Source: ToMe (arXiv 2210.09461, section 3), DART (arXiv 2502.11494, section 3.3).

    Example:
        >>> import torch, tokensieve as ts
        >>> a, b = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]])
        >>> value, index = ts.cosine_match(a, b)
        >>> index
        tensor([[1, 0]])
        >>> ts.cosine_match(a, b, k=2)[1]
        tensor([[[1, 2],
                 [0, 1]]])
    """
    try:
        _checks.no_bools(k)
        value, index = _match(a, b, 1 if k is None else k, largest, candidates, exclude_self)
    except Exception as error:
        explain(error, check_match, "cosine_match", a, b, 1 if k is None else k, largest, candidates, exclude_self)
    return (value[..., 0], index[..., 0]) if k is None else (value, index)


def cosine_scores(
    a: Tensor,
    b: Tensor,
    *,
    reduction: str | None = "mean",
    t: int | None = None,
    candidates: Tensor | None = None,
    exclude_self: bool = False,
) -> Tensor:
    """Cosine similarity of every row of a to the rows of b: mean, sum, maximum, mean of the t lowest, or all of them.

    Args:
        a: (B, M, C), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        b: (B, N, C), dtype of a.
        reduction: "mean", "sum", "max", "bottom" (the mean of the t lowest similarities), or None for every pair.
        t: how many for "bottom", 1 <= t <= 32; a row with fewer candidates takes the mean of those it has.
        candidates: (B, N) bool, False = b[n] does not count.
        exclude_self: a and b are the same tokens (M = N), and none counts for itself.

    Returns:
        (B, M) float32; (B, M, N) without reduction, 0 where there is no candidate. A row without any candidate gives 0.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, option, device or stride that breaks a rule above.

    A row of norm 0 has similarity 0 to everything. "mean" and "sum" are one product with the sum of the unit rows of b, O((M + N) C), and
    NaN where any candidate is; "max" and "bottom" rank NaN last. Fixed order of sums: same bits in every run. Not differentiable.

    Source: VisPruner (arXiv 2412.01818, section 3.3), Turbo (arXiv 2407.11717, section 3.2), text-to-token relevance of many methods.

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])
        >>> ts.cosine_scores(x, x, exclude_self=True)
        tensor([[0.5000, 0.5000, 0.0000]])
        >>> ts.cosine_scores(x, x, reduction="max", exclude_self=True)
        tensor([[1., 1., 0.]])
    """
    if reduction == "bottom":
        return _bottom(a, b, t, candidates, exclude_self)
    try:
        if t is not None:
            raise ValueError
        return _scores(a, b, COSINE_REDUCTIONS[reduction], candidates, exclude_self)
    except Exception as error:
        explain(error, check_scores, "cosine_scores", a, b, reduction, t, candidates, exclude_self)


def _bottom(a: Tensor, b: Tensor, t: int | None, candidates: Tensor | None, exclude_self: bool) -> Tensor:
    try:
        _checks.no_bools(t)
        value, index = _match(a, b, t, False, candidates, exclude_self)
    except Exception as error:
        explain(error, check_scores, "cosine_scores", a, b, "bottom", t, candidates, exclude_self)
    return value.sum(-1) / (index >= 0).sum(-1).clamp(min=1)


def _check_pair(op: str, a: Any, b: Any, candidates: Any, exclude_self: Any) -> None:
    _checks.tensor(op, "a", a, 3, "(B, M, C)", _checks.FLOATS)
    _checks.tensor(op, "b", b, 3, "(B, N, C)", (a.dtype,))
    if b.shape[0] != a.shape[0] or b.shape[2] != a.shape[2]:
        _checks.bad_value(op, f"b must be (B={a.shape[0]}, N, C={a.shape[2]}), got shape {_checks.shape(b)}")
    _checks.same_device(op, "b", b, "a", a)
    _checks.contiguous_last(op, "a", a)
    _checks.contiguous_last(op, "b", b)
    _checks.flag(op, "exclude_self", exclude_self)
    if exclude_self and a.shape[1] != b.shape[1]:
        _checks.bad_value(op, f"exclude_self needs a and b of the same tokens, got M={a.shape[1]}, N={b.shape[1]}")
    if candidates is not None:
        _checks.token_mask(op, "candidates", candidates, "b", b)


def check_match(op: str, a: Any, b: Any, k: Any, largest: Any, candidates: Any, exclude_self: Any, name: str = "k") -> None:
    """Raises the rule that these arguments break, if any."""
    _check_pair(op, a, b, candidates, exclude_self)
    _checks.integer(op, name, k)
    if not 1 <= k <= MAX_NEIGHBOURS:
        _checks.bad_value(op, f"{name} must be in [1, {MAX_NEIGHBOURS}], got {k}")
    _checks.flag(op, "largest", largest)


def check_scores(op: str, a: Any, b: Any, reduction: Any, t: Any, candidates: Any, exclude_self: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    _checks.option(op, "reduction", reduction, {**COSINE_REDUCTIONS, "bottom": 0})
    if reduction == "bottom":
        check_match(op, a, b, t, False, candidates, exclude_self, "t")
        return
    _check_pair(op, a, b, candidates, exclude_self)
    if t is not None:
        _checks.bad_value(op, f"t goes with reduction 'bottom', got t={t} with reduction={reduction!r}")


@torch.library.register_fake("tokensieve::cosine_match")
def _fake_match(a: Tensor, b: Tensor, k: int, largest: bool, candidates: Tensor | None, exclude_self: bool) -> tuple[Tensor, Tensor]:
    check_match("cosine_match", a, b, k, largest, candidates, exclude_self)
    shape = (a.shape[0], a.shape[1], k)
    return a.new_empty(shape, dtype=torch.float32), a.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("tokensieve::cosine_scores")
def _fake_scores(a: Tensor, b: Tensor, reduction: int, candidates: Tensor | None, exclude_self: bool) -> Tensor:
    names = {code: name for name, code in COSINE_REDUCTIONS.items()}
    check_scores("cosine_scores", a, b, names[reduction], None, candidates, exclude_self)
    shape = (a.shape[0], a.shape[1], b.shape[1]) if reduction == COSINE_REDUCTIONS[None] else a.shape[:2]
    return a.new_empty(shape, dtype=torch.float32)


# Neither carries a gradient: without the fallthrough their values would require one, and a backward pass would warn and be wrong.
_library = torch.library.Library("tokensieve", "FRAGMENT")
_library.impl("cosine_match", torch.library.fallthrough_kernel, "Autograd")
_library.impl("cosine_scores", torch.library.fallthrough_kernel, "Autograd")

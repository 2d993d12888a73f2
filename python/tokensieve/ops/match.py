"""bipartite_match: which tokens merge into which, as a plan that every merge of the same tokens follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import ORDERS, explain

_op = torch.ops.tokensieve.bipartite_match.default


class MergePlan(NamedTuple):
    """Who merges into whom. `index` and `inverse` alone say what a merge does; the others say why.

    source: (B, r) int64, the tokens that merge, best pair first; -1 = this slot merges nothing.
    destination: (B, r) int64, the tokens that they merge into.
    similarity: (B, r) float32, the cosine of each pair, without bias.
    index: (B, M) int64, the token that each output row stands on; -1 = none.
    inverse: (B, N) int64, the output row of each token; -1 = dropped.
    """

    source: Tensor
    destination: Tensor
    similarity: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    inverse: Tensor


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    sources: Tensor | None = None,
    targets: Tensor | None = None,
    keep: int | Tensor = 0,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    order: str = "position",
) -> MergePlan:
    """The r sources that are most similar to a target each, and the plan that merges them there.

    Args:
        metric: (B, N, C), or (B, H, N, D): the mean over the heads is compared. float32, float16 or bfloat16; any strides with a
            contiguous last dimension.
        r: sources that leave; 0 <= r <= min(S, T) with the default lists (at most half of the tokens), 0 <= r <= S with given ones.
        sources, targets: (S,) and (T,), or (B, S) and (B, T), int64 positions in 0..N-1 (-1 = none), in any order. By default the even and
            the odd positions behind the kept prefix.
        keep: tokens that neither merge nor receive: the first so many (CLS, distillation, registers), or with given lists their positions
            (P,) or (B, P) int64.
        bias: (B, S) float32, added to the similarity of a source before sources are ranked; the choice of its target is as without.
        candidates: (B, N) bool, False = neither merges nor receives (padding, masks).
        order: of the sources that stay: "position" in their list, or "score", the most similar first.

    Returns:
        A MergePlan with M = P + S - r + T rows: kept tokens in list order, the sources that stay, all targets in list order.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, r, position (on the CPU, or with debug checks), option, device or stride that breaks a rule above.

    Similarities are float32 whatever the dtype; a token of norm 0 has similarity 0 to all. Ties go to the first target and the first
    source of their lists, NaN ranks last, so the plan is unique: every run, grid and CPU level gives the same one on the same device.
    Sources that may not merge (no candidate, no candidate target) rank last of all; where r asks for one of them all the same it is
    dropped: its slot has source and destination -1, its inverse is -1. So is a token that no list names. Lists must not share tokens. No
    gradient. Memory is O(B (N C + S)), never S x T.

    Source: ToMe (arXiv 2210.09461, section 3); given lists: ToMeSD (arXiv 2303.17604); bias: Turbo (arXiv 2407.11717, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]]])
        >>> plan = ts.bipartite_match(metric, 1)
        >>> plan.source, plan.destination, plan.index, plan.inverse
        (tensor([[2]]), tensor([[1]]), tensor([[0, 1, 3]]), tensor([[0, 1, 1, 2]]))
    """
    try:
        first, kept = (keep, None) if isinstance(keep, int) else (0, keep)
        plan = MergePlan(*_op(metric, r, first, sources, targets, kept, bias, candidates, ORDERS[order]))
    except Exception as error:
        explain(error, _explain, metric, r, sources, targets, keep, bias, candidates, order)
    if _debug.enabled and _debug.readable(metric):
        _check_values(metric, sources, targets, keep)
    return plan


def _lists(sources: Any, targets: Any, keep: Any) -> list[tuple[str, Tensor]]:
    named = (("sources", sources), ("targets", targets), ("keep", keep))
    return [(name, t) for name, t in named if isinstance(t, Tensor)]


def _explain(metric: Any, r: Any, sources: Any, targets: Any, keep: Any, bias: Any, candidates: Any, order: Any) -> None:
    check_match_arguments(metric, r, sources, targets, keep, bias, candidates, order)
    if metric.device.type == "cpu":
        for name, t in _lists(sources, targets, keep):
            _debug.positions("bipartite_match", t, metric.shape[-2], name)


def _check_values(metric: Tensor, sources: Tensor | None, targets: Tensor | None, keep: int | Tensor) -> None:
    """Debug checks: positions in range, and no token in two lists."""
    op, B, N = "bipartite_match", metric.shape[0], metric.shape[-2]
    lists = _lists(sources, targets, keep)
    for name, t in lists:
        _debug.positions(op, t, N, name)
    if lists:
        _debug.indices(op, torch.cat([t.expand(B, -1) for _, t in lists], 1), N, "sources, targets and keep")


def check_match_arguments(metric: Any, r: Any, sources: Any, targets: Any, keep: Any, bias: Any, candidates: Any, order: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "bipartite_match"
    _checks.tensor(op, "metric", metric, None, "", _checks.FLOATS)
    if metric.dim() not in (3, 4):
        _checks.bad_value(op, f"metric must be (B, N, C) or (B, H, N, D), got shape {_checks.shape(metric)}")
    if metric.dim() == 4 and metric.shape[1] == 0:
        _checks.bad_value(op, f"metric must have at least one head, got shape {_checks.shape(metric)}")
    _checks.contiguous_last(op, "metric", metric)
    B, N = metric.shape[0], metric.shape[-2]
    if (sources is None) != (targets is None):
        _checks.bad_value(op, "sources and targets come together or not at all, got one of them")
    S, T = _check_lists(op, metric, sources, targets, keep, B, N)
    most = min(S, T) if sources is None else S
    _checks.integer(op, "r", r)
    if not 0 <= r <= most:
        what = "half of the tokens behind keep" if sources is None else "S"
        _checks.bad_value(op, f"r must be in [0, {most}] ({what}), got {r}")
    if bias is not None:
        _checks.tensor(op, "bias", bias, 2, "(B, S)", (torch.float32,))
        _checks.exact_shape(op, "bias", bias, (B, S), "(B, S)")
        _checks.same_device(op, "bias", bias, "metric", metric)
        if not bias.is_contiguous():
            _checks.bad_value(op, f"bias must be contiguous, got strides {bias.stride()}; call .contiguous()")
    if candidates is not None:
        _checks.tensor(op, "candidates", candidates, 2, "(B, N)", (torch.bool,))
        _checks.exact_shape(op, "candidates", candidates, (B, N), "(B, N)")
        _checks.same_device(op, "candidates", candidates, "metric", metric)
        _checks.contiguous_last(op, "candidates", candidates)
    _checks.option(op, "order", order, ORDERS)


def _check_lists(op: str, metric: Tensor, sources: Any, targets: Any, keep: Any, B: int, N: int) -> tuple[int, int]:
    for name, t in (("sources", sources), ("targets", targets), ("keep", keep)):
        if t is None or (name == "keep" and not isinstance(t, Tensor)):
            continue
        _checks.tensor(op, name, t, None, "", (torch.int64,))
        if t.dim() not in (1, 2) or (t.dim() == 2 and t.shape[0] != B):
            _checks.bad_value(op, f"{name} must be (n,) or (B={B}, n), got shape {_checks.shape(t)}")
        _checks.same_device(op, name, t, "metric", metric)
        _checks.contiguous_last(op, name, t)
    if isinstance(keep, Tensor):
        if sources is None:
            _checks.bad_value(op, "keep must be an int where sources and targets are not given, got a tensor")
    else:
        _checks.integer(op, "keep", keep)
        if not 0 <= keep <= N:
            _checks.bad_value(op, f"keep must be in [0, N={N}], got {keep}")
    if sources is not None:
        return sources.shape[-1], targets.shape[-1]
    first_even, first_odd = keep + keep % 2, keep + 1 - keep % 2
    return (max(0, N - first_even) + 1) // 2, (max(0, N - first_odd) + 1) // 2


@torch.library.register_fake("tokensieve::bipartite_match")
def _fake(
    metric: Tensor,
    r: int,
    prefix: int,
    sources: Tensor | None,
    targets: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    candidates: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = prefix if keep is None else keep
    check_match_arguments(metric, r, sources, targets, kept, bias, candidates, tuple(ORDERS)[order])
    B, N = metric.shape[0], metric.shape[-2]
    if sources is None or targets is None:
        rows = N - r
    else:
        rows = (prefix if keep is None else keep.shape[-1]) + sources.shape[-1] - r + targets.shape[-1]
    slots = metric.new_empty((B, r), dtype=torch.int64)
    index, inverse = metric.new_empty((B, rows), dtype=torch.int64), metric.new_empty((B, N), dtype=torch.int64)
    return slots, torch.empty_like(slots), metric.new_empty((B, r), dtype=torch.float32), index, inverse


# No gradient: without the fallthrough the similarities would require one, and a backward pass would warn and be wrong.
_library = torch.library.Library("tokensieve", "FRAGMENT")
_library.impl("bipartite_match", torch.library.fallthrough_kernel, "Autograd")

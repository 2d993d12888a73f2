"""debug_checks: value rules that cost a read-back, off by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import tokensieve as ts
import torch
from tokensieve.ops import _debug

X = torch.zeros(2, 6, 3)
NAN = torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 2.0]])
KEY = torch.zeros(1, 1, 4, 2)

ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "nan scores": (lambda: ts.select_topk(NAN, 2), r"select_topk: scores must hold no NaN .*got 1, the first at \(1, 1\)"),
    "nan scores of samples": (lambda: ts.select_samples(NAN, 2), r"select_samples: scores must hold no NaN .*got 1, the first at \(1, 1\)"),
    "nan scores of quantiles": (lambda: ts.score_quantiles(NAN, (0.5,)), r"score_quantiles: scores must hold no NaN .*got 1"),
    "nan scores of a fence": (lambda: ts.tukey_fence(NAN), r"tukey_fence: scores must hold no NaN .*got 1"),
    "k too large": (
        lambda: ts.select_topk(torch.zeros(2, 4), torch.tensor([2, 3]), max_k=2),
        r"select_topk: k must be in \[0, max_k=2\].*got 3 in row 1",
    ),
    "k negative": (
        lambda: ts.select_topk(torch.zeros(2, 4), torch.tensor([-1, 2]), max_k=2),
        r"select_topk: k must be in \[0, max_k=2\].*got -1 in row 0",
    ),
    "index too large": (
        lambda: ts.gather_tokens(X, torch.tensor([[0, 1], [2, 6]])),
        r"gather_tokens: index must be in \[-1, N=6\).*got 6 at \(1, 1\)",
    ),
    "index too small": (
        lambda: ts.gather_tokens([X], torch.tensor([[0, 1], [-2, 5]])),
        r"gather_tokens: index must be in .*got -2 at \(1, 0\)",
    ),
    "index twice": (
        lambda: ts.gather_tokens(X, torch.tensor([[0, 1, 2], [4, 5, 4]])),
        r"gather_tokens: index must name a token once per row .*got 4 twice in row 1",
    ),
    "out index twice": (
        lambda: ts.gather_tokens_out([X], torch.tensor([[0, 0], [1, 2]]), [torch.zeros(2, 2, 3)]),
        r"gather_tokens_out: index must name a token once per row .*got 0 twice in row 0",
    ),
    "nan scores of prune": (
        lambda: ts.prune_tokens(torch.full((1, 1, 1, 2), torch.nan), KEY, [torch.zeros(1, 4)], 2),
        r"prune_tokens: scores must hold no NaN .*got 4, the first at \(0, 0\)",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_debug_checks_find(name: str) -> None:
    call, message = ROWS[name]
    with ts.debug_checks(), pytest.raises(ValueError, match=rf"tokensieve\.{message}"):
        call()


def test_debug_checks_let_good_values_pass() -> None:
    with ts.debug_checks():
        index = ts.select_topk(torch.tensor([[-torch.inf, torch.inf, 0.0]] * 2), torch.tensor([0, 3]), max_k=3)
        assert index.tolist() == [[-1, -1, -1], [0, 1, 2]]
        assert ts.gather_tokens(X[:, :3], index).shape == (2, 3, 3)  # -1 may come more than once
        assert ts.gather_tokens(X, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 3)
        assert ts.select_topk(torch.zeros(0, 0), 0).shape == (0, 0)


def test_debug_checks_do_not_hide_the_other_rules() -> None:
    with ts.debug_checks():
        with pytest.raises(TypeError, match=r"tokensieve\.select_topk: scores must be a torch.Tensor, got list"):
            ts.select_topk([1.0], 1)
        with pytest.raises(TypeError, match=r"tokensieve\.gather_tokens: index must be a torch.Tensor, got list"):
            ts.gather_tokens(X, [0])
        with pytest.raises(ValueError, match=r"tokensieve\.gather_tokens: tensors must hold at least one tensor, got none"):
            ts.gather_tokens([], torch.zeros(2, 1, dtype=torch.int64))


def test_debug_checks_are_off_by_default_and_restored() -> None:
    assert _debug.enabled is (os.environ.get("TOKENSIEVE_DEBUG", "0") not in ("", "0"))
    before = _debug.enabled
    with ts.debug_checks():
        assert _debug.enabled
        with ts.debug_checks(False):
            assert not _debug.enabled
            ts.select_topk(NAN, 1)
        assert _debug.enabled
    assert _debug.enabled is before
    with pytest.raises(KeyError), ts.debug_checks():
        raise KeyError
    assert _debug.enabled is before


@pytest.mark.parametrize("starts", [[[-1, 4]], [[0, 1]], [[4, 0]], [[0, 4]]])
def test_debug_checks_of_runs(starts: list[list[int]]) -> None:
    """Of what the CPU kernel refuses anyway and the CUDA kernel does not see: runs of 3 in 6 tokens."""
    with pytest.raises(ValueError, match="pool_runs: starts must be ascending"):
        _debug.runs("pool_runs", torch.tensor(starts), 3, 6)
    with pytest.raises(ValueError, match="starts must be ascending"):
        ts.pool_runs(X, torch.tensor(starts).repeat(2, 1), 3, 2)
    _debug.runs("pool_runs", torch.tensor([[0, 3]]), 3, 6)


def test_debug_checks_environment_variable(run_python: Callable[..., Any]) -> None:
    code = "import torch, tokensieve as ts; ts.select_topk(torch.tensor([[float('nan')]]), 1)"
    for value, fails in (("1", True), ("0", False), ("", False)):
        done = run_python(code, TOKENSIEVE_DEBUG=value)
        assert (done.returncode != 0) is fails, done.stderr
        assert ("scores must hold no NaN" in done.stderr) is fails


def test_debug_checks_skip_what_has_no_values() -> None:
    with ts.debug_checks():
        assert ts.select_topk(torch.empty(2, 5, device="meta"), 2).shape == (2, 2)
        assert ts.gather_tokens(X.to("meta"), torch.zeros(2, 2, dtype=torch.int64, device="meta")).shape == (2, 2, 3)
        compiled = torch.compile(lambda x: ts.gather_tokens(X, ts.select_topk(x, 2)), fullgraph=True, backend="aot_eager")
        assert compiled(torch.randn(2, 6)).shape == (2, 2, 3)

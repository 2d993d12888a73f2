"""allocate_budget: the rules of HiRED, QuoTA and GlobalCom2 to the token, and tokens that are left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokensieve as ts
import torch
from reference.budget import allocate_row
from reference.compare import assert_equal
from reference.inputs import integer, log_uniform, seeded
from torch import Tensor

W = torch.tensor([[3.0, 1.0, 1.0], [0.0, 2.0, 5.0]])


def reference(weights: Tensor, total: int | Tensor = 0, cap: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    B, P = weights.shape
    totals = total.tolist() if isinstance(total, Tensor) else [total] * B
    caps = cap.tolist() if isinstance(cap, Tensor) else [None if cap is None else [cap] * P] * B
    rows = [allocate_row(weights[b].cpu().numpy(), totals[b], cap=caps[b], **options) for b in range(B)]
    budgets = torch.tensor([r[0] for r in rows], dtype=torch.int64).view(B, P)
    return budgets, torch.from_numpy(np.array([r[1] for r in rows], dtype=weights.cpu().numpy().dtype)).view(B, P)


def check(device: str, weights: Tensor, total: Any = None, *, cap: Any = None, what: str = "", **options: Any) -> None:
    there = [t.to(device) if isinstance(t, Tensor) else t for t in (weights, total, cap)]
    got, shares = ts.allocate_budget(there[0], there[1], cap=there[2], return_shares=True, **options)
    want, want_shares = reference(weights, 0 if total is None else total, cap, **options)
    assert_equal(got.cpu(), want, what or str(options))
    torch.testing.assert_close(shares.cpu(), want_shares, rtol=2e-7 if weights.dtype == torch.float32 else 2e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_allocate_budget_modes(dtype: torch.dtype, device: str) -> None:
    weights = (torch.rand(5, 40, generator=seeded(1)) ** 3).to(dtype)
    caps = torch.randint(0, 60, (5, 40), generator=seeded(2))
    totals = torch.tensor([0, 1, 77, 900, 5000])
    for cap in (None, 25, caps):
        for remainder in ("drop", "largest"):
            check(device, weights, totals, cap=cap, remainder=remainder)
            check(device, weights * 30, 600, cap=cap, mode="softmax", temperature=7.0, epsilon=1e-8, remainder=remainder)
            if cap is not None:
                check(device, weights, totals, cap=cap, mode="capped", remainder=remainder)
                check(device, weights**8, totals, cap=cap, mode="capped", remainder=remainder)
    check(device, weights * 90, mode="adjusted", cap=caps, ratio=0.25, temperature=10.0, epsilon=1e-8)
    check(device, weights * 90, mode="adjusted", cap=144, ratio=0.9, temperature=10.0)


def test_allocate_budget_truncates_in_the_dtype_of_the_weights(device: str) -> None:
    """HiRED's float32 loses one token at these counts, which float64 and integers do not (specs checked against the official code)."""
    marked = torch.tensor([[c, 200 - c] for c in range(201)], dtype=torch.float32, device=device)
    got = ts.allocate_budget(marked, 200)
    assert_equal(got, (marked / marked.sum(1, keepdim=True) * 200).long())
    assert (got[:, 0] != marked[:, 0]).nonzero().flatten().tolist() == [53, 59, 105, 106, 117, 118]


def test_allocate_budget_remainder_makes_rows_whole(device: str) -> None:
    weights = torch.rand(50, 9, generator=seeded(3)).to(device)
    caps = torch.randint(0, 40, (50, 9), generator=seeded(4)).to(device)
    for total in (0, 1, 100, 1000):
        budget = ts.allocate_budget(weights, total, cap=caps, remainder="largest")
        assert_equal(budget.sum(1), caps.sum(1).clamp(max=total))
        assert bool(((budget >= 0) & (budget <= caps)).all())
        assert bool((ts.allocate_budget(weights, total, cap=caps) <= budget).all())
    assert ts.allocate_budget(torch.ones(1, 4, device=device), 6, remainder="largest").tolist() == [[2, 2, 1, 1]]  # ties: lower part


def test_allocate_budget_strange_weights(device: str) -> None:
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor(
        [[0.0, 0.0], [nan, 1.0], [1.0, nan], [inf, 1.0], [-1.0, 3.0], [-1.0, 1.0], [1e30, 1e30], [-0.0, 2.0]], device=device
    )
    assert ts.allocate_budget(rows, 10).tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [0, 10], [0, 10], [5, 5], [0, 10]]
    assert ts.allocate_budget(rows[:3], 9, remainder="largest").tolist() == [[5, 4]] * 3
    assert ts.allocate_budget(torch.tensor([[-inf, 0.0]], device=device), 10, mode="softmax").tolist() == [[0, 10]]
    assert ts.allocate_budget(torch.tensor([[3e38, 3e38]], device=device), 10).tolist() == [[0, 0]]  # the sum is inf
    large = ts.allocate_budget(torch.tensor([[1.0]], dtype=torch.float64, device=device), 2**40)
    assert large.tolist() == [[2**40]]


@pytest.mark.parametrize(("B", "P"), [(0, 4), (3, 0), (0, 0)])
def test_allocate_budget_empty(B: int, P: int, device: str) -> None:
    budget, shares = ts.allocate_budget(torch.zeros(B, P, device=device), 5, return_shares=True)
    assert (budget.shape, budget.dtype, shares.shape) == ((B, P), torch.int64, (B, P))


def test_allocate_budget_takes_views(device: str) -> None:
    wide = torch.rand(6, 20, generator=seeded(5)).to(device)
    caps = torch.randint(0, 9, (4, 6), generator=seeded(6)).to(device)
    assert_equal(
        ts.allocate_budget(wide[:, ::2][:, 3:7], 20, cap=caps.T),
        ts.allocate_budget(wide[:, ::2][:, 3:7].contiguous(), 20, cap=caps.T.contiguous()),
    )


def test_allocate_budget_most_parts(device: str) -> None:
    weights = torch.randint(0, 8, (1, 4096), generator=seeded(7)).double()
    check(device, weights, 100_000)
    assert int(ts.allocate_budget(weights.to(device), 100_000, remainder="largest").sum()) == 100_000


def test_allocate_budget_feeds_select_topk(device: str) -> None:
    """Ragged selection without a host read: as many tokens of each crop as its budget says."""
    scores = torch.rand(4, 30, generator=seeded(8)).to(device)
    budget = ts.allocate_budget(torch.tensor([[5.0, 1.0, 1.0, 3.0]], device=device), 40, cap=30)[0]
    index = ts.select_topk(scores, budget, max_k=30)
    assert_equal((index >= 0).sum(1), budget)


def test_allocate_budget_fuzz(device: str) -> None:
    for seed in range(150):
        g = seeded(seed)
        B, P = log_uniform(g, 1, 5), log_uniform(g, 1, 300)
        dtype = (torch.float32, torch.float64)[integer(g, 0, 1)]
        mode = ("proportional", "softmax", "capped", "adjusted")[integer(g, 0, 3)]
        weights = (torch.rand(B, P, generator=g) ** integer(g, 1, 8) * integer(g, 1, 50)).to(dtype)
        if integer(g, 0, 1):
            weights = weights.round()  # ties, and sums of whole numbers
        cap: Any = (None, integer(g, 0, 200), torch.randint(0, 200, (B, P), generator=g))[
            integer(g, int(mode in ("capped", "adjusted")), 2)
        ]
        options: dict[str, Any] = {"mode": mode, "cap": cap}
        total: Any = None
        if mode == "adjusted":
            options["ratio"] = integer(g, 1, 19) / 10
        else:
            total = (integer(g, 0, 9000), torch.randint(0, 9000, (B,), generator=g))[integer(g, 0, 1)]
            options["remainder"] = ("drop", "largest")[integer(g, 0, 1)]
        if mode in ("softmax", "adjusted"):
            options |= {"temperature": integer(g, 1, 30) / 3, "epsilon": (0.0, 1e-8)[integer(g, 0, 1)]}
        check(device, weights, total, **options, what=f"seed {seed}: {tuple(weights.shape)} {dtype} {options}")


def test_allocate_budget_opcheck(device: str) -> None:
    op = torch.ops.tokensieve.allocate_budget.default
    for dtype in (torch.float32, torch.float64):
        w = W.to(device, dtype)
        totals, caps = torch.tensor([5, 9], device=device), torch.full((2, 3), 4, device=device)
        for arguments in (
            (w, 12, None, None, None, None, 0, 1, 1.0, 0.0),
            (w, None, totals, 5, None, None, 2, 0, 1.0, 0.0),
            (w, None, None, None, caps, 0.5, 3, 0, 10.0, 1e-8),
        ):
            results = torch.library.opcheck(op, arguments)
            assert set(results.values()) == {"SUCCESS"}, results


def test_allocate_budget_compiles_with_dynamic_shapes(device: str) -> None:
    def step(weights: Tensor, caps: Tensor, total: int) -> Tensor:
        return ts.allocate_budget(weights * 2, total, cap=caps, mode="capped") + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, P, total in ((2, 5, 40), (3, 9, 77), (4, 30, 500)):
            weights, caps = torch.rand(B, P, device=device), torch.randint(1, 50, (B, P), device=device)
            assert_equal(function(weights, caps, total), step(weights, caps, total))
    torch._dynamo.reset()


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weights list": ({"weights": [[1.0]]}, TypeError, r"weights must be a torch.Tensor, got list"),
    "weights rank": ({"weights": W[0]}, ValueError, r"weights must be \(B, P\), got shape \(3,\)"),
    "weights half": ({"weights": W.half()}, TypeError, r"weights must be float32 or float64, got float16"),
    "weights int": ({"weights": W.long()}, TypeError, r"weights must be float32 or float64, got int64"),
    "parts": ({"weights": torch.ones(1, 4097)}, ValueError, r"weights must be \(B, P\) with P <= 4096, got P=4097"),
    "total missing": ({"total": None}, ValueError, r"total must be given with mode 'proportional', got None"),
    "total of adjusted": (
        {"mode": "adjusted", "cap": 3, "ratio": 0.5},
        ValueError,
        r"total must be None with mode 'adjusted', got 12",
    ),
    "ratio missing": ({"total": None, "mode": "adjusted", "cap": 3}, ValueError, r"ratio must be given with mode 'adjusted', got None"),
    "ratio of softmax": ({"mode": "softmax", "ratio": 0.5}, ValueError, r"ratio must be None with mode 'softmax', got 0.5"),
    "total negative": ({"total": -1}, ValueError, r"total must be at least 0, got -1"),
    "total float": ({"total": 3.5}, TypeError, r"total must be an int, got float"),
    "total shape": ({"total": torch.ones(3).long()}, ValueError, r"total must be \(B,\) = \(2,\), got shape \(3,\)"),
    "total dtype": ({"total": torch.ones(2)}, TypeError, r"total must be int64, got float32"),
    "cap negative": ({"cap": -2}, ValueError, r"cap must be at least 0, got -2"),
    "cap shape": ({"cap": torch.ones(2, 2).long()}, ValueError, r"cap must be \(B, P\) = \(2, 3\), got shape \(2, 2\)"),
    "cap device": ({"cap": torch.ones(2, 3, device="meta").long()}, ValueError, r"cap must be on the device of weights"),
    "cap missing": ({"mode": "capped"}, ValueError, r"cap must be given with mode 'capped', got None"),
    "cap of adjusted": ({"total": None, "mode": "adjusted", "ratio": 0.5}, ValueError, r"cap must be given with mode 'adjusted', got None"),
    "mode": ({"mode": "even"}, ValueError, r"mode must be one of 'proportional', .*, got 'even'"),
    "remainder": ({"remainder": "first"}, ValueError, r"remainder must be one of 'drop', 'largest', got 'first'"),
    "remainder of adjusted": (
        {"total": None, "mode": "adjusted", "ratio": 0.5, "cap": 3, "remainder": "largest"},
        ValueError,
        r"remainder must be 'drop' with mode 'adjusted'",
    ),
    "temperature": ({"temperature": 0.0}, ValueError, r"temperature must be positive, got 0.0"),
    "temperature type": ({"temperature": "warm"}, TypeError, r"temperature must be a float, got str"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_allocate_budget_bad_input(name: str) -> None:
    change, kind, message = ERRORS[name]
    with pytest.raises(kind, match=rf"^tokensieve\.allocate_budget: {message}"):
        ts.allocate_budget(**({"weights": W, "total": 12} | change))


def test_allocate_budget_meta() -> None:
    budget, shares = ts.allocate_budget(W.to("meta"), 12, return_shares=True)
    assert (budget.shape, budget.dtype, shares.dtype) == ((2, 3), torch.int64, torch.float32)

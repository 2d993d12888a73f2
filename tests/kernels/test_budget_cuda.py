"""budget_cuda under the host SIMT runtime, and budget_cpu at every level: the reference's budgets, and one another's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference.budget import allocate_row

MODES = ["proportional", "softmax", "capped", "adjusted"]


def case(seed: int, B: int, P: int, mode: str, wide: bool, largest: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    weights = rng.random((B, P)) ** 4 * 30
    caps = rng.integers(0, 60, (B, P))
    return {
        "B": B,
        "P": P,
        "weights": weights.astype(np.float64 if wide else np.float32),
        "total_rows": rng.integers(0, 20 * P + 2, B),
        "cap_parts": caps,
        "ratio": 0.3,
        "temperature": 5.0,
        "epsilon": 1e-8,
        "mode": MODES.index(mode),
        "remainder": int(largest),
        "wide": wide,
    }


def check(got: tuple[np.ndarray, np.ndarray], c: dict[str, Any]) -> None:
    for b in range(c["B"]):
        want, shares = allocate_row(
            c["weights"][b],
            int(c["total_rows"][b]),
            MODES[c["mode"]],
            c["cap_parts"][b].tolist(),
            c["ratio"],
            c["temperature"],
            c["epsilon"],
            "largest" if c["remainder"] else "drop",
        )
        assert got[0][b].tolist() == want, f"row {b}"
        np.testing.assert_allclose(got[1][b], shares, rtol=2e-15 if c["wide"] else 2e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_budget_every_schedule(scheduled: Any, mode: str, wide: bool) -> None:
    c = case(1, 3, 70, mode, wide, largest=mode != "adjusted")
    check(scheduled.budget_cuda(c), c)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_budget_levels_and_back_ends_agree_to_the_bit(kernels: Any, mode: str, wide: bool) -> None:
    for P in (1, 2, 5, 31, 32, 33, 127, 160, 300):
        for largest in (False, True) if mode != "adjusted" else (False,):
            c = case(P, 4, P, mode, wide, largest)
            device = kernels.budget_cuda(c)
            check(device, c)
            for level in kernels.cpu_levels():
                host = kernels.budget_cpu(c | {"level": level})
                for got, want in zip(host, device):
                    np.testing.assert_array_equal(got, want, err_msg=f"P={P} level={level}")


def test_budget_exp_is_right_to_the_last_bits(kernels: Any) -> None:
    """Shares of exp(x) beside one 1: share / share of the 1 is the exponential."""
    x = np.concatenate([[0.0], -np.logspace(-18, 2.84, 300), [-700.0, -709.0, -1e6, -np.inf]])
    c = {"B": 1, "P": len(x), "weights": x[None], "total": 1, "mode": 1, "wide": True}
    _, shares = kernels.budget_cpu(c)
    got = shares[0] / shares[0, 0]
    want = np.exp(x)
    np.testing.assert_allclose(got[:-3], want[:-3], rtol=6e-16)
    assert (got[-3:] == 0).all()
    np.testing.assert_array_equal(kernels.budget_cuda(c)[1], shares)


def test_budget_plan(kernels: Any) -> None:
    plan = kernels.budget_plan_cuda({"B": 2, "P": 160, "wide": True})
    assert plan == {"threads": 128, "smem_bytes": 2560, "bytes_moved": 2 * 160 * 24}
    assert kernels.budget_plan_cuda({"B": 1, "P": 5})["threads"] == 32
    assert kernels.budget_plan_cuda({"B": 1, "P": 4096, "wide": True})["smem_bytes"] == 64 * 1024

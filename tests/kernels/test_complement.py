"""complement_cuda under the host SIMT runtime, and complement_cpu at every level: exactly the set difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def case(seed: int, B: int, K: int, N: int, capacity: int | None = None, holes: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(N)[:K] for _ in range(B)]).astype(np.int64).reshape(B, K)
    if holes:  # -1 and positions named twice
        index[rng.random((B, K)) < 0.3] = -1
        index[:, K // 2 :] = index[:, : K - K // 2]
    return {"B": B, "K": K, "N": N, "capacity": N - K if capacity is None else capacity, "index": index}


def expected(c: dict[str, Any]) -> np.ndarray:
    out = np.full((c["B"], c["capacity"]), -1, dtype=np.int64)
    for b in range(c["B"]):
        rest = sorted(set(range(c["N"])) - set(c["index"][b, : c["K"]].tolist()))[: c["capacity"]]
        out[b, : len(rest)] = rest
    return out


def check(run: Any, c: dict[str, Any]) -> None:
    message = str({k: v for k, v in c.items() if k != "index"})
    np.testing.assert_array_equal(run(c), expected(c), err_msg=message)


def test_complement_every_schedule(scheduled: Any) -> None:
    check(scheduled.complement_cuda, case(1, 3, 130, 700, 700, holes=True))
    check(scheduled.complement_cuda, case(2, 2, 300, 1200) | {"threads": 64})  # three tiles


SIZES = [(1, 1), (1, 0), (7, 3), (8, 8), (9, 2), (31, 30), (32, 5), (33, 12), (255, 9), (257, 200), (513, 100), (3000, 17)]


@pytest.mark.parametrize("workspace", [False, True], ids=["shared", "workspace"])
def test_complement_cuda_sizes(kernels: Any, workspace: bool) -> None:
    limit = {"smem_per_block": 1024} if workspace else {}
    for N, K in SIZES:
        assert (kernels.complement_plan_cuda(case(0, 2, K, N) | limit)["workspace_bytes"] > 0) == workspace
        check(kernels.complement_cuda, case(N, 2, K, N) | limit)
        check(kernels.complement_cuda, case(N, 2, K, N, N, holes=True) | limit | {"threads": 64})


def test_complement_cuda_cuts_at_the_capacity_and_passes_by_what_is_no_position(kernels: Any) -> None:
    check(kernels.complement_cuda, case(1, 2, 10, 90, 33))
    for N in (20, 512):  # at 512 the bit of position N would be in the word behind the last
        for limit in ({}, {"smem_per_block": 16}):
            c = case(2, 1, 4, N, N)
            c["index"][0, :2] = [N, -7]
            check(kernels.complement_cuda, c | limit)


@pytest.mark.parametrize("level", range(3), ids=["baseline", "avx2", "avx512"])
def test_complement_cpu(kernels: Any, level: int) -> None:
    if level not in kernels.cpu_levels():
        pytest.skip("not on this machine")
    for N, K in SIZES:
        check(kernels.complement_cpu, case(N, 2, K, N) | {"level": level})
        check(kernels.complement_cpu, case(N, 3, K, N, N + 5, holes=True) | {"level": level})
    for bad in (20, -2):
        c = case(3, 2, 5, 20) | {"level": level}
        c["index"][1, 4] = bad
        with pytest.raises(RuntimeError, match=r"every index must be in \[-1, N\)"):
            kernels.complement_cpu(c)
    with pytest.raises(RuntimeError, match="at most capacity positions"):
        kernels.complement_cpu(case(3, 200, 5, 20, 14) | {"level": level})


def test_complement_strided_rows(kernels: Any) -> None:
    wide = case(4, 3, 40, 300)
    c = wide | {"K": 30, "index_stride": 40, "capacity": 270}
    check(kernels.complement_cuda, c)
    check(kernels.complement_cpu, c)


def test_complement_empty(kernels: Any) -> None:
    for run in (kernels.complement_cuda, kernels.complement_cpu):
        for B, K, N, capacity in ((0, 3, 9, 6), (2, 0, 0, 0), (2, 0, 0, 3), (2, 0, 5, 5), (2, 5, 5, 0)):
            check(
                run,
                case(1, B, K, N, capacity) if B else {"B": 0, "K": K, "N": N, "capacity": capacity, "index": np.zeros((0, K), np.int64)},
            )


def test_complement_plan(kernels: Any) -> None:
    def plan(B: int, N: int) -> dict[str, int]:
        return kernels.complement_plan_cuda({"B": B, "K": 640, "N": N, "capacity": N - 640})

    assert plan(8, 2944) == {"threads": 384, "smem_bytes": 368, "workspace_bytes": 0, "bytes_moved": 8 * 2944 * 8}
    assert plan(8, 700)["threads"] == 96
    assert plan(1, 65536)["threads"] == 1024
    assert plan(3, 4_000_000) == {"threads": 1024, "smem_bytes": 0, "workspace_bytes": 1_500_000, "bytes_moved": 3 * 4_000_000 * 8}

"""Proves what the emulator catches: every fault planted in csrc/testing/faults.cu is found, in the build that can find it, by place and
thread; its right twin passes in every build and schedule."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "testing" / "faults.cu"
LINES = {name: number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) for name in re.findall(r"// FAULT: (\w+)", line)}
HERE = r"\[.*faults\.cu:{line}\] \(block \d,0,0 thread \d+,0,0\)"

# The emulator itself raises, in every build. {line} is the line marked in the source.
RAISES = {
    "divergent_barrier": r"divergent __syncthreads: other threads of the block wait at .*faults\.cu:\d+ \[.*faults\.cu:\d+\] \(block 0,0,0",
    "deadlock": r"(?s)deadlock.*block \(0,0,0\).*31 thread\(s\) wait in __syncwarp at .*faults\.cu:{line}: 0-4 6-31"
    r".*1 thread\(s\) wait in named_barrier at .*: 5",
    "unfinished_shuffle": r"(?s)deadlock.*32 thread\(s\) wait in __shfl_sync at .*faults\.cu:{line}: 0 2 4 ",
    "mixed_operations": r"mixed warp operations: __\w+_sync, while other lanes of the mask wait in __\w+_sync at .*faults\.cu:\d+",
    "lane_outside_mask": r"__shfl_sync: the lane is not in its own mask " + HERE,
    "unaligned_mma": r"mixed warp operations: ldmatrix_x2, while other lanes of the mask wait in ldmatrix_x2 at .*faults\.cu:\d+",
    "failed_check": r"device_check failed \[.*faults\.cu:{line}\] \(block 0,0,0 thread 7,0,0\)",
    "copy_in_flight_at_exit": r"the thread ends with 1 cp\.async in flight",
    "misaligned_copy": r"cp_async: an address is not aligned to the size " + HERE,
    "misaligned_ldmatrix": r"ldmatrix: the row is not 16-byte aligned " + HERE,
    "missing_proxy_fence": r"wgmma: cp\.async has written to shared memory, and no fence_async_shared came after it " + HERE,
    "short_wgmma_wait": r"wgmma_wait: the accumulators are still in flight " + HERE,
    "missing_wgmma_fence": r"wgmma: the thread has used its registers, and no wgmma_fence came after it " + HERE,
    "accumulator_in_flight": r"wgmma: an accumulator was written in flight " + HERE,
    "early_tile_write": r"wgmma: its tile changed before the wait " + HERE,
    "divergent_warpgroup": r"wgmma: another warp of the warpgroup took this step at .*faults\.cu:\d+ \[.*faults\.cu:\d+\] \(block 0,0,0",
    "unfinished_warpgroup": r"wgmma: warp 3 took 0 of its warpgroup's 1 steps",
    "wgmma_in_flight_at_exit": r"the thread ends with a wgmma in flight",
    "misaligned_tile": r"wgmma: the tile is not 1024-byte aligned " + HERE,
    "endless_spin": r"endless spin: .*faults\.cu:{line}\] \(block 1,0,0 thread 0,0,0\)",
    "cluster_first_sync": r"cluster_map: no cluster_sync yet, the peer may not have started " + HERE,
    "cluster_last_sync": r"the block ends although a peer has mapped its shared memory|cluster_map: the peer has ended",
    "cluster_rank_bounds": r"cluster_map: rank 2 of a cluster of 2 " + HERE,
}
# Another answer than the right twin's under at least one schedule of the plain build.
WRONG_ANSWER = {
    "uninitialised_shared",
    "missing_syncthreads",
    "missing_syncwarp",
    "missing_copy_wait",
    "early_refill",
    "missing_wgmma_wait",
}
# The sanitizer ends the process with this report.
REPORTS = {
    "address": {
        "shared_bounds": r"(?s)heap-buffer-overflow.*shared_bounds.*faults\.cu:{line}.*simt: in block \(0,0,0\) thread \(63,0,0\), "
        r"byte 256 of the 256 bytes of shared array dynamic",
        "carve_bounds": r"(?s)heap-buffer-overflow.*carve_bounds.*faults\.cu:{line}.*byte 128 of the 128 bytes of shared array low",
        "static_bounds": r"(?s)heap-buffer-overflow.*static_bounds.*faults\.cu:{line}.*byte -\d+ of the 256 bytes of shared array cell",
        "global_bounds": r"(?s)heap-buffer-overflow.*global_bounds.*faults\.cu:{line}.*simt: in block \(0,0,0\) thread \(\d+,0,0\)",
        "misaligned_vector": r"faults\.cu:{line}:\d+: runtime error: .*misaligned address",
        "wide_shift": r"faults\.cu:{line}:\d+: runtime error: shift exponent \d+ is too large",
    },
    "thread": {
        name: r"(?s)data race.*faults\.cu:{line}.*'block \(\d,0,0\) thread \(\d+,0,0\)'"
        for name in (
            "missing_syncthreads",
            "missing_syncwarp",
            "shuffle_is_no_barrier",
            "early_refill",
            "missing_tile_barrier",
            "block_race",
            "missing_producer_fence",
            "missing_consumer_fence",
            "late_fence",
            "cluster_remote_race",
        )
    },
}
KILLED = [(sanitizer, name) for sanitizer, faults in REPORTS.items() for name in faults]


def test_every_fault_is_expected_somewhere(kernels: ModuleType) -> None:
    assert set(kernels.fault_names()) == set(RAISES) | WRONG_ANSWER | {name for _, name in KILLED}


@pytest.mark.parametrize("name", sorted(set(RAISES) | WRONG_ANSWER | {name for _, name in KILLED}))
def test_right_twin_passes(scheduled: ModuleType, name: str) -> None:
    if name in ("endless_spin", "cluster_remote_race"):
        scheduled.configure("descending", 0, 2)  # blocks that wait for each other must be resident together
    out = scheduled.run_fault(name, False)
    assert not any(map(math.isnan, out)) or name == "uninitialised_shared"


@pytest.mark.parametrize("name", sorted(RAISES))
def test_fault_raises_with_place_and_thread(scheduled: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError, match=RAISES[name].replace("{line}", str(LINES.get(name, 0)))):
        scheduled.run_fault(name, True)
    assert not any(map(math.isnan, scheduled.run_fault(name, False))), "a launch after an aborted one must work"


@pytest.mark.parametrize("name", sorted(WRONG_ANSWER))
def test_fault_gives_a_wrong_answer(kernels: ModuleType, name: str) -> None:
    if kernels.sanitizer == "thread":
        pytest.skip("ThreadSanitizer would end the process")
    wrong = 0
    for order, seed in [("ascending", 0), ("descending", 0), *(("random", seed) for seed in range(1, 11))]:
        kernels.configure(order, seed, 1)
        wrong += repr(kernels.run_fault(name, True)) != repr(kernels.run_fault(name, False))
    assert wrong > 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "reported" in metafunc.fixturenames:
        sanitizer = getattr(sys.modules.get("_kernels"), "sanitizer", "none")
        metafunc.parametrize("reported", sorted(REPORTS.get(sanitizer, [])))  # none in the plain build: see make sanitize


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_fault_is_reported_by_sanitizer(kernels: ModuleType, reported: str, order: str) -> None:
    code = f"import _kernels as k; k.configure('{order}', 7, 2); k.run_fault('{reported}', True); print('survived')"
    environment = os.environ | {"PYTHONPATH": str(Path(kernels.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0, f"{reported} survived under the {kernels.sanitizer} sanitizer, order {order}"
    expected = REPORTS[kernels.sanitizer][reported].replace("{line}", str(LINES[reported]))
    assert re.search(expected, done.stderr), done.stderr[-4000:]


def test_ldmatrix_bank_conflicts_are_counted(kernels: ModuleType) -> None:
    kernels.run_fault("misaligned_ldmatrix", False)
    assert kernels.stats()["ldmatrix_conflicts"] == 0

"""The machine that is measured: its record and its ceilings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch

from . import ROOT

CPU_SETS = (2**19, 2**21, 2**23, 3 * 2**23)  # bytes: working sets that stay in L2 and L3 of current servers


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"model name\s*:\s*(.+)", file.read())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def record(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers; `name` is the folder below bench/results."""
    import tokensieve
    from tokensieve._load import STATE

    dirty = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    out: dict[str, Any] = {
        "name": slug(f"{_cpu_model()} {cores()} cores {STATE.cpu_level}"),
        "device": device,
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_level": STATE.cpu_level,
        "torch_cpu_level": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "tokensieve": tokensieve.__version__,
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if dirty is None else bool(dirty),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        out |= {
            "name": slug(facts.name),
            "gpu": facts.name,
            "compute_capability": f"{facts.major}.{facts.minor}",
            "sms": facts.multi_processor_count,
            "l2_bytes": facts.L2_cache_size,
            "cuda": torch.version.cuda,
            "clocks": _output(
                "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"
            ),
        }
    return out


def best_seconds(fn: Callable[[], Any], device: str, seconds: float) -> float:
    """Shortest of the runs that fit into `seconds` (at least 5): a ceiling is what the machine can do, not what it does on average."""
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    fn()
    sync()
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        sync()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def ceilings(device: str, quick: bool = False) -> dict[str, Any]:
    """Measured, in bytes/s and FLOP/s: memory traffic (the better of a copy's read+write and a read) and matrix multiplication.

    A floor divides compulsory bytes by this. Small working sets stay in a cache and pass the DRAM rate, so on a CPU the rate is also
    measured on sets of 0.5, 2, 8 and 24 MB, and a row is held against the smallest set that it fits into.
    """
    seconds = 0.1 if quick else 0.6
    big = 2**30 if device == "cuda" else 2**28
    sets = [2 * big, *(CPU_SETS if device == "cpu" else ())]
    copy, read = {}, {}
    for total in sets:
        source = torch.rand(total // 8, device=device)
        target = torch.empty_like(source)
        inner = max(1, 2**23 // total)

        def copies(source: torch.Tensor = source, target: torch.Tensor = target, inner: int = inner) -> None:
            for _ in range(inner):
                target.copy_(source)

        def reads(source: torch.Tensor = source, target: torch.Tensor = target, inner: int = inner) -> None:
            for _ in range(inner):
                torch.dot(source, target)

        copy[total] = total * inner / best_seconds(copies, device, seconds)
        read[total] = total * inner / best_seconds(reads, device, seconds)
    dtype, n = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 1024)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    gemm = 2 * n**3 / best_seconds(lambda: a @ b, device, seconds)
    dram = 2 * big
    return {
        "copy_bytes_per_s": copy[dram],
        "read_bytes_per_s": read[dram],
        "cached_bytes_per_s": {str(total): max(copy[total], read[total]) for total in sorted(sets) if total != dram},
        "gemm_flops_per_s": gemm,
        "gemm_dtype": "bf16" if device == "cuda" else "f32",
    }


def floor_us(ceiling: dict[str, Any], bytes_moved: int, flops: int) -> tuple[float, str]:
    """(microseconds, "memory" | "cache" | "gemm"): max(bytes / bandwidth, flops / matrix rate), and which of them binds."""
    bandwidth, kind = max(ceiling["copy_bytes_per_s"], ceiling["read_bytes_per_s"]), "memory"
    for total, rate in ceiling["cached_bytes_per_s"].items():
        if bytes_moved <= int(total):
            bandwidth, kind = max(rate, bandwidth), "cache"
            break
    moved, computed = 1e6 * bytes_moved / bandwidth, 1e6 * flops / ceiling["gemm_flops_per_s"]
    return (computed, "gemm") if computed > moved else (moved, kind)

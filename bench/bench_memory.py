"""Peak memory of attention_scores against code that builds the attention map. Every probe is a process of its own on a CPU."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import ROOT, bench_colsum, cases, checks, peers
from .cases import Shape
from .harness import OURS, Case, Settings, WrongOutput, make_row, summarise

SHAPES = {s.name: s for s in (cases.CLIP, cases.LLAVA15, cases.LLAVA_NEXT, cases.QWEN_16K, cases.VIDEO_50K)}
MAP_LIMIT = 4 * 2**30  # a larger float32 map is not built
SLACK = 8 * 2**20  # thread stacks, pages and allocator rounding
SMART, MAP = "smart eager", "eager code"


def scores(who: str, shape: Shape, query: Tensor, key: Tensor, all_rows: bool = False) -> Tensor:
    if all_rows:
        return ts.attention_scores(query, key, causal=True) if who == OURS else peers.map_columns(query, key, causal=True)
    if who == OURS:
        return ts.attention_scores(query[:, :, -1:], key, key_range=shape.image)
    if who == SMART:
        return peers.few_row_scores(query[:, :, -1:], key, shape.image)
    return peers.map_scores(query, key, shape.image, -1, causal=True)


def probe(who: str, shape: Shape, device: str, all_rows: bool = False) -> dict[str, Any]:
    """Peak bytes beyond the inputs, seconds of calls after the first, and what is wrong with the output."""
    tiny = Shape("tiny", 16, shape.H, shape.Hkv, shape.D, 8, (2, 10), 4)
    scores(who, tiny, *cases.queries_keys(0, tiny, 1, 16, device=device), all_rows)  # threads and libraries are up before the count starts
    query, key = cases.queries_keys(0, shape, 1, shape.N if who == MAP or all_rows else 1, device=device)
    before = _reset_peak(device)
    out = scores(who, shape, query, key, all_rows)
    peak = max(0, _peak(device) - before)
    times = []
    for _ in range(3 if who == MAP or all_rows else 20):
        start = time.perf_counter()
        scores(who, shape, query, key, all_rows)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if all_rows:
        want = bench_colsum.column_scores(query, key, causal=True)
    else:
        want = reference.attention_scores(query[:, :, -1:], key, key_range=shape.image)[0]
    return {"peak_bytes": peak, "seconds": times, "wrong": checks.near(out, want, checks.score_tolerance(torch.float32, who == OURS))}


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark of the resident set to its present size
    except OSError:
        pass  # then inputs that shrank since hide part of the peak
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"VmHWM:\s*(\d+) kB", file.read())
    except OSError:
        found = None
    return 1024 * (int(found.group(1)) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _run(who: str, shape: Shape, device: str, all_rows: bool) -> dict[str, Any]:
    if device == "cuda":
        return probe(who, shape, device, all_rows)
    command = [sys.executable, "-m", "bench.bench_memory", who, shape.name, *(["all"] if all_rows else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the probe of {who} ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def build(settings: Settings) -> Iterator[Case]:
    for shape, all_rows in (*((shape, False) for shape in SHAPES.values()), (cases.LLAVA_NEXT, True)):
        builds_map = 4 * shape.H * shape.N**2 <= MAP_LIMIT
        yield Case(
            op="attention_scores",
            case=f"{shape.label}, {'all rows' if all_rows else 'last row'}: peak memory",
            dtype="f32",
            inputs=lambda seed, shape=shape, builds_map=builds_map, all_rows=all_rows: (shape, builds_map, all_rows),
            ours=scores,
            peers={},
            check=lambda inputs, output, ours: None,  # every probe compares its own output
            bytes=4 * (shape.Hkv * shape.N * shape.D + shape.H * shape.D * (shape.N if all_rows else 1) + shape.R),
            flops=2 * shape.H * shape.N * shape.D * ((shape.N + 1) // 2 if all_rows else 1),
            quick=shape is cases.CLIP,
        )


def measure(case: Case, settings: Settings, ceiling: dict[str, Any]) -> dict[str, Any]:
    """The row of a case: times as everywhere, and the peak bytes of every contender."""
    shape, builds_map, all_rows = case.inputs(0)
    names = (OURS, MAP) if all_rows else (OURS, SMART, MAP) if builds_map else (OURS, SMART)
    probes = {who: _run(who, shape, settings.device, all_rows) for who in names}
    for who, result in probes.items():
        if result["wrong"]:
            raise WrongOutput(f"{case.op} {case.case} {case.dtype}: output of {who} is wrong: {result['wrong']}")
    map_bytes = 4 * shape.H * shape.N**2
    notes = [] if builds_map else [f"{MAP}: not run, its map alone would take {map_bytes / 2**30:.0f} GiB"]
    row = make_row(case, {"call": {who: summarise(result["seconds"]) for who, result in probes.items()}}, settings, ceiling, notes)
    peak = probes[OURS]["peak_bytes"]
    limit, text = 8 * shape.H * shape.N + SLACK, "8*B*H*N + 8 MiB"
    if all_rows:
        limit, text = int(0.05 * probes[MAP]["peak_bytes"]), f"5% of {MAP}"
    return row | {
        "peak_bytes": peak,
        "peers_peak_bytes": {who: result["peak_bytes"] for who, result in probes.items() if who != OURS},
        "map_bytes": map_bytes,
        "targets": [{"target": f"<= {text} = {limit / 2**20:.1f} MiB peak", "value": peak, "met": peak <= limit}],
    }


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps(probe(sys.argv[1], SHAPES[sys.argv[2]], "cpu", sys.argv[3:] == ["all"])))

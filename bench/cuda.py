"""Timing on a GPU: calls from Python, graph replay with warm inputs, and graph replay with inputs that left the L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .harness import OURS, Case, Function, Inputs, Settings, Timing, interleave, nbytes

MAX_COPIES = 24
COPIES_BYTES = 4 * 2**30


def wait() -> None:
    """Keeps the device busy for about 0.1 ms without touching memory."""
    torch.cuda._sleep(150_000)


def capture(fn: Function, calls: list[Inputs]) -> torch.cuda.CUDAGraph:
    """One graph of fn on each of the inputs. Outputs are freed inside, so they share memory as in a running program."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in calls[:2]:
            fn(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in calls:
            fn(*inputs)
    return graph


def replay_sampler(graph: torch.cuda.CUDAGraph, calls: int, before: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call. `before` is enqueued first: it hides the launch of the graph and, where it flushes, empties the L2."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        before()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return sample


def eager_sampler(fn: Function, inputs: Inputs, calls: int) -> Callable[[], float]:
    """Seconds of one call from Python, launches included: the larger of host and device time, back to back."""

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn(*inputs)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    return sample


def measure(
    case: Case, contenders: dict[str, Function], inputs: Inputs, settings: Settings
) -> tuple[dict[str, dict[str, Timing]], list[str]]:
    """({"cold" | "graph" | "eager": {contender: Timing}}, notes).

    cold: a graph of as many calls as fit, each on inputs of its own, after a flush of over 5 x L2: every call reads from memory.
    graph: the same number of calls on one set of inputs. eager: called from Python. One untimed round warms the clocks up.
    """
    seconds = settings.row_seconds / 3
    copies = 2 if case.call_only else max(2, min(MAX_COPIES, COPIES_BYTES // max(1, nbytes(inputs))))
    eager = {name: eager_sampler(fn, inputs, calls_for(fn, inputs)) for name, fn in contenders.items()}
    for sampler in eager.values():
        sampler()
    timed_eager = interleave(eager, seconds)
    if case.call_only:
        return {"eager": timed_eager}, []
    notes, cold, warm = [], {}, {}
    rotated = [inputs, *(case.inputs(1000 * i) for i in range(1, copies))]
    flush = torch.empty(6 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=settings.device)
    for name, fn in contenders.items():
        calls = rotated if timed_eager[name].median_us < 5e3 else rotated[:2]  # maps of gigabytes: two calls say enough
        try:
            cold[name] = replay_sampler(capture(fn, calls), len(calls), flush.zero_)
            warm[name] = replay_sampler(capture(fn, [inputs] * len(calls)), len(calls), wait)
        except RuntimeError as error:
            torch.cuda.synchronize()
            if name == OURS:
                raise
            notes.append(f"{name}: cannot be captured in a graph ({str(error).splitlines()[0][:80]})")
            cold.pop(name, None)
    return {"cold": interleave(cold, seconds), "graph": interleave(warm, seconds), "eager": timed_eager}, notes


def calls_for(fn: Function, inputs: Inputs) -> int:
    """Calls that make about a millisecond."""
    fn(*inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn(*inputs)
    torch.cuda.synchronize()
    return max(1, min(50, round(1e-3 / (time.perf_counter() - start))))

"""Times contenders side by side on the same inputs, after their outputs were compared with a reference."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import machine

OURS = "tokensieve"
FLUSH_BYTES = 2**27  # four times the last-level cache of the machine this was written on
COLD_COPIES = 16
COLD_BYTES = 2**28  # of inputs in a cold run

Inputs = tuple[Any, ...]
Function = Callable[..., Any]


class WrongOutput(Exception):
    """A contender's output differs from the reference: the row is refused."""


@dataclass(frozen=True)
class Settings:
    """How long to measure: seconds a row, shared by its contenders."""

    device: str = "cpu"
    quick: bool = False
    compile: bool = True

    @property
    def row_seconds(self) -> float:
        return 0.15 if self.quick else 0.9 if self.device == "cuda" else 1.5

    @property
    def sample_seconds(self) -> float:
        return 1e-4 if self.quick else 4e-4  # calls shorter than this are timed in groups


@dataclass(frozen=True)
class Target:
    """What a row is held against: a ratio over `peer`, or a limit of another of the row's numbers."""

    limit: float
    peer: str = ""
    of: str = "ratio"  # ratio | floor (share of the floor reached) | median_us | overhead_us | peak_bytes
    device: str = "cpu"

    def judge(self, row: dict[str, Any]) -> dict[str, Any] | None:
        if self.of == "ratio":
            value, text = row["ratios"].get(self.peer), f">= {self.limit:g}x {self.peer}"
        elif self.of == "floor":
            value, text = row["floor_us"] / row["median_us"], f">= {self.limit:.0%} of the floor"
        else:
            value, text = row.get(self.of), f"<= {self.limit:g} {self.of}"
        if value is None:
            return None
        return {"target": text, "value": value, "met": value >= self.limit if ">=" in text else value <= self.limit}


@dataclass
class Case:
    """One row: the same inputs for every contender, each a function of them."""

    op: str
    case: str
    dtype: str
    inputs: Callable[[int], Inputs]  # seed -> arguments of every contender
    ours: Function
    peers: dict[str, Function]
    check: Callable[[Inputs, Any, bool], str | None]  # (inputs, output, is it ours) -> what is wrong
    bytes: int = 0
    flops: int = 0
    quick: bool = False  # part of --quick
    compiled: str | None = None  # the peer that torch.compile gets too
    targets: tuple[Target, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run, and why
    call_only: bool = False  # the time of a call is the question: no graph replay
    calls: bool = False  # count the operator calls of every contender


@dataclass
class Timing:
    """Microseconds of one call: median and spread over samples."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest of the values.

    Example:
        >>> quantile([4.0, 1.0, 2.0], 0.5), quantile([0.0, 10.0], 0.1)
        (2.0, 1.0)
    """
    values = sorted(values)
    at = q * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def summarise(samples: list[float]) -> Timing:
    """Seconds of one call -> Timing."""
    p10, median, p90 = (1e6 * quantile(samples, q) for q in (0.1, 0.5, 0.9))
    return Timing(median, p10, p90, len(samples))


def interleave(samplers: dict[str, Callable[[], float]], seconds: float, least: int = 5) -> dict[str, Timing]:
    """Samples A B C, B C A, C A B, ...: drift of the machine hits everyone alike, and nobody always follows the same neighbour.

    A contender stops when it has used its share of the time and has `least` samples (3 where one takes over half a second).
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    order = list(samplers)
    while order:
        for name in list(order):
            start = time.perf_counter()
            samples[name].append(samplers[name]())
            spent[name] += time.perf_counter() - start
            enough = 3 if spent[name] > 0.5 * len(samples[name]) else least
            if spent[name] >= seconds / len(samplers) and len(samples[name]) >= enough:
                order.remove(name)
        order = order[1:] + order[:1]
    return {name: summarise(values) for name, values in samples.items()}


def compiled(fn: Function, inputs: Inputs) -> Function:
    """torch.compile of fn, compiled now; raises what the compiler raises."""
    torch._dynamo.reset()
    out = torch.compile(fn, dynamic=False)
    out(*inputs)
    return out


class OperatorCalls(TorchDispatchMode):
    """Counts operators that compute something: neither views nor allocations. On a GPU each is a launch at least.

    Example:
        >>> with OperatorCalls() as counted:
        ...     _ = torch.ones(4, 6).view(6, 4).sum(0) * 2
        >>> counted.calls
        3
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls += not (func.is_view or name.startswith("empty") or name in ("detach", "alias", "_unsafe_view", "lift_fresh"))
        return func(*args, **(kwargs or {}))


def count_calls(fn: Function, inputs: Inputs) -> int:
    with OperatorCalls() as counted:
        fn(*inputs)
    return counted.calls


def verify(case: Case, contenders: dict[str, Function], inputs: Inputs) -> None:
    """Runs every contender once and compares; this is also the warm-up."""
    for name, fn in contenders.items():
        problem = case.check(inputs, fn(*inputs), name == OURS)
        if problem:
            raise WrongOutput(f"{case.op} {case.case} {case.dtype}: output of {name} is wrong: {problem}")


def cpu_samplers(contenders: dict[str, Function], inputs: Inputs, settings: Settings) -> dict[str, Callable[[], float]]:
    def sampler(fn: Function) -> Callable[[], float]:
        start = time.perf_counter()
        fn(*inputs)
        first = time.perf_counter() - start
        if first < settings.sample_seconds:  # the first call is slow: look again before choosing how many make a sample
            start = time.perf_counter()
            for _ in range(10):
                fn(*inputs)
            first = (time.perf_counter() - start) / 10
        inner = max(1, round(settings.sample_seconds / max(first, 1e-7)))

        def sample() -> float:
            start = time.perf_counter()
            for _ in range(inner):
                fn(*inputs)
            return (time.perf_counter() - start) / inner

        return sample

    return {name: sampler(fn) for name, fn in contenders.items()}


def cold_samplers(case: Case, contenders: dict[str, Function], inputs: Inputs, fast: set[str]) -> dict[str, Callable[[], float]]:
    """A write of 128 MB empties the caches, then every contender is called once on each of several inputs."""
    copies = max(1, min(COLD_COPIES, COLD_BYTES // max(1, nbytes(inputs))))
    rotated = [inputs, *(case.inputs(1000 * i) for i in range(1, copies))]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8)

    def sampler(fn: Function) -> Callable[[], float]:
        def sample() -> float:
            flush.zero_()
            start = time.perf_counter()
            for arguments in rotated:
                fn(*arguments)
            return (time.perf_counter() - start) / copies

        return sample

    return {name: sampler(fn) for name, fn in contenders.items() if name in fast}


def measure_cpu(case: Case, contenders: dict[str, Function], inputs: Inputs, settings: Settings) -> dict[str, dict[str, Timing]]:
    """{"call": caches as the previous call left them, "cold": caches flushed}; cold leaves out whoever takes over 50 ms."""
    modes = {"call": interleave(cpu_samplers(contenders, inputs, settings), settings.row_seconds)}
    if not (case.call_only or settings.quick):
        fast = {name for name, timing in modes["call"].items() if name == OURS or timing.median_us < 5e4}
        modes["cold"] = interleave(cold_samplers(case, contenders, inputs, fast), settings.row_seconds / 2)
    return modes


def nbytes(inputs: Inputs) -> int:
    """Bytes of all tensors in the arguments, lists included."""
    total = 0
    for item in inputs:
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, list | tuple):
            total += nbytes(tuple(item))
    return total


def measure(case: Case, settings: Settings, ceiling: dict[str, Any]) -> dict[str, Any]:
    """The JSON row of a case. Raises WrongOutput before anything is timed if any output is wrong."""
    notes = [f"{name}: {why}" for name, why in case.skipped.items()]
    with torch.no_grad():
        inputs = case.inputs(0)
        contenders = {OURS: case.ours, **case.peers}
        if case.compiled and settings.compile and (settings.device == "cpu" or case.quick):  # Triton takes 5 s and more a function
            try:
                contenders["torch.compile"] = compiled(case.peers[case.compiled], inputs)
            except Exception as error:  # whatever the compiler raises: the row stands without it
                notes.append(f"torch.compile: does not compile here ({type(error).__name__})")
        verify(case, contenders, inputs)
        calls = {name: count_calls(fn, inputs) for name, fn in contenders.items() if name != "torch.compile"} if case.calls else None
        gc.collect()
        gc.disable()
        try:
            if settings.device == "cuda":
                from . import cuda

                modes, more = cuda.measure(case, contenders, inputs, settings)
                notes += more
            else:
                modes = measure_cpu(case, contenders, inputs, settings)
        finally:
            gc.enable()
    row = make_row(case, modes, settings, ceiling, notes)
    return row if calls is None else {**row, "operator_calls": calls}


def make_row(
    case: Case, modes: dict[str, dict[str, Timing]], settings: Settings, ceiling: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The first mode fills the row and `modes` holds all: call, cold on a CPU; cold, graph, eager on a GPU."""
    first, timings = next(iter(modes.items()))
    floor, bound = machine.floor_us(ceiling, case.bytes, case.flops)
    row: dict[str, Any] = {"op": case.op, "case": case.case, "dtype": case.dtype, "device": settings.device, "mode": first}
    row |= numbers(timings) | {"floor_us": floor, "floor_bound": bound, "bytes": case.bytes, "flops": case.flops, "correct": True}
    if len(modes) > 1:
        row["modes"] = {name: numbers(timings) for name, timings in modes.items()}
    if case.call_only and "torch.add" in row["peers"]:
        row["overhead_us"] = row["median_us"] - row["peers"]["torch.add"]
    row["notes"] = notes
    row["targets"] = [judged for t in case.targets if t.device == settings.device and (judged := t.judge(row))]
    return row


def numbers(timings: dict[str, Timing]) -> dict[str, Any]:
    own = timings[OURS]
    peers = {name: t.median_us for name, t in timings.items() if name != OURS}
    spread = {name: [t.p10_us, t.p90_us] for name, t in timings.items() if name != OURS}
    ratios = {name: us / own.median_us for name, us in peers.items()}
    return {
        "median_us": own.median_us,
        "p10_us": own.p10_us,
        "p90_us": own.p90_us,
        "samples": own.samples,
        "peers": peers,
        "peers_p10_p90_us": spread,
        "ratios": ratios,
    }

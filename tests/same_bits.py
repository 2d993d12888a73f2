"""One computation on every CPU level and with several thread counts must give one answer, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from reference.compare import assert_equal
from torch import Tensor


@contextmanager
def processor(level: int, threads: int) -> Iterator[None]:
    """The CPU kernels of `level` on `threads` threads; what was set before comes back."""
    before = torch.ops.tokensieve.cpu_level(), torch.get_num_threads()
    torch.ops.tokensieve.set_cpu_level(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.ops.tokensieve.set_cpu_level(before[0])
        torch.set_num_threads(before[1])


def cpu_levels() -> range:
    """Those that this machine can run."""
    return range(torch.ops.tokensieve.best_cpu_level() + 1)


def assert_same_bits(run: Callable[[], Tensor | Iterable[Tensor]], settings: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Runs it in every setting (level, threads) and returns what all of them gave."""
    first: list[Tensor] = []
    for level, count in settings:
        with processor(level, count):
            torch.full((100_000,), torch.nan)  # dirties the memory that scratch comes from
            made = run()
            found = [made] if isinstance(made, Tensor) else list(made)  # a generator runs here, not later
        first = first or found
        for i, (got, want) in enumerate(zip(found, first, strict=True)):
            what = f"output {i} at level {level} with {count} threads"
            assert_equal(got, want, what)
            assert_equal(bits(got), bits(want), f"bits of {what}")
    return first


def bits(x: Tensor) -> Tensor:
    """-0.0 is not 0.0 here, and one NaN not another."""
    return x.detach().contiguous().flatten().view(torch.uint8)


def on_every_level(run: Callable[[], Tensor | Iterable[Tensor]]) -> list[Tensor]:
    """assert_same_bits on all CPU levels, each with another thread count (1, 2 and 3 on any machine)."""
    best = cpu_levels()[-1]
    return assert_same_bits(run, [(min(level, best), level + 1) for level in range(3)])


def on_any_threads(run: Callable[[], Tensor | Iterable[Tensor]]) -> list[Tensor]:
    """assert_same_bits with 1, 2, 3 and again 2 threads, on the level in use."""
    level = torch.ops.tokensieve.cpu_level()
    return assert_same_bits(run, [(level, count) for count in (1, 2, 3, 2)])
